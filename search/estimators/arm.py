"""ARM: differences of the losses of antithetic pairs, for independent units."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from evoprune.search.estimators import ESTIMATORS, EstimatorPlugin, Gradient, Independent, Losses, halved
from evoprune.search.estimators.antithetic import paired
from evoprune.search.policies import Draws, Floats, Mask, Policy, chunks


class Arm:
    """Per pair (f(1{u > s(-theta)}) - f(1{u < s(theta)})) (u - 1/2), s the logistic function, theta log-odds.

    Source: Yin and Zhou 2019, arXiv:1807.11143.
    """

    reference: ClassVar[bool] = False
    block: ClassVar[int] = 2
    least: ClassVar[int] = 2

    def draw(self, policy: Policy, logits: Floats, count: int, rng: np.random.Generator) -> Draws:
        return paired(policy, logits, count, rng, keep_noise=True)

    def advantages(self, losses: Losses) -> Floats:
        """[K]: of either mask of a pair, its loss less the other's."""
        pairs = losses.values.reshape(-1, 2)
        return (pairs - pairs[:, ::-1]).reshape(-1)

    def gradient(self, policy: Policy, logits: Floats, draws: Draws, advantages: Floats) -> Gradient:
        assert isinstance(policy, Independent)
        assert draws.noise is not None
        sums = np.zeros((2, policy.n))
        odds = policy.effective(logits)
        parity = np.arange(len(advantages) // 2) % 2
        for part in chunks(len(parity), policy.n):
            first, second = (draws.masks[one::2][part] for one in (0, 1))
            weighted = advantages[::2][part, None] * self.direction(odds, first, second, draws.noise[::2][part])
            for half in (0, 1):
                sums[half] += weighted[parity[part] == half].sum(axis=0)
        return halved(policy.pullback(logits, sums * policy.budget.open), np.bincount(parity, minlength=2))

    def direction(self, odds: Floats, first: Mask, second: Mask, noise: Floats) -> Floats:
        """[pairs, n]: what the loss of the mask of `noise`, less that of 1 - `noise`, is multiplied by.

        Args:
            odds: [n] log-odds.
            first, second: [pairs, n] the masks.
            noise: [pairs, n] in [0, 1).
        """
        return 0.5 - noise

    def baseline(self, losses: Losses) -> float:
        return float(losses.values.mean())

    def update(self, losses: Losses) -> None:
        """There is nothing to remember."""

    def state(self) -> None:
        return None

    def restore(self, state: None) -> None:
        """There was nothing to remember."""


ESTIMATORS.add("arm", EstimatorPlugin("antithetic differences for independent units", Arm, independent=True))
