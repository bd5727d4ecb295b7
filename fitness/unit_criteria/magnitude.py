"""Magnitude: the length of all weights that go with a unit."""

from __future__ import annotations

from typing import ClassVar

from evoprune.fitness.unit_criteria import UNIT_CRITERIA, Spread, UnitEvidence, UnitScores, coupled_sums, weight
from evoprune.fitness.units import BlockUnits


class GroupMagnitude:
    """The l2 norm of the rows and columns of a unit, in all of its matrices together."""

    needs: ClassVar[frozenset[str]] = frozenset()
    spread: ClassVar[Spread] = "uniform"
    source: ClassVar[str] = "Ma et al. 2023 (LLM-Pruner, arXiv:2305.11627): its L2 baseline"

    def scores(self, block: BlockUnits, evidence: UnitEvidence) -> UnitScores:
        squares = coupled_sums(
            block, lambda bound: weight(bound).square().sum(1), lambda bound: weight(bound).square().sum(0)
        )
        return UnitScores(squares.groups.sqrt(), squares.heads.sqrt(), squares.neurons.sqrt())


UNIT_CRITERIA.add("magnitude", GroupMagnitude())
