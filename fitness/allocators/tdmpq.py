"""TDMPQ: a matrix is as sensitive as the loss is to noise in its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Level, Use, by_sensitivity, grouped
from evoprune.metrics.parameters import check_range


@dataclass(frozen=True)
class TDMPQ:
    """Where noise in the inputs moves the loss most, matrices lose the least and have the most bits (CPTQuant).

    What moves the loss is |gradient · noise| by a Taylor term of the first order, with noise as large as rounding the
    inputs to so many bits would bring. That is what a matrix costs at these bits.

    Attributes:
        spread: sparsities lie within twice this.
        granularity: what shares a sparsity: matrix, block or kind.
    """

    spread: float = 0.1
    granularity: str = "matrix"

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset({"gradients"})
    source: ClassVar[str] = "Nanda et al. 2024 (CPTQuant), arXiv:2412.03599; reconstructed"

    def __post_init__(self) -> None:
        check_range("spread", self.spread, 0, 1)
        grouped((), self.granularity)

    def request(self, evidence: Evidence) -> Sequence[float]:
        found = evidence.input_noise()
        return by_sensitivity(evidence.sites, evidence.target, found, self.spread, self.granularity)

    def level_costs(self, evidence: Evidence, levels: Sequence[Sequence[Level]]) -> Sequence[Sequence[float]]:
        noise = evidence.input_noise()
        return [[size / (2**level.bits - 1) for level in own] for size, own in zip(noise, levels, strict=True)]


ALLOCATORS.add("tdmpq", TDMPQ())
