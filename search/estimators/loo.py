"""Each loss less the mean of the others of its step: what the minibatch does to all of them cancels."""

from __future__ import annotations

from evoprune.search.estimators import ESTIMATORS, EstimatorPlugin, Floats, Losses, ScoreFunction, leave_one_out


class LeaveOneOut(ScoreFunction):
    """Variance is that of the masks over K - 1.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """

    def advantages(self, losses: Losses) -> Floats:
        return leave_one_out(losses.values)

    def baseline(self, losses: Losses) -> float:
        return float(losses.values.mean())


ESTIMATORS.add("loo", EstimatorPlugin("leave one out: less the mean of the others", LeaveOneOut))
