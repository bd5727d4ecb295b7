"""How a learner is doing: running numbers that cost little and can be saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from evoprune.metrics.packed import packed, unpacked
from evoprune.search.learners import Diagnostics
from evoprune.search.policies import Floats, Mask

SPAN = 20
"""Steps over which halves of gradients and masks are compared."""

# A longer gradient is folded into so many numbers with random signs: cosines stay the same to about 1/64 (count
# sketch, Charikar et al. 2002), and the state of a run small.
_FOLDED = 4096
_FORGET = 0.95


class Spread:
    """How much the minibatch and how much the mask does to a loss."""

    def __init__(self) -> None:
        self._batch = self._masks = 0.0
        self._last: float | None = None
        self._known = False

    def update(self, values: Floats, windows: Floats | None) -> None:
        """Take in a step.

        Args:
            values: [K] losses of masks on one minibatch, K >= 2.
            windows: [K, windows] the same by window, of a minibatch that was drawn for this step; None if unknown:
                then changes of the mean from step to step say what minibatches do.
        """
        masks = float(values.var(ddof=1))
        batch = None
        if windows is not None and windows.shape[1] > 1:
            count, length = windows.shape
            columns = windows.mean(axis=0)
            rest = windows - windows.mean(axis=1, keepdims=True) - columns + columns.mean()
            error = float((rest**2).sum()) / ((count - 1) * (length - 1))
            batch = (float(columns.var(ddof=1)) - error / count) / length
        elif self._last is not None:
            batch = (float(values.mean()) - self._last) ** 2 / 2 - masks / len(values)
        self._last = float(values.mean())
        if batch is not None:
            self._batch = _FORGET * self._batch + batch
            self._masks = _FORGET * self._masks + masks
            self._known = True

    @property
    def rho(self) -> float | None:
        """Variance of the minibatch over that of the masks; None while unknown."""
        if not self._known or self._masks <= 0:
            return None
        return max(0.0, self._batch) / self._masks

    def state(self) -> dict[str, Any]:
        return {"batch": self._batch, "masks": self._masks, "last": self._last, "known": self._known}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._batch, self._masks, self._last = state["batch"], state["masks"], state["last"]
        self._known = state["known"]


class Monitor:
    """Agreement of half gradients, and of masks, over `SPAN` steps."""

    def __init__(self) -> None:
        self._sums: Floats | None = None
        self._steps = 0
        self._cosine: float | None = None
        self._mask: str | None = None
        self._jaccard: float | None = None

    def halves(self, halves: Floats | None) -> bool:
        """Take in the gradients of two halves of a step's draws, [2, size]; whether a span has ended with them."""
        if halves is None:
            return False
        folded = _folded(halves)
        if self._sums is None or self._sums.shape != folded.shape:
            self._sums, self._steps = np.zeros(folded.shape), 0
        self._sums = self._sums + folded
        self._steps += 1
        if self._steps < SPAN:
            return False
        even, odd = self._sums
        length = float(np.sqrt((even * even).sum() * (odd * odd).sum()))
        self._cosine = float((even * odd).sum()) / length if length > 0 else None
        self._sums, self._steps = None, 0
        return True

    def mask(self, step: int, mask: Mask) -> None:
        """Take in the mode of a step."""
        if step % SPAN:
            return
        if self._mask is not None:
            before = unpacked(self._mask, len(mask))
            either = int((before | mask).sum())
            self._jaccard = int((before & mask).sum()) / either if either else 1.0
        self._mask = packed(mask)

    @property
    def cosine(self) -> float | None:
        """Of the half gradients of the last span."""
        return self._cosine

    @property
    def jaccard(self) -> float | None:
        """Of the last two masks that are `SPAN` steps apart."""
        return self._jaccard

    def state(self) -> dict[str, Any]:
        sums = None if self._sums is None else self._sums.tolist()
        return {
            "sums": sums,
            "steps": self._steps,
            "cosine": self._cosine,
            "mask": self._mask,
            "jaccard": self._jaccard,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sums = None if state["sums"] is None else np.array(state["sums"], dtype=np.float64)
        self._steps, self._cosine = state["steps"], state["cosine"]
        self._mask, self._jaccard = state["mask"], state["jaccard"]


class Scale:
    """Running root mean square of numbers of earlier steps."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def of(self, values: Floats) -> float:
        """From earlier steps, or from these values at the first; 1 if all was 0."""
        found = self._sum / self._weight if self._weight else float((values**2).mean())
        return float(np.sqrt(found)) if found > 0 else 1.0

    def update(self, values: Floats) -> None:
        """Take in the values of a step."""
        mean = float((values**2).mean())
        if mean > 0:
            self._sum, self._weight = 0.9 * self._sum + mean, 0.9 * self._weight + 1

    def state(self) -> list[float]:
        return [self._sum, self._weight]

    def restore(self, state: list[float]) -> None:
        self._sum, self._weight = state


def certainty(inclusion: Floats, varies: Mask) -> Diagnostics:
    """How far the policy has decided.

    Args:
        inclusion: [n] probabilities.
        varies: [n] bool, units that may be kept or not.

    Returns:
        entropy: mean of -p ln p - (1 - p) ln (1 - p) over these units, in nats; undecided: share of them with p in
        (0.05, 0.95). None if there are no such units.
    """
    p = inclusion[varies]
    if not len(p):
        return {"entropy": None, "undecided": None}
    safe = np.clip(p, 1e-300, 1.0)
    other = np.clip(1 - p, 1e-300, 1.0)
    entropy = -(p * np.log(safe) + (1 - p) * np.log(other))
    return {"entropy": float(entropy.mean()), "undecided": float(((p > 0.05) & (p < 0.95)).mean())}


def _folded(rows: Floats) -> Floats:
    size = rows.shape[1]
    if size <= _FOLDED:
        return rows
    index = np.arange(size, dtype=np.uint64)
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    signs = np.where(mixed >> np.uint64(63), 1.0, -1.0)
    places = (mixed >> np.uint64(40)).astype(np.int64) % _FOLDED
    return np.stack([np.bincount(places, weights=row * signs, minlength=_FOLDED) for row in rows])
