"""Model families: which matrices of a model can be pruned, in model order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from evoprune.fitness.adapters.base import (
    ADAPTERS,
    ModelAdapter,
    Part,
    Prunable,
    SiteModule,
    bind_sites,
    block_list,
    rebind,
    zero_fraction,
)
from evoprune.fitness.adapters.generic import generic_adapter
from evoprune.fitness.adapters.multimodal import MULTIMODAL, component_part
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import LANGUAGE

__all__ = [
    "ADAPTERS",
    "MULTIMODAL",
    "ModelAdapter",
    "Prunable",
    "SiteModule",
    "auto_class",
    "component_names",
    "decoder_blocks",
    "is_multimodal",
    "list_sites",
    "rebind",
    "zero_fraction",
]

# Stands for every component that a model has.
ALL = "all"


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether the family has an adapter that knows parts beside the language model."""
    return config.model_type in MULTIMODAL


def auto_class(config: PreTrainedConfig) -> Any:
    """The class in transformers whose `from_pretrained` and `from_config` make a model of this family."""
    name = MULTIMODAL[config.model_type].auto if is_multimodal(config) else "AutoModelForCausalLM"
    return getattr(transformers, name)


def component_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """The components of a family whose matrices can be pruned, in the order of a forward pass."""
    if not is_multimodal(config):
        return (LANGUAGE,)
    return tuple(component.name for component in MULTIMODAL[config.model_type].components)


def decoder_blocks(model: PreTrainedModel, components: Sequence[str] | None = None) -> list[tuple[str, nn.Module]]:
    """(module path, block) of each block, in model order; `components` as in `list_sites`.

    Raises:
        InvalidInput: the family is not supported, or has no such component.
    """
    return [block for part in _parts(model, components) for block in part.blocks]


def list_sites(model: PreTrainedModel, components: Sequence[str] | None = None) -> list[SiteModule]:
    """The prunable matrices of `model` in model order: embeddings, output head, norms and routers are never listed.

    Args:
        model: of a supported family, or one in which a walk finds decoder blocks.
        components: names out of `component_names`, or ``all``; None takes the language model.

    Raises:
        InvalidInput: the family is not supported or has no such component, or its blocks hold weights that no site
            covers, such as experts.
    """
    return bind_sites(model, _parts(model, components))


def _parts(model: PreTrainedModel, components: Sequence[str] | None) -> list[Part]:
    """The chosen components, in the order of a forward pass."""
    known = component_names(model.config)
    chosen = (LANGUAGE,) if components is None else tuple(components)
    for name in chosen:
        if name not in (*known, ALL):
            raise InvalidInput(
                f"{type(model).__name__} has no component {name[:80]!r}; it has {', '.join(known)}, or {ALL}"
            )
    if not chosen:
        raise InvalidInput(f"no component is named: give some of {', '.join(known)}, or {ALL}")
    if is_multimodal(model.config):
        wanted = MULTIMODAL[model.config.model_type].components
        return [component_part(model, part) for part in wanted if part.name in chosen or ALL in chosen]
    family = model.config.model_type
    adapter = ADAPTERS[family] if family in ADAPTERS else generic_adapter(model)
    return [Part(LANGUAGE, block_list(model, adapter), adapter.kinds, adapter.blocks)]
