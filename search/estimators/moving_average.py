"""Each loss less a running mean of the losses of earlier steps."""

from __future__ import annotations

from typing import Any

from evoprune.search.estimators import ESTIMATORS, EstimatorPlugin, Floats, Losses, ScoreFunction, leave_one_out

# Of a step's mean in the running mean: one over the window of 5 of the released code (arXiv 2406.10576).
SHARE = 0.2


class MovingAverage(ScoreFunction):
    """Variance is that of the masks and of the minibatch, over K. The first step leaves one out.

    Source: Gao et al. 2025, arXiv 2406.10576; there the mean has the step's own losses in it, which biases.
    """

    def __init__(self) -> None:
        self.mean: float | None = None

    def advantages(self, losses: Losses) -> Floats:
        return leave_one_out(losses.values) if self.mean is None else losses.values - self.mean

    def baseline(self, losses: Losses) -> float:
        return float(losses.values.mean()) if self.mean is None else self.mean

    def update(self, losses: Losses) -> None:
        mean = float(losses.values.mean())
        self.mean = mean if self.mean is None else (1 - SHARE) * self.mean + SHARE * mean

    def state(self) -> Any:
        return self.mean

    def restore(self, state: Any) -> None:
        self.mean = state


ESTIMATORS.add("moving-average", EstimatorPlugin("less a running mean of earlier steps", MovingAverage))
