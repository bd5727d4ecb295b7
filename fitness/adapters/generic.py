"""The walk for a family without an adapter: every linear layer inside the decoder blocks."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters.base import ADAPTERS, ModelAdapter, linear_kinds
from evoprune.metrics.errors import InvalidInput


def generic_adapter(model: PreTrainedModel) -> ModelAdapter:
    """An adapter found by looking: the heaviest list of as many modules as the config has layers.

    Raises:
        InvalidInput: there is no such list, or it holds no linear layer, or the linear layers of experts.
    """
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (sum(parameter.numel() for parameter in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    if lists:
        # `max` keeps the first of equals, and an outer list comes before the lists inside it.
        blocks = max(lists, key=lambda found: found[0])[1]
        kinds = linear_kinds(blocks, model.get_submodule(blocks).children())
        if kinds:
            return ModelAdapter(blocks=blocks, kinds=kinds)
    raise InvalidInput(
        f"model family {model.config.model_type!r} is not supported: no list of decoder blocks with linear layers "
        f"was found; supported families: {', '.join(ADAPTERS)}"
    )
