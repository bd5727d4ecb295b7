"""The module that a compact checkpoint brings along, for transformers to run with trust_remote_code=True."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from string import Template

from transformers import PreTrainedModel

from evoprune.fitness.dropped import DroppedAttention, DroppedMlp
from evoprune.fitness.layouts import layout_of

_TEXT = Template('''\
"""$stock with blocks of different widths; written by evoprune.

Loaded by AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True). The stock model is built, and then every
block gets layers as small as per_layer_config in config.json says.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import $stock, $config

# Paths in the model and in a block.
BLOCKS = $blocks
ATTENTION, INPUTS, OUTPUT = $attention
MLP, MLP_INPUTS, MLP_OUTPUT = $mlp
ATTENTION_NORMS, MLP_NORMS, SHARED_NORMS = $norms
# What config.json calls query heads, KV groups and neurons.
HEADS, GROUPS, NEURONS = $names


class $new_config($config):
    model_type = $model_type

    def __init__(self, per_layer_config=None, **kwargs):
        super().__init__(**kwargs)
        self.blocks = per_layer_config or {}

    def to_dict(self):
        found = super().to_dict()
        found["per_layer_config"] = found.pop("blocks", {})
        return found


$dropped


class $new_model($stock):
    config_class = $new_config

    def __init__(self, config):
        super().__init__(config)
        for index, block in enumerate(self.get_submodule(BLOCKS)):
            shrink(block, config.blocks[str(index)])


def shrink(block, sizes):
    """Make the layers of a block as small as `sizes` says, or drop them."""
    heads, neurons = sizes[HEADS], sizes[NEURONS]
    groups = sizes.get(GROUPS, heads)
    if heads:
        shrink_attention(block, heads, groups)
    else:
        put(block, ATTENTION, DroppedAttention(block.get_submodule(ATTENTION).layer_idx))
    if neurons:
        for path in MLP_INPUTS:
            # One matrix of twice the neurons holds gate and up.
            resize(block, path, rows=neurons * (size_out(block, path) // size_in(block, MLP_OUTPUT)))
        resize(block, MLP_OUTPUT, columns=neurons)
    elif MLP:
        put(block, MLP, DroppedMlp())
    else:
        for path in MLP_INPUTS:
            put(block, path, nn.Identity())
        put(block, MLP_OUTPUT, DroppedMlp())
    gone = ([] if heads else ATTENTION_NORMS) + ([] if neurons else MLP_NORMS)
    for path in gone + ([] if heads or neurons else SHARED_NORMS):
        put(block, path, nn.Identity())


def shrink_attention(block, heads, groups):
    attention = block.get_submodule(ATTENTION)
    size = attention.head_dim
    rows = [heads * size, groups * size, groups * size]
    for path, count in zip(INPUTS, rows if len(INPUTS) > 1 else [sum(rows)]):
        resize(block, path, rows=count)
    resize(block, OUTPUT, columns=heads * size)
    config = copy(attention.config)
    config.num_attention_heads, config.num_key_value_heads = heads, groups
    values = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_kv_heads": groups,
        "num_key_value_groups": heads // groups,
        "split_size": heads * size,
        "config": config,
    }
    for name, value in values.items():
        if hasattr(attention, name):
            setattr(attention, name, value)


def resize(block, path, rows=None, columns=None):
    """Put a layer of another size at `path`; its weights come out of the file."""
    old = block.get_submodule(path)
    rows, columns = rows or size_out(block, path), columns or size_in(block, path)
    if isinstance(old, nn.Linear):
        new = nn.Linear(columns, rows, bias=old.bias is not None)
    else:
        new = type(old)(rows, columns)
    put(block, path, new.to(old.weight.dtype))


def size_out(block, path):
    layer = block.get_submodule(path)
    return layer.out_features if isinstance(layer, nn.Linear) else layer.weight.shape[1]


def size_in(block, path):
    layer = block.get_submodule(path)
    return layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]


def put(block, path, module):
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)
''')


def module_name(family: str) -> str:
    """Name of the module without its ``.py``."""
    return f"modeling_evoprune_{family}"


def class_names(model: str, config: str) -> tuple[str, str]:
    """Names of the config class and the model class in the module."""
    return f"Compact{config}", f"Compact{model}"


def module_text(model: PreTrainedModel, model_type: str, names: Mapping[str, str]) -> str:
    """The source of the module.

    Args:
        model: of a class of transformers, of a family that can be cut.
        model_type: of the compact form, as config.json names it.
        names: what config.json calls ``heads``, ``neurons`` and, if it knows any, ``groups``.
    """
    layout = layout_of(model)
    attention, mlp = layout.attention, layout.mlp
    stock, config = type(model).__name__, type(model.config).__name__
    new_config, new_model = class_names(stock, config)

    def literals(*values: object) -> str:
        return ", ".join(json.dumps(value) for value in values)

    return _TEXT.substitute(
        stock=stock,
        config=config,
        new_config=new_config,
        new_model=new_model,
        model_type=json.dumps(model_type),
        blocks=json.dumps(layout.blocks),
        attention=literals(attention.module, attention.inputs, attention.output),
        mlp=literals(mlp.module, mlp.inputs, mlp.output),
        norms=literals(attention.norms, mlp.norms, layout.shared_norms),
        names=literals(names["heads"], names.get("groups", ""), names["neurons"]),
        dropped="\n\n".join(
            inspect.getsource(part).rstrip() + "\n" for part in (DroppedAttention, DroppedMlp)
        ).rstrip(),
    )
