"""Each loss less that of the reference mask on the same minibatch, less a running mean of that difference."""

from __future__ import annotations

from typing import ClassVar

from evoprune.search.estimators import ESTIMATORS, EstimatorPlugin, Floats, Losses
from evoprune.search.estimators.moving_average import MovingAverage

# Of a step's mean in the running mean of residuals, as in the released code of MaskPro.
_SHARE = 0.01


class Residual(MovingAverage):
    """The reference takes out what the minibatch does; the running mean what the reference is better by.

    Source: MaskPro, arXiv 2506.12876; there the running mean has the step's own losses in it, which biases.
    """

    reference: ClassVar[bool] = True

    def advantages(self, losses: Losses) -> Floats:
        return super().advantages(_residual(losses))

    def baseline(self, losses: Losses) -> float:
        assert losses.reference is not None
        return losses.reference + super().baseline(_residual(losses))

    def update(self, losses: Losses) -> None:
        residual = _residual(losses)
        mean = float(residual.values.mean())
        self.mean = mean if self.mean is None else (1 - _SHARE) * self.mean + _SHARE * mean


def _residual(losses: Losses) -> Losses:
    assert losses.reference is not None
    return Losses(losses.values - losses.reference)


ESTIMATORS.add("residual", EstimatorPlugin("less the reference mask's loss and a running mean", Residual))
