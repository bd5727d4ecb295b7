"""Successive halving on what was measured lately."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from evoprune.search.racing import RACING_RULES, kendall_tau

# A threshold that no fitness meets; an infinity would not be JSON.
_NOBODY = -1e30


class SuccessiveHalving:
    """Go on if among the best share of the recent results at this rung; while there are few, only if the best of all.

    Args:
        rungs: length of the ladder.
        keep: share that goes on.
        uniform: share of candidates that goes on whatever its fitness, drawn at random. They measure how well a rung
            predicts the next (Kendall's tau); where it predicts badly, twice the share goes on.
        memory: how many recent results count at the first rung, and half as many at each further one: few get there, so
            many of them would reach back to a time whose candidates all of today's beat.
        enough: results at a rung from which on their best share decides.
    """

    def __init__(
        self, rungs: int, keep: float = 0.25, uniform: float = 0.1, memory: int = 64, enough: int = 16
    ) -> None:
        self.rungs = rungs
        self._keep = keep
        self._uniform = uniform
        self._enough = enough
        self._recent: list[deque[float]] = [deque(maxlen=max(memory >> rung, enough)) for rung in range(rungs)]
        self._pairs: list[list[tuple[float, float]]] = [[] for _ in range(rungs - 1)]

    def is_uniform(self, draws: Sequence[float]) -> list[bool]:
        """Which of the draws, one per rung but the last, let a candidate through whatever its fitness."""
        return [draw < self._uniform for draw in draws]

    def thresholds(self, draws: Sequence[float]) -> list[float | None]:
        return [None if free else self._threshold(rung) for rung, free in enumerate(self.is_uniform(draws))]

    def _threshold(self, rung: int) -> float:
        recent = sorted(self._recent[rung])
        if not recent:
            return _NOBODY
        if len(recent) < self._enough:
            return recent[0]
        tau = self.tau(rung)
        keep = self._keep if tau is None or tau >= 0.5 else min(1.0, 2 * self._keep)
        return recent[max(int(len(recent) * keep) - 1, 0)]

    def observe(self, rungs: Sequence[float], uniform: Sequence[bool]) -> None:
        for rung, value in enumerate(rungs):
            self._recent[rung].append(value)
        for rung, free in enumerate(uniform):
            if free and len(rungs) > rung + 1:
                self._pairs[rung].append((rungs[rung], rungs[rung + 1]))

    def tau(self, rung: int) -> float | None:
        """Kendall's tau between this rung and the next over uniformly chosen candidates; None below ten of them."""
        pairs = self._pairs[rung]
        return kendall_tau(pairs) if len(pairs) >= 10 else None

    def correlations(self) -> list[dict[str, Any]]:
        """Per pair of rungs: tau, and the number of candidates it is from."""
        return [
            {"rungs": [rung, rung + 1], "tau": kendall_tau(pairs) if len(pairs) > 1 else None, "n": len(pairs)}
            for rung, pairs in enumerate(self._pairs)
        ]

    def state(self) -> dict[str, Any]:
        return {
            "recent": [list(values) for values in self._recent],
            "pairs": [[list(pair) for pair in pairs] for pairs in self._pairs],
        }

    def restore(self, state: dict[str, Any]) -> None:
        for values, kept in zip(self._recent, state["recent"], strict=True):
            values.clear()
            values.extend(kept)
        self._pairs = [[(pair[0], pair[1]) for pair in pairs] for pairs in state["pairs"]]


RACING_RULES.add("halving", SuccessiveHalving)
