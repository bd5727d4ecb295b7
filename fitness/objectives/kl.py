"""KL divergence from the dense to the pruned next-token distribution."""

from __future__ import annotations

from torch import Tensor

from evoprune.fitness.objectives import OBJECTIVES, Measured, Role
from evoprune.metrics.criterion import Tags


class KullbackLeibler:
    """Needs no labels and does not reward beating the dense model on the search text."""

    role: Role = "quality"
    needs: frozenset[str] = frozenset()
    unit = "nats per token"
    tags = Tags()

    def measure(self, measured: Measured, first: int, last: int) -> Tensor:
        kl = measured.losses(first, last).kl
        assert kl is not None
        return kl


OBJECTIVES.add("kl", KullbackLeibler())
