"""The compact form: every block has widths of its own, named one by one in config.json.

evoprune loads it with its own code. For other programs a short module lies beside the weights, which they run only
where the user says `trust_remote_code=True`. The model type in config.json is a new one, so nothing takes the folder
for a dense model of the family; and a class of the family that is pointed at it stumbles over `per_layer_config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from evoprune.fitness.adapters import Prunable, SiteModule, decoder_blocks, is_multimodal, list_sites
from evoprune.fitness.compact_module import class_names, module_name, module_text
from evoprune.fitness.dropped import DroppedAttention
from evoprune.fitness.layouts import layout_of
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.units import find_units, head_width
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import write_atomically
from evoprune.metrics.shape import BlockWidths

PREFIX = "evoprune_"
# No model has so many; indices of what stays are written out in memory.
_MOST_UNITS = 1 << 22


@dataclass(frozen=True)
class _Whole:
    """A model without tokenizer, as transformers builds it."""

    model: nn.Module
    sites: tuple[SiteModule, ...]


def is_compact(facts: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of the compact form of a family that evoprune can cut."""
    family = str(facts.get("model_type"))
    return family.startswith(PREFIX) and _can_be_cut(family.removeprefix(PREFIX))


def compact_config(facts: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of the dense model that a compact form was cut from.

    Args:
        facts: the content of its config.json.
    """
    family = str(facts["model_type"]).removeprefix(PREFIX)
    ours = {"model_type", "per_layer_config", "auto_map", "architectures"}
    found: PreTrainedConfig = CONFIG_MAPPING[family].from_dict(
        {key: value for key, value in facts.items() if key not in ours}
    )
    return found


def load_compact(folder: Path, **options: Any) -> Any:
    """Load the compact form with the code of this package; none that lies in the folder is run.

    Args:
        folder: with a config.json that `is_compact`.
        options: of `from_pretrained`.

    Returns:
        What `from_pretrained` returns: a model of the family's own class, with smaller layers in it.

    Raises:
        InvalidInput: the widths in config.json are none that the family can have.
    """
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = compact_config(facts)
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    class Cut(stock):
        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _shrink(self, _read_widths(facts, self))

    found = Cut.from_pretrained(folder, config=config, **options)
    # Its layers are its own now; by class it is a model of its family, as every other part of evoprune wants it.
    (found[0] if isinstance(found, tuple) else found).__class__ = stock
    return found


def check_compact(language_model: Prunable) -> None:
    """Refuse a model that has no compact form.

    Raises:
        InvalidInput: it reads more than text, its class is not one of transformers, or what the form has to say of a
            block has no name in its config or its attention.
    """
    model = language_model.model
    assert isinstance(model, PreTrainedModel)
    if is_multimodal(model.config):
        raise InvalidInput(
            f"{type(model).__name__} has no compact form, since it reads more than text: give padded or masked"
        )
    if not type(model).__module__.startswith("transformers."):
        raise InvalidInput(f"{type(model).__name__} has no compact form, since its class is not one of transformers")
    layout = layout_of(model)
    if not layout.mlp.width:
        raise InvalidInput(
            f"{type(model).__name__} has no compact form, since its config has no field for the number of neurons: "
            "give masked"
        )
    attentions = [block.get_submodule(layout.attention.module) for _, block in decoder_blocks(model)]
    dense = [module for module in attentions if not isinstance(module, DroppedAttention)]
    if not all(hasattr(module, name) for module in dense for name in ("head_dim", "config")):
        raise InvalidInput(
            f"{type(model).__name__} has no compact form, since its attention does not know the width of a head or the "
            "config: give padded or masked"
        )


def write_compact(language_model: Prunable, folder: Path) -> None:
    """Say in the config.json of a folder what every block has, and write the module that other programs load it with.

    Args:
        language_model: cut.
        folder: where the config.json of its dense model and the cut weights are.
    """
    model = language_model.model
    assert isinstance(model, PreTrainedModel)
    names = _config_names(model)
    file = folder / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    blocks = {}
    for index, widths in enumerate(_live_widths(language_model)):
        skip = [part for part, size in (("attention", widths.heads), ("mlp", widths.neurons)) if not size]
        sizes = {"heads": widths.heads, "groups": widths.groups, "neurons": widths.neurons}
        blocks[str(index)] = {names[what]: size for what, size in sizes.items() if what in names} | {"skip": skip}
    family = model.config.model_type
    config_class, model_class = class_names(type(model).__name__, type(model.config).__name__)
    module = module_name(family)
    facts |= {
        # Readers that know no family ask for it by this name.
        "num_hidden_layers": len(blocks),
        "model_type": f"{PREFIX}{family}",
        "architectures": [model_class],
        "auto_map": {"AutoConfig": f"{module}.{config_class}", "AutoModelForCausalLM": f"{module}.{model_class}"},
        "per_layer_config": blocks,
    }
    write_atomically(file, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    write_atomically(folder / f"{module}.py", module_text(model, f"{PREFIX}{family}", names))


def _can_be_cut(family: str) -> bool:
    return family in CONFIG_MAPPING and CONFIG_MAPPING[family] in MODEL_FOR_CAUSAL_LM_MAPPING


def _config_names(model: PreTrainedModel) -> dict[str, str]:
    """What config.json calls the query heads, the KV groups if it knows any, and the neurons."""
    config = model.config
    names = {"heads": "num_attention_heads", "groups": "num_key_value_heads", "neurons": layout_of(model).mlp.width}
    stored = {what: config.attribute_map.get(name, name) for what, name in names.items()}
    return {what: name for what, name in stored.items() if hasattr(config, name)}


def _read_widths(facts: Mapping[str, Any], model: PreTrainedModel) -> list[BlockWidths]:
    names, n_blocks = _config_names(model), model.config.num_hidden_layers
    rows = facts.get("per_layer_config")
    if not isinstance(rows, dict) or len(rows) != n_blocks:
        raise InvalidInput(f"its per_layer_config does not name the {n_blocks} blocks one by one")
    found = []
    for index, row in enumerate(rows.get(str(index)) for index in range(len(rows))):
        sizes = {what: row[name] for what, name in names.items() if isinstance(row, dict) and _is_count(row.get(name))}
        if len(sizes) < len(names):
            wanted = ", ".join(names.values())
            raise InvalidInput(f"its per_layer_config does not say {wanted} of block {index} as whole numbers")
        found.append(BlockWidths(sizes.get("groups", sizes["heads"]), sizes["heads"], sizes["neurons"]))
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_UNITS


def _shrink(model: PreTrainedModel, widths: Sequence[BlockWidths]) -> None:
    """Make the layers of a dense model, whose weights are yet to be read, as small as `widths` says."""
    whole = _Whole(model, tuple(list_sites(model)))
    units = find_units(whole)
    shapes = [
        block.widths.first(own.groups, own.heads // own.groups if own.groups else own.heads, own.neurons)
        for block, own in zip(units, widths, strict=True)
    ]
    Surgeon(whole, units).apply(shapes)


def _live_widths(language_model: Prunable) -> list[BlockWidths]:
    """What the blocks of a model have now; 0 for what was dropped."""
    model = language_model.model
    assert isinstance(model, PreTrainedModel)
    layout = layout_of(model)
    attention, mlp = layout.attention, layout.mlp
    sites = {bound.site.name: bound.site for bound in language_model.sites}
    found = []
    for name, block in decoder_blocks(model):
        heads = groups = 0
        if (output := sites.get(f"{name}.{attention.output}")) is not None:
            size = head_width(model, block.get_submodule(attention.module))
            rows = [sites[f"{name}.{path}"].out_features for path in attention.inputs]
            heads = output.in_features // size
            groups = (rows[1] if len(rows) > 1 else (rows[0] - output.in_features) // 2) // size
        neurons = sites.get(f"{name}.{mlp.output}")
        found.append(BlockWidths(groups, heads, 0 if neurons is None else neurons.in_features))
    return found
