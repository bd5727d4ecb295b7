"""From files, options and assignments to the configuration of a search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from evoprune.metrics.errors import InvalidInput
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.config_sections import SearchConfig
from evoprune.search.config_structure import StructureSearchConfig

CONFIGS: dict[str, type[SearchConfig]] = {
    "metric": MetricSearchConfig,
    "allocation": AllocationSearchConfig,
    "joint": JointSearchConfig,
    "structure": StructureSearchConfig,
    "policy": PolicySearchConfig,
}
"""Of each kind of search."""

Config = TypeVar("Config", bound=SearchConfig)


def resolve(
    files: Iterable[Path] = (), overrides: Mapping[str, Any] | None = None, assignments: Iterable[str] = ()
) -> MetricSearchConfig:
    """`resolve_as` for a metric search."""
    return resolve_as(MetricSearchConfig, files, overrides, assignments)


def resolve_as(
    config_class: type[Config],
    files: Iterable[Path] = (),
    overrides: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> Config:
    """Defaults, then files, then options, then ``key.sub=value`` assignments; later ones win.

    Args:
        config_class: of the kind of search.
        files: YAML files.
        overrides: values by dotted key, such as ``{"target.sparsity": 0.6}``; None values are passed over.
        assignments: as given to ``--set``; values are YAML.

    Raises:
        InvalidInput: a file that is not YAML, an unknown key, a value of the wrong kind.
    """
    values: dict[str, Any] = {}
    for path in files:
        _merge(values, _read_yaml(path))
    for key, value in (overrides or {}).items():
        if value is not None:
            _assign(values, key, value)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--set {assignment!r} is not of the form key.sub=value")
        try:
            _assign(values, key, yaml.safe_load(text))
        except (yaml.YAMLError, RecursionError):
            raise InvalidInput(f"--set {key}: {text[:80]!r} is not a YAML value") from None
    return validated_as(config_class, values)


def validated(values: Mapping[str, Any]) -> SearchConfig:
    """The configuration that plain values spell, of the kind that they name.

    Raises:
        InvalidInput: naming the first wrong key.
    """
    kind = values.get("kind", "metric")
    if kind not in CONFIGS:
        raise InvalidInput(f"kind: no search of kind {str(kind)[:40]!r}; there are {', '.join(CONFIGS)}")
    return validated_as(CONFIGS[kind], values)


def validated_as(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The configuration of a given kind that plain values spell.

    Raises:
        InvalidInput: naming the first wrong key.
    """
    kind = config_class.model_fields["kind"].default
    if (given := values.get("kind", kind)) != kind:
        raise InvalidInput(f"kind: these are options of another search, {str(given)[:40]!r}: this one is {kind!r}")
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(said_of(error)) from None


def said_of(error: ValidationError, unknown: str = "no such option") -> str:
    """The first thing that is wrong, in a line that names its key; `unknown` is said of keys that there are not."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = unknown if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise InvalidInput(f"{path} is not a YAML file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidInput(f"{path} does not hold options by name")
    return values


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *folders, leaf = key.split(".")
    for folder in folders:
        values = values.setdefault(folder, {})
        if not isinstance(values, dict):
            raise InvalidInput(f"{key}: {folder} is no section")
    values[leaf] = value
