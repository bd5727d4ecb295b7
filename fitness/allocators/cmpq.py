"""CMPQ: what passes on most of what it is given can lose most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Level, Use, by_sensitivity, grouped
from evoprune.fitness.quantisation import rounding_error
from evoprune.metrics.parameters import check_choice, check_range

BETWEEN = ("block", "matrix")


@dataclass(frozen=True)
class CMPQ:
    """Where inputs and outputs correlate least, matrices lose the least and have the most bits (CPTQuant).

    The sensitivity is 1 - the mean canonical correlation of what goes into a block and what comes out. The outputs of a
    single matrix are a linear function of its inputs, so their correlations are 1 but for the ridge: what they tell is
    how much lies in directions that are weak against it. At so many bits a matrix costs its sensitivity times the share
    of its squared weights that rounding them changes.

    Attributes:
        between: whose inputs and outputs: of the block of a matrix, or of each matrix.
        tokens: of text A, at most.
        ridge: what is added to the variances, as a fraction of their mean.
        top: so many of the largest correlations.
        spread: sparsities lie within twice this.
        granularity: what shares a sparsity: matrix, block or kind.
    """

    between: str = "block"
    tokens: int = 4096
    ridge: float = 1e-3
    top: int = 64
    spread: float = 0.1
    granularity: str = "block"

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset({"outputs"})
    source: ClassVar[str] = "Nanda et al. 2024 (CPTQuant), arXiv:2412.03599; reconstructed"

    def __post_init__(self) -> None:
        check_choice("between", self.between, BETWEEN)
        check_range("tokens", self.tokens, 2, 1 << 20)
        check_range("ridge", self.ridge, 1e-9, 1)
        check_range("top", self.top, 1, 1 << 20)
        check_range("spread", self.spread, 0, 1)
        grouped((), self.granularity)

    def sensitivities(self, evidence: Evidence) -> list[float]:
        """One per site, 0 to 1."""
        return [1 - found for found in evidence.correlations(self.between, self.tokens, self.ridge, self.top)]

    def request(self, evidence: Evidence) -> Sequence[float]:
        found = self.sensitivities(evidence)
        return by_sensitivity(evidence.sites, evidence.target, found, self.spread, self.granularity)

    def level_costs(self, evidence: Evidence, levels: Sequence[Sequence[Level]]) -> Sequence[Sequence[float]]:
        costs = []
        for site, sensitivity, own in zip(evidence.sites, self.sensitivities(evidence), levels, strict=True):
            weight = evidence.weight(site)
            costs.append([sensitivity * rounding_error(weight, level.bits) for level in own])
        return costs


ALLOCATORS.add("cmpq", CMPQ())
