"""Next-token loss; its exponential is the perplexity."""

from __future__ import annotations

from torch import Tensor

from evoprune.fitness.objectives import OBJECTIVES, Measured, Role
from evoprune.metrics.criterion import Tags


class NegativeLogLikelihood:
    """Ranks candidates as perplexity does, and averages over windows as perplexity does not."""

    role: Role = "quality"
    needs: frozenset[str] = frozenset()
    unit = "nats per token"
    tags = Tags()

    def measure(self, measured: Measured, first: int, last: int) -> Tensor:
        return measured.losses(first, last).nll


OBJECTIVES.add("perplexity", NegativeLogLikelihood())
