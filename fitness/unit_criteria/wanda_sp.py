"""Wanda-sp: Wanda's scores, added up over the columns of a unit."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.unit_criteria import (
    UNIT_CRITERIA,
    Spread,
    UnitEvidence,
    UnitScores,
    output_sums,
    statistic,
    weight,
)
from evoprune.fitness.units import BlockUnits


class WandaSp:
    """Sum of |W| times the norm of the input, over the columns of the output or down matrix that go with a unit."""

    needs: ClassVar[frozenset[str]] = frozenset({"X_l2"})
    spread: ClassVar[Spread] = "uniform"
    source: ClassVar[str] = "An et al. 2024 (FLAP, arXiv:2312.11983): its baseline; released code"

    def scores(self, block: BlockUnits, evidence: UnitEvidence) -> UnitScores:
        def columns(bound: SiteModule) -> Tensor:
            return weight(bound).abs().sum(0) * statistic(bound, evidence, "X_l2")[0]

        return output_sums(block, columns)


UNIT_CRITERIA.add("wanda-sp", WandaSp())
