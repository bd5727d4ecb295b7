"""The shift of all logits of a row at which expected counts or costs meet a target."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evoprune.search.policies import Floats

# Newton's method needs about ten; bisection alone would be done after these.
_ROUNDS = 60
_CLOSE = 1e-13


@dataclass(frozen=True)
class Link:
    """An increasing function from the real line to (0, 1).

    Attributes:
        value: elementwise.
        slope: its derivative, elementwise.
        inverse: of one number in (0, 1).
    """

    value: Callable[[Floats], Floats]
    slope: Callable[[Floats], Floats]
    inverse: Callable[[float], float]


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), elementwise, without overflow."""
    small = np.exp(-np.abs(x))
    found: Floats = np.where(x >= 0, 1.0, small) / (1.0 + small)
    return found


def _logistic_slope(x: Floats) -> Floats:
    small = np.exp(-np.abs(x))
    return small / (1.0 + small) ** 2


def _race(x: Floats) -> Floats:
    found: Floats = -np.expm1(-np.exp(np.minimum(x, 700.0)))
    return found


def _race_slope(x: Floats) -> Floats:
    found: Floats = np.exp(np.minimum(x, 700.0) - np.exp(np.minimum(x, 700.0)))
    return found


LOGISTIC = Link(sigmoid, _logistic_slope, lambda p: math.log(p) - math.log1p(-p))
RACE = Link(_race, _race_slope, lambda p: math.log(-math.log1p(-p)))
"""The probability that a clock of rate exp(x) has rung at time 1."""


def shifts(rows: Floats, target: float, link: Link, weights: Floats | None = None) -> Floats:
    """[rows]: the x at which the sum of weights * link(row + x) is the target.

    Args:
        rows: [rows, size] float64.
        target: above 0 and below the sum of the weights.
        weights: [size], positive; 1 each if None.
    """
    weights = np.ones(rows.shape[1]) if weights is None else weights
    middle = link.inverse(target / float(weights.sum()))
    low, high = middle - rows.max(axis=1), middle - rows.min(axis=1)
    x = (low + high) / 2
    for _ in range(_ROUNDS):
        moved = rows + x[:, None]
        excess = (weights * link.value(moved)).sum(axis=1) - target
        slope = (weights * link.slope(moved)).sum(axis=1)
        low, high = np.where(excess < 0, x, low), np.where(excess < 0, high, x)
        with np.errstate(divide="ignore", invalid="ignore"):
            step = x - excess / slope
        # Where Newton's step leaves the bracket, or there is no slope, halve.
        new = np.where((step > low) & (step < high), step, (low + high) / 2)
        done = np.abs(new - x) <= _CLOSE * np.maximum(1.0, np.abs(x))
        x = np.where(excess == 0, x, new)
        if bool((done | (excess == 0)).all()):
            break
    return x
