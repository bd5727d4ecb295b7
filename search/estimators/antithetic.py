"""Masks in pairs that are made of u and of 1 - u, each loss less the mean of the other pairs."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from evoprune.search.estimators import ESTIMATORS, EstimatorPlugin, Losses, ScoreFunction
from evoprune.search.policies import Draws, Floats, Policy, chunks, joined


class Antithetic(ScoreFunction):
    """Either mask of a pair is a sample of the policy, and they tend to be opposites, so that errors cancel.

    What is subtracted is the mean over the other pairs: that of the pair itself would depend on the mask.

    Source: Hammersley and Morton 1956.
    """

    block: ClassVar[int] = 2
    least: ClassVar[int] = 4

    def draw(self, policy: Policy, logits: Floats, count: int, rng: np.random.Generator) -> Draws:
        return paired(policy, logits, count, rng)

    def advantages(self, losses: Losses) -> Floats:
        pairs = losses.values.reshape(-1, 2).sum(axis=1)
        others = (pairs.sum() - pairs) / (2 * (len(pairs) - 1))
        return losses.values - others.repeat(2)

    def baseline(self, losses: Losses) -> float:
        return float(losses.values.mean())


def paired(policy: Policy, logits: Floats, count: int, rng: np.random.Generator, keep_noise: bool = False) -> Draws:
    """[count] masks, those of u at even and those of 1 - u at odd places.

    Args:
        keep_noise: the draws have the uniform numbers with them.
    """
    parts = []
    for part in chunks(count // 2, 2 * policy.n):
        even = rng.random((part.stop - part.start, policy.n))
        uniforms = np.stack([even, 1 - even], axis=1).reshape(-1, policy.n)
        draws = policy.draw(logits, uniforms)
        parts.append(Draws(draws.masks, draws.order, uniforms if keep_noise else None))
    return joined(parts)


ESTIMATORS.add("antithetic", EstimatorPlugin("antithetic pairs, less the mean of the others", Antithetic))
