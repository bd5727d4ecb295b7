"""Each loss less that of the reference mask on the same minibatch."""

from __future__ import annotations

from typing import ClassVar

from evoprune.search.estimators import ESTIMATORS, EstimatorPlugin, Floats, Losses, ScoreFunction


class SelfCritical(ScoreFunction):
    """A mask counts by how much worse it is than what the policy would answer now.

    Source: Rennie et al. 2017, arXiv:1612.00563.
    """

    reference: ClassVar[bool] = True

    def advantages(self, losses: Losses) -> Floats:
        assert losses.reference is not None
        return losses.values - losses.reference

    def baseline(self, losses: Losses) -> float:
        assert losses.reference is not None
        return losses.reference


ESTIMATORS.add("self-critical", EstimatorPlugin("less the reference mask's loss", SelfCritical))
