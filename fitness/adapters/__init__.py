"""Model families: which matrices of a causal language model can be pruned, in model order."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters.base import ADAPTERS, ModelAdapter, SiteModule, bind_sites, block_list, zero_fraction
from evoprune.fitness.adapters.generic import generic_adapter

__all__ = ["ADAPTERS", "ModelAdapter", "SiteModule", "decoder_blocks", "list_sites", "zero_fraction"]


def find_adapter(model: PreTrainedModel) -> ModelAdapter:
    """The adapter registered for the model's family, else one found by a walk over its linear layers.

    Raises:
        InvalidInput: the family is unknown and the walk finds no decoder blocks.
    """
    family = model.config.model_type
    return ADAPTERS[family] if family in ADAPTERS else generic_adapter(model)


def decoder_blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """(module path, block) of each decoder block, in model order.

    Raises:
        InvalidInput: the family is not supported.
    """
    return block_list(model, find_adapter(model))


def list_sites(model: PreTrainedModel) -> list[SiteModule]:
    """The prunable matrices of `model` in model order: embeddings, output head, norms and routers are never listed.

    Raises:
        InvalidInput: the family is not supported, or its blocks hold weights that no site covers, such as experts.
    """
    return bind_sites(model, find_adapter(model))
