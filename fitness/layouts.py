"""What has to be cut together in a model: what its adapter says, or else what its dependency graph shows."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters import ADAPTERS, is_multimodal
from evoprune.fitness.adapters.base import AttentionLayout, MlpLayout, ModelAdapter, described_families
from evoprune.fitness.adapters.generic import generic_adapter
from evoprune.fitness.adapters.traced import traced_layout
from evoprune.metrics.errors import InvalidInput

# A model that is cut no longer shows what it was: it is looked at while it is dense, and once.
_TRACED: WeakKeyDictionary[nn.Module, ModelAdapter] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Layout:
    """What has to be cut together in every block.

    Attributes:
        blocks: module path of the list of decoder blocks.
        attention, mlp: where the parts of a block are.
        shared_norms: norms that both read.
        traced: whether it was found by looking, so that nobody has said that it is so.
    """

    blocks: str
    attention: AttentionLayout
    mlp: MlpLayout
    shared_norms: tuple[str, ...]
    traced: bool


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model; of a family without a described one the model has to be dense when it is first asked for.

    Raises:
        InvalidInput: nobody has said how the blocks of this family can be cut, and it cannot be found either.
    """
    family = model.config.get_text_config().model_type
    described = described_families()
    if family in described:
        adapter = ADAPTERS[family]
    elif is_multimodal(model.config):
        raise InvalidInput(
            f"{type(model).__name__} cannot be cut into heads and neurons, since its language model is of the family "
            f"{family!r}; supported: {', '.join(described)}"
        )
    elif (found := _TRACED.get(model)) is not None:
        adapter = found
    else:
        adapter = ADAPTERS[family] if family in ADAPTERS else generic_adapter(model)
        adapter = _TRACED[model] = traced_layout(model, adapter)
    assert adapter.attention is not None and adapter.mlp is not None
    return Layout(adapter.blocks, adapter.attention, adapter.mlp, adapter.shared_norms, family not in described)
