"""Parameters of plug-ins: a plug-in with parameters is a frozen dataclass, whose fields are these, with defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.registry import Registry

T = TypeVar("T")


def parameters_of(plugin: object) -> dict[str, Any]:
    """The parameters of a plug-in by name: JSON values."""
    assert is_dataclass(plugin)
    return {field.name: getattr(plugin, field.name) for field in fields(plugin)}


def configured(registry: Registry[T], name: str, given: Mapping[str, Any] | None = None) -> T:
    """A registered plug-in with some parameters changed.

    Args:
        registry: of frozen dataclasses.
        name: one of the registry's.
        given: by name; text is read as the type that the default has.

    Raises:
        UnknownName: no such plug-in.
        InvalidInput: no such parameter, or a value that it cannot have.
    """
    plugin, what = registry[name], f"{registry.kind} {name!r}"
    known = parameters_of(plugin)
    values = {}
    for parameter, value in (given or {}).items():
        if parameter not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InvalidInput(f"{what} has no parameter {parameter[:40]!r}; {has}")
        values[parameter] = _typed(f"{parameter} of {what}", value, known[parameter])
    return cast(T, replace(cast(Any, plugin), **values))


def _typed(what: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`."""
    kind = type(default)
    if kind is str and isinstance(value, str):
        return value
    words = {"true": True, "false": False}
    if kind is bool:
        if isinstance(value, bool) or str(value).lower() in words:
            return words[str(value).lower()]
        raise InvalidInput(f"{what} is {str(value)[:40]!r}: give true or false")
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"{what} is {str(value)[:40]!r}: give a value like {default!r}") from None
    if isinstance(value, bool) or (kind is float and not math.isfinite(number)):
        raise InvalidInput(f"{what} is {str(value)[:40]!r}: give a value like {default!r}")
    return number


def check_range(what: str, value: float, low: float, high: float) -> None:
    """Refuse a parameter outside [low, high].

    Raises:
        InvalidInput: says what would be right.
    """
    if not low <= value <= high:
        raise InvalidInput(f"{what} {value:g} is outside [{low:g}, {high:g}]")


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse a parameter that is none of `known`.

    Raises:
        InvalidInput: lists them.
    """
    if value not in known:
        raise InvalidInput(f"no {what} {value[:40]!r}; there are {', '.join(known)}")
