"""Cut models that the classes of transformers can build: one width in all blocks, set in the config."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from evoprune.fitness.adapters import auto_class
from evoprune.fitness.hub import one_line, silence
from evoprune.fitness.layouts import Layout, layout_of
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.units import BlockUnits
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockWidths

# What an attention computes with beside its weights: it follows from the config and the place of the block.
_OF_ATTENTION = ("head_dim", "scaling", "sliding_window", "layer_type")


def check_stock(language_model: LanguageModel, stay: Sequence[BlockUnits], widths: BlockWidths) -> None:
    """Refuse blocks that the model's class does not build from any config.

    Args:
        language_model: dense.
        stay: units of the blocks that stay, one at least, in order.
        widths: what each of them shall have.

    Raises:
        InvalidInput: says why.
    """
    name = type(language_model.model).__name__
    config = deepcopy(language_model.model.config)
    try:
        set_config(config, layout_of(language_model.model), stay, widths)
        # As it comes out of a file: setting an attribute checks less than reading all of them.
        config = type(config).from_dict(config.to_dict())
        with silence(), torch.device("meta"):
            built = auto_class(config).from_config(config)
    except Exception as error:  # each family refuses in its own words what it cannot build
        raise InvalidInput(f"{name} cannot have {widths}: {one_line(error)}") from None
    for index, block in enumerate(stay):
        ours = language_model.model.get_submodule(block.attention.name)
        theirs = built.get_submodule(_moved(block.attention.name, block.name, index))
        for attribute in _OF_ATTENTION:
            here, there = getattr(ours, attribute, None), getattr(theirs, attribute, None)
            if here != there:
                raise InvalidInput(
                    f"{name} cannot have {widths}: the {attribute} of block {index} would be {there} and not {here}"
                )
        for path, weights in _weights(block, widths).items():
            built_weights = built.get_submodule(_moved(path, block.name, index)).get_parameter("weight").numel()
            if built_weights != weights:
                raise InvalidInput(
                    f"{name} cannot have {widths}: {path} would have {built_weights} weights and not {weights}"
                )


def _weights(block: BlockUnits, widths: BlockWidths) -> dict[str, int]:
    """How many weights each matrix of a block of these widths has, by its name."""
    attention = replace(block.attention, groups=widths.groups, heads=widths.heads)
    mlp = replace(block.mlp, neurons=widths.neurons)
    heads, neurons = range(widths.heads), range(widths.neurons)
    rows = (*attention.rows(range(widths.groups), heads), *mlp.rows(neurons))
    found = {
        bound.site.name: len(kept) * bound.site.in_features
        for bound, kept in zip((*attention.inputs, *mlp.inputs), rows, strict=True)
    }
    for bound, columns in ((attention.output, len(attention.columns(heads))), (mlp.output, widths.neurons)):
        found[bound.site.name] = bound.site.out_features * columns
    return found


def set_config(config: PreTrainedConfig, layout: Layout, stay: Sequence[BlockUnits], widths: BlockWidths) -> None:
    """Let a config say that the blocks that stay have these widths.

    Raises:
        InvalidInput: it has no field for the number of neurons.
    """
    text = config.get_text_config()
    values: dict[str, Any] = {"num_hidden_layers": len(stay)}
    if layout.mlp.width:
        values[layout.mlp.width] = widths.neurons
    elif widths.neurons != stay[0].mlp.neurons:
        raise InvalidInput("its config has no field for the number of neurons")
    if widths.heads != stay[0].attention.heads or widths.groups != stay[0].attention.groups:
        # Without it the width of a head would follow from how many there are.
        values |= {"num_attention_heads": widths.heads, "head_dim": stay[0].attention.head_dim}
        if hasattr(text, "num_key_value_heads"):
            values["num_key_value_heads"] = widths.groups
    if (kinds := getattr(text, "layer_types", None)) is not None:
        values["layer_types"] = [kinds[int(block.name.rpartition(".")[2])] for block in stay]
    for name, value in values.items():
        setattr(text, name, value)


def keep_blocks(language_model: LanguageModel, stay: Sequence[BlockUnits], widths: BlockWidths) -> None:
    """Take the other blocks out of a model that is cut already, number the rest, and set its config."""
    model = language_model.model
    path = stay[0].name.rpartition(".")[0]
    parent, _, leaf = path.rpartition(".")
    blocks = [model.get_submodule(block.name) for block in stay]
    set_config(model.config, layout_of(model), stay, widths)
    for index, (block, units) in enumerate(zip(blocks, stay, strict=True)):
        attention = block.get_submodule(units.attention.name.removeprefix(f"{units.name}."))
        if hasattr(attention, "config"):
            attention.config = model.config.get_text_config()  # type: ignore[assignment]
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(blocks))


def _moved(path: str, block: str, index: int) -> str:
    """A module path inside `block` as it is when the block has another number."""
    return f"{block.rpartition('.')[0]}.{index}{path.removeprefix(block)}"
