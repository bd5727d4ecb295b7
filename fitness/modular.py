"""The modular form: layers that are more than one matrix, or do more than multiply, named one by one in config.json.

evoprune loads it with its own code; none lies in the folder. The model type in config.json is one that nothing else
knows, so no program takes the folder for a model of the family and leaves the wrappers or the thresholds out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from evoprune.fitness.activations import Threshold, set_thresholds, threshold_of
from evoprune.fitness.adapters import is_multimodal
from evoprune.fitness.factored import FactoredLinear
from evoprune.fitness.surgery import put_module
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import write_atomically

MODEL_TYPE = "evoprune_modular"
_FAMILY, _FACTORED, _THRESHOLDS = "family", "factored", "thresholds"
_OURS = frozenset({"model_type", "architectures", _FAMILY, _FACTORED, _THRESHOLDS})


def modules_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What config.json says of the layers of a model; empty if all of them are plain.

    Returns:
        ``factored``: widths of the blocks on the left and on the right by module path, of each `FactoredLinear`.
        ``thresholds``: mode and threshold by module path, of each layer with a `Threshold`.
    """
    factored: dict[str, Any] = {}
    thresholds: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            factored[name] = list(module.widths)
        if (threshold := threshold_of(module)) is not None:
            thresholds[name] = {"mode": threshold.mode, "threshold": threshold.threshold}
    found = {_FACTORED: factored, _THRESHOLDS: thresholds}
    return found if factored or thresholds else {}


def check_modular(model: PreTrainedModel, *, cut: bool) -> None:
    """Refuse a model that has no modular form; worth asking before long work.

    Args:
        model: as it is before.
        cut: its blocks have widths of their own.

    Raises:
        InvalidInput: it is cut, or reads more than text, or its class is not one of transformers.
    """
    name = type(model).__name__
    if cut:
        raise InvalidInput(f"this {name} has the compact form, which has no modules of ours: give the model it is of")
    if is_multimodal(model.config) or type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InvalidInput(f"{name} has no form with modules of ours, since it reads more than text")
    if not type(model).__module__.startswith("transformers."):
        raise InvalidInput(f"{name} has no form with modules of ours, since its class is not one of transformers")


def is_modular(facts: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of the modular form."""
    return facts.get("model_type") == MODEL_TYPE and facts.get(_FAMILY) in CONFIG_MAPPING


def modular_config(facts: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of the plain model that a modular form was made of.

    Args:
        facts: the content of its config.json.
    """
    plain = {key: value for key, value in facts.items() if key not in _OURS}
    found: PreTrainedConfig = CONFIG_MAPPING[facts[_FAMILY]].from_dict(plain)
    return found


def write_modular(model: PreTrainedModel, folder: Path) -> None:
    """Say in the config.json of a folder, which `save_pretrained` wrote, what the layers of the model are."""
    file = folder / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts |= {"model_type": MODEL_TYPE, "architectures": ["EvopruneModular"], _FAMILY: model.config.model_type}
    write_atomically(file, json.dumps(facts | modules_of(model), indent=2, sort_keys=True, allow_nan=False) + "\n")


def load_modular(folder: Path, **options: Any) -> Any:
    """Load the modular form with the code of this package; the folder has none, and nothing in it is unpickled.

    Args:
        folder: with a config.json that `is_modular`.
        options: of `from_pretrained`.

    Returns:
        What `from_pretrained` returns: a model of the family's own class, with the modules in it.

    Raises:
        InvalidInput: config.json names layers that there are not, or says of one what cannot be.
    """
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = modular_config(facts)
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    class Modular(stock):
        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for name, widths in _entries(facts, _FACTORED):
                put_module(self, name, _factored(name, _layer(self, name), widths))

    found = Modular.from_pretrained(folder, config=config, **options)
    model, info = found if isinstance(found, tuple) else (found, {})
    if surplus := sorted(info.get("unexpected_keys", ())):
        raise InvalidInput(f"it holds {len(surplus)} tensors that its config.json names no layer for, as {surplus[0]}")
    # Its layers are its own now; by class it is a model of its family, as every other part of evoprune wants it.
    model.__class__ = stock
    set_thresholds((_layer(model, name), _threshold(name, given)) for name, given in _entries(facts, _THRESHOLDS))
    return found


def _entries(facts: Mapping[str, Any], what: str) -> list[tuple[str, Any]]:
    found = facts.get(what, {})
    if not isinstance(found, dict):
        raise InvalidInput(f"its {what} does not name layers one by one")
    return list(found.items())


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = model
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise InvalidInput(f"the model has no linear layer {name[:80]!r}")
    return layer


def _factored(name: str, layer: nn.Module, widths: Any) -> FactoredLinear:
    shape = layer.get_parameter("weight").shape
    rows, columns = reversed(shape) if isinstance(layer, Conv1D) else shape
    fits = isinstance(widths, list) and len(widths) == 2 and all(type(width) is int and width > 0 for width in widths)
    if not fits or rows % widths[0] or columns % widths[1]:
        raise InvalidInput(f"{name} is {rows} × {columns}, which blocks of {str(widths)[:40]} do not divide")
    return FactoredLinear(columns, rows, *widths, bias=getattr(layer, "bias", None) is not None)


def _threshold(name: str, given: Any) -> Threshold:
    values: list[Any] = [given.get(key) for key in ("mode", "threshold")] if isinstance(given, dict) else []
    if not values or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise InvalidInput(f"the threshold of {name} is {str(given)[:60]}, not a mode and a threshold")
    return Threshold(float(values[0]), float(values[1]))
