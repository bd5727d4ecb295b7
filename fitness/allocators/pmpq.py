"""PMPQ: a matrix is as sensitive as the loss is to its pruning alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Level, Use, by_sensitivity, grouped
from evoprune.fitness.quantisation import rounding_error
from evoprune.metrics.mask import mask_of_count
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Site, removed_count


@dataclass(frozen=True)
class PMPQ:
    """Matrices whose pruning alone raises the loss most lose the least and have the most bits (CPTQuant).

    Each by itself loses its smallest weights, at some sparsities from `least` to `most`, and the sensitivity is the
    mean of what that adds to the loss. At so many bits a matrix costs that mean, times the share of its squared weights
    that rounding them changes, over the mean share that the pruning took.

    Attributes:
        points: so many sparsities.
        least: the first of them.
        most: the last.
        spread: sparsities lie within twice this.
        granularity: what shares a sparsity: matrix, block or kind.
    """

    points: int = 5
    least: float = 0.1
    most: float = 0.5
    spread: float = 0.1
    granularity: str = "matrix"

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset({"losses by matrix"})
    source: ClassVar[str] = "Nanda et al. 2024 (CPTQuant), arXiv:2412.03599; reconstructed"

    def __post_init__(self) -> None:
        check_range("points", self.points, 1, 100)
        check_range("least", self.least, 0, 1)
        check_range("most", self.most, self.least, 1)
        check_range("spread", self.spread, 0, 1)
        grouped((), self.granularity)

    @property
    def sparsities(self) -> list[float]:
        """Those that are tried, evenly spaced; of one point the middle."""
        if self.points == 1:
            return [(self.least + self.most) / 2]
        step = (self.most - self.least) / (self.points - 1)
        return [round(self.least + point * step, 9) for point in range(self.points)]

    def sensitivities(self, evidence: Evidence) -> list[float]:
        """One per site, in nats per token; below 0 where pruning lowers the loss."""

        def pruned() -> Iterator[tuple[Site, Tensor]]:
            for site in evidence.sites:
                weight = evidence.weight(site)
                for sparsity in self.sparsities:
                    yield site, self._pruned(weight, sparsity)

        dense, losses = evidence.dense_loss(), evidence.losses_with(pruned())
        return [
            math.fsum(losses[begin : begin + self.points]) / self.points - dense
            for begin in range(0, len(losses), self.points)
        ]

    def request(self, evidence: Evidence) -> Sequence[float]:
        found = self.sensitivities(evidence)
        return by_sensitivity(evidence.sites, evidence.target, found, self.spread, self.granularity)

    def level_costs(self, evidence: Evidence, levels: Sequence[Sequence[Level]]) -> Sequence[Sequence[float]]:
        costs = []
        for site, sensitivity, own in zip(evidence.sites, self.sensitivities(evidence), levels, strict=True):
            weight = evidence.weight(site)
            whole = max(weight.double().square().sum().item(), 1e-300)
            lost = [(weight - self._pruned(weight, sparsity)).double().square().sum().item() / whole
                    for sparsity in self.sparsities]  # fmt: skip
            # A matrix whose pruning does no harm still has to be worth something, or rounding it would cost nothing.
            rate = max(sensitivity, 1e-12) / max(math.fsum(lost) / len(lost), 1e-12)
            costs.append([rate * rounding_error(weight, level.bits) for level in own])
        return costs

    @staticmethod
    def _pruned(weight: Tensor, sparsity: float) -> Tensor:
        """Without its smallest weights, wherever in the matrix they are."""
        return weight.masked_fill(~mask_of_count(weight.abs(), removed_count(sparsity, weight.numel())), 0)


ALLOCATORS.add("pmpq", PMPQ())
