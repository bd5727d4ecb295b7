"""What the board is told about one evaluated candidate: plain data that follows from the run's own history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Range = tuple[int, int] | tuple[float, float] | list[Any]
"""What a descriptor may be: bounds (two ints, two floats), or a list of choices."""


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One candidate that ran a forward pass.

    Args:
        state: `complete` (full fidelity reached), `pruned` (raced out at a rung) or `fail`.
        value: the fitness when complete, otherwise None. One that is not finite makes the trial a failed one.
        rungs: fitness by rung, as far as it got.
        attributes: JSON data for people and for the rebuild: `key`, `birth`, `expression`, `parents`, `operator`,
            `island`, `complexity`, `signature` and the like.
        descriptors: what the dashboard should correlate with the fitness (height, nodes, ...), by the names and
            within the ranges that the board was made with; what is outside is left out.
        constraints: how far each of the candidate's limits is exceeded; feasible when none is above 0.
        front: it entered the front of fitness against its prices when it was applied; `cost` or `complexity` is then
            needed.
        beside: further prices, where there are any.
        started: Unix time, when known; for the timeline only.
        finished: the same.
    """

    state: Literal["complete", "pruned", "fail"]
    value: float | None = None
    rungs: Mapping[int, float] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    descriptors: Mapping[str, Any] = field(default_factory=dict)
    constraints: Sequence[float] = ()
    front: bool = False
    beside: Sequence[float] = ()
    started: float | None = None
    finished: float | None = None

    @property
    def final_state(self) -> Literal["complete", "pruned", "fail"]:
        """`state`, except that nothing is complete without a finite value: a board is never told NaN."""
        return "fail" if self.state == "complete" and self.final_value is None else self.state

    @property
    def final_value(self) -> float | None:
        """The finite value of a complete trial, or None."""
        known = self.state == "complete" and self.value is not None and math.isfinite(self.value)
        return float(self.value) if known and self.value is not None else None

    @property
    def prices(self) -> Sequence[Any]:
        """What fitness is bought with on the front: the attribute `cost` or else `complexity`, and those beside it."""
        return self.attributes.get("cost", self.attributes.get("complexity")), *self.beside

    @property
    def enters_front(self) -> bool:
        """Whether it is a point of the front: complete, with its prices."""
        return self.front and self.final_value is not None and all(map(is_number, self.prices))


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number; truth values are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any) -> Any:
    """`value` as strict JSON data: numbers that JSON lacks become strings, unknown objects their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def fits(value: Any, allowed: Range) -> bool:
    """Whether a descriptor's value is within its range."""
    if isinstance(allowed, list):
        return any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed)
    low, high = allowed
    whole = not isinstance(low, int) or isinstance(value, int)
    return is_number(value) and whole and low <= value <= high
