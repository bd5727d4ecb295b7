"""Racing: more tokens for fewer candidates. One rule a file.

A candidate that is born gets, for each rung but the last, the largest fitness with which it goes on. These thresholds
come from results applied before its birth, so the worker that runs it decides alone and the history does not depend on
who finished first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from evoprune.metrics.registry import Registry


class RacingRule(Protocol):
    """Decides who gets more tokens.

    A rule is registered as what makes one, given the length of the ladder, and the `keep` and `uniform` of
    `evoprune.search.config_metric.RacingConfig`.

    Attributes:
        rungs: length of the ladder.
    """

    rungs: int

    def is_uniform(self, draws: Sequence[float]) -> list[bool]:
        """Which of the draws, one per rung but the last, let a candidate through whatever its fitness."""

    def thresholds(self, draws: Sequence[float]) -> list[float | None]:
        """Per rung but the last, the largest fitness that goes on; None lets all through."""

    def observe(self, rungs: Sequence[float], uniform: Sequence[bool]) -> None:
        """Learn from an applied result."""

    def correlations(self) -> list[dict[str, Any]]:
        """Per pair of rungs: Kendall's ``tau`` of those let through, and ``n``, how many they are."""

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as JSON values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""


class MakesRule(Protocol):
    """Makes a racing rule; see `RacingRule`."""

    def __call__(self, rungs: int, keep: float, uniform: float) -> RacingRule:
        """The rule before any result."""


RACING_RULES: Registry[MakesRule] = Registry("racing rule", "evoprune.search.racing")


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's rank correlation (tau-a) of at least two pairs."""
    agreement = 0
    for index, (first_x, first_y) in enumerate(pairs):
        for second_x, second_y in pairs[index + 1 :]:
            product = (first_x - second_x) * (first_y - second_y)
            agreement += (product > 0) - (product < 0)
    return agreement / (len(pairs) * (len(pairs) - 1) / 2)
