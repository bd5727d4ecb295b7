"""COMP: the error that remains without a column when all others make up for it as well as they can."""

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


class Comp:
    """Squared norm of each column over its place on the diagonal of the inverse Hessian of the inputs.

    A column whose input is always zero has no error. A head has the sum of its columns, a KV group that of its heads.
    The paper's own formula could not be read; this is a reconstruction of it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"Hinv", "X_ss"})
    spread: ClassVar[Spread] = "uniform"
    source: ClassVar[str] = (
        "reconstructed from COMP, arXiv:2501.15255; the error is that of Hassibi and Stork 1993 (OBS)"
    )

    def scores(self, block: BlockUnits, evidence: UnitEvidence) -> UnitScores:
        def columns(bound: SiteModule) -> Tensor:
            errors = weight(bound).square().sum(0) / statistic(bound, evidence, "Hinv")[0]
            return errors.masked_fill(statistic(bound, evidence, "X_ss")[0] == 0, 0)

        return output_sums(block, columns)


UNIT_CRITERIA.add("comp", Comp())
