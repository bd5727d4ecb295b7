"""Leave one out where minibatches differ much, else a moving average."""

from __future__ import annotations

from evoprune.search.estimators import ESTIMATORS, EstimatorPlugin, Floats, Losses, leave_one_out
from evoprune.search.estimators.moving_average import MovingAverage


class Automatic(MovingAverage):
    """Takes the one with less variance: leave one out iff rho > 1 / (K - 1), rho being known from earlier steps.

    With variances b of the minibatch and f of the masks, rho = b / f, that of the moving average is (f + b) / K and
    that of leave one out f / (K - 1).
    """

    def advantages(self, losses: Losses) -> Floats:
        return leave_one_out(losses.values) if leaves_out(losses) else super().advantages(losses)

    def baseline(self, losses: Losses) -> float:
        return float(losses.values.mean()) if leaves_out(losses) else super().baseline(losses)


def leaves_out(losses: Losses) -> bool:
    """Whether leave one out is the better of the two; so it is taken while rho is unknown."""
    return losses.rho is None or losses.rho > 1 / (len(losses.values) - 1)


ESTIMATORS.add("auto", EstimatorPlugin("loo or moving-average, by what minibatches do", Automatic))
