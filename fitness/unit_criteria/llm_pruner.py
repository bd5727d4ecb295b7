"""LLM-Pruner: by how much the loss would change without a unit, to first or second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.unit_criteria import (
    UNIT_CRITERIA,
    Spread,
    UnitEvidence,
    UnitScores,
    coupled_sums,
    statistic,
    weight,
)
from evoprune.fitness.units import BlockUnits

Order = Literal["vector", "first", "second", "mixed"]


@dataclass(frozen=True)
class Taylor:
    """Terms of the loss's Taylor series in the weights that go with a unit, added up; g is the mean gradient.

    Of ``vector`` it is |sum g w| of each row or column; else the sum of |g w| (``first``), |w F w| (``second``) or
    |g w - w F w / 2| (``mixed``) over elements, where F is the mean of g squared, sequence by sequence. Biases do not
    count.

    Attributes:
        order: which.
    """

    order: Order = "first"

    spread: ClassVar[Spread] = "uniform"
    source: ClassVar[str] = "Ma et al. 2023, arXiv:2305.11627, section 3.2; released code"

    @property
    def needs(self) -> frozenset[str]:
        names = {"second": {"G_l2"}, "mixed": {"G_mean", "G_l2"}}
        return frozenset(names.get(self.order, {"G_mean"}))

    def scores(self, block: BlockUnits, evidence: UnitEvidence) -> UnitScores:
        def along(bound: SiteModule, axis: int) -> Tensor:
            terms = self._terms(bound, evidence)
            return terms.sum(axis).abs() if self.order == "vector" else terms.abs().sum(axis)

        return coupled_sums(block, lambda bound: along(bound, 1), lambda bound: along(bound, 0))

    def _terms(self, bound: SiteModule, evidence: UnitEvidence) -> Tensor:
        weights = weight(bound)
        terms = weights.new_zeros(weights.shape)
        if "G_mean" in self.needs:
            terms += weights * statistic(bound, evidence, "G_mean")
        if "G_l2" in self.needs:
            fisher = statistic(bound, evidence, "G_l2").square() / evidence.sequences
            terms -= (0.5 if self.order == "mixed" else 1.0) * weights * fisher * weights
        return terms


UNIT_CRITERIA.add("llm-pruner", Taylor())
UNIT_CRITERIA.add("llm-pruner-vector", Taylor("vector"))
UNIT_CRITERIA.add("llm-pruner-second", Taylor("second"))
UNIT_CRITERIA.add("llm-pruner-mixed", Taylor("mixed"))
