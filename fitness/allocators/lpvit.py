"""LPViT: one slope for the curves of what blocks of weights cost, with what those that stay cost the hardware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use
from evoprune.metrics.parameters import check_choice, check_range

SCORES = ("taylor", "magnitude")
STEPS = 100
"""Curves are of sparsities 0, 1 / STEPS and so on to 1."""
# Of the five points of a derivative, in steps.
_HALF_WIDTH = 4
_DAMPING = 1e-7
# Inputs that a unit of the hardware takes at a time.
_LANES = 16
_BISECTIONS = 200


@dataclass(frozen=True)
class LPViT:
    """The sparsities at which the next blocks cost the same everywhere, by a Taylor model and by the power they take.

    The model is of the loss on text, where the published one is of the squared logits. A slope is per weight, since
    weights are the budget; the published one is per share of a matrix, whatever its size.

    Attributes:
        height: rows of a block; at the edges blocks are what is left.
        width: columns of a block.
        score: of which the lowest go first: taylor, |W g| on average over a block, or magnitude, |W|.
        power: how much what surviving blocks take of the hardware weighs, next to the loss; 1 is the published scale.
        smoothing: share that a point of a curve has of those before it.
        most: no matrix loses more.
    """

    height: int = 16
    width: int = 16
    score: str = "taylor"
    power: float = 0.0
    smoothing: float = 0.5
    most: float = 0.95

    needs: ClassVar[frozenset[str]] = frozenset({"G_mean"})
    uses: ClassVar[frozenset[Use]] = frozenset()
    source: ClassVar[str] = "Xu et al. 2024 (LPViT), arXiv:2407.02068"

    def __post_init__(self) -> None:
        check_range("height", self.height, 1, 1 << 12)
        check_range("width", self.width, 1, 1 << 12)
        check_choice("score", self.score, SCORES)
        check_range("power", self.power, 0, 1 << 16)
        check_range("smoothing", self.smoothing, 0, 0.99)
        check_range("most", self.most, 0.01, 1)

    def request(self, evidence: Evidence) -> Sequence[float]:
        curves, powers = [], []
        for site in evidence.sites:
            curve, blocks = self.curve(evidence.weight(site), evidence.statistic(site, "G_mean"))
            curves.append(_smoothed(curve, self.smoothing))
            powers.append(blocks * (site.in_features // _LANES) * (1 - np.arange(STEPS + 1) / STEPS))
        steepest = np.mean([_slopes(curve).max() for curve in curves])
        scale = self.power * steepest / max(np.mean([np.abs(_slopes(power)).max() for power in powers]), 1e-30)
        totals = [curve + scale * power for curve, power in zip(curves, powers, strict=True)]
        return equal_slopes(totals, [site.weights for site in evidence.sites], evidence.target, self.most)

    def curve(self, weight: Tensor, gradient: Tensor) -> tuple[np.ndarray, int]:
        """What a matrix costs when its lowest blocks go: [STEPS + 1] float64; and how many blocks it has.

        With Δ the weights that went and g the gradient, mean((Δ g)²) + ½ Δᵀ (g gᵀ + 1e-7 I) Δ, both flattened, whose
        quadratic form is (Δ · g)² + 1e-7 |Δ|².

        Args:
            weight: [out, in].
            gradient: [out, in], of the loss.
        """
        products = (weight * gradient).double()
        ranked = weight.abs().double() if self.score == "magnitude" else products.abs()
        scores = self._sums(ranked) / self._sums(ranked.new_ones(ranked.shape))
        order = scores.argsort(stable=True)
        sums = [
            self._sums(part)[order].cpu().numpy() for part in (products.square(), products, weight.double().square())
        ]
        squares, linear, sizes = (np.concatenate([[0.0], part.cumsum()]) for part in sums)
        costs = squares / weight.numel() + 0.5 * (linear**2 + _DAMPING * sizes)
        return costs[[step * len(order) // STEPS for step in range(STEPS + 1)]], len(order)

    def _sums(self, values: Tensor) -> Tensor:
        """Of each block, in one row after the other."""
        rows, columns = values.shape
        padded = functional.pad(values, (0, -columns % self.width, 0, -rows % self.height))
        tiles = padded.view(-1, self.height, padded.shape[1] // self.width, self.width)
        return tiles.sum((1, 3)).flatten()


def equal_slopes(
    curves: Sequence[np.ndarray], sizes: Sequence[int], target: float, most: float = 1.0
) -> Sequence[float]:
    """The sparsities at which all curves rise as fast per weight, so that a given share of the weights goes.

    Where curves are convex no other sparsities of that share cost less in sum.

    Args:
        curves: cost by sparsity, 0, 1 / STEPS and so on to 1.
        sizes: weights of each matrix.
        target: share of all weights.
        most: no sparsity is above.

    Source: Xu et al. 2024, arXiv:2407.02068; Everett 1963 (generalised Lagrange multipliers).
    """
    last = max(1, int(most * STEPS))
    # Made monotone, so that every slope has one place on each curve.
    slopes = [
        np.maximum.accumulate(_slopes(curve)[: last + 1]) / size for curve, size in zip(curves, sizes, strict=True)
    ]
    low, high = min(slope[0] for slope in slopes), max(slope[-1] for slope in slopes)
    low -= high - low + 1e-30

    def at(slope: float) -> np.ndarray:
        return np.array([np.interp(slope, *_rising(own)) for own in slopes]) / STEPS

    shares = np.array(sizes) / sum(sizes)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) @ shares < target else (low, middle)
    below, above = at(low), at(high)
    # Where a curve is straight one slope has many places.
    missing = (target - below @ shares) / max((above - below) @ shares, 1e-30)
    found: list[float] = (below + min(max(missing, 0), 1) * (above - below)).tolist()
    return found


def _rising(slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and their places, strictly rising: of equal ones the last."""
    keep = np.append(slopes[1:] > slopes[:-1], True)
    places = np.arange(len(slopes), dtype=np.float64)[keep]
    return np.concatenate([[slopes[0]], slopes[keep]]), np.concatenate([[0.0], places])


def _slopes(curve: np.ndarray) -> np.ndarray:
    """Derivative by sparsity: of five points where there are as many on both sides, else of the two nearest."""
    found = np.gradient(curve, 1 / STEPS)
    h = _HALF_WIDTH
    inner = slice(2 * h, len(curve) - 2 * h)
    five = curve[: -4 * h] - 8 * curve[h : -3 * h] + 8 * curve[3 * h : -h] - curve[4 * h :]
    found[inner] = five * STEPS / (12 * h)
    return found


def _smoothed(curve: np.ndarray, share: float) -> np.ndarray:
    """Exponential moving average, without the pull towards zero at its beginning."""
    found, average = np.empty_like(curve), 0.0
    for at, value in enumerate(curve):
        average = share * average + (1 - share) * value
        found[at] = average / (1 - share ** (at + 1))
    return found


ALLOCATORS.add("lpvit", LPViT())
