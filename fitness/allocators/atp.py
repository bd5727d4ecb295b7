"""ATP: sparsity rises by the same amount from block to block, and the best slope is tried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Site


def slopes(target: float, n_blocks: int, step: float, most: int) -> list[float]:
    """The slopes to try: multiples of `step` that keep every block's sparsity in [0, 1].

    Args:
        target: mean sparsity.
        n_blocks: number of decoder blocks.
        step: between slopes.
        most: how many to try at most; if there are more, that many evenly spread ones up to the largest.
    """
    if n_blocks < 2:
        return [0.0]
    largest = min(2 * target, 2 * (1 - target)) / (n_blocks - 1)
    count = int(largest / step + 1e-9)
    if count > most or count == 0:
        return [largest * (index + 1) / most for index in range(most)]
    return [step * (index + 1) for index in range(count)]


def rising(sites: Sequence[Site], target: float, slope: float) -> list[float]:
    """Sparsities target - slope * (L - 1) / 2 + slope * block."""
    return [target + slope * (site.block - (site.n_blocks - 1) / 2) for site in sites]


@dataclass(frozen=True)
class Atp:
    """Sparsity rises evenly from the first block to the last; the slope with the least loss on text B.

    Attributes:
        step: between the slopes to try (0.002 in the paper).
        evaluations: how many to try at most; in shallow models the paper's grid has hundreds.
    """

    step: float = 0.002
    evaluations: int = 12

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset({"scores", "loss"})
    source: ClassVar[str] = "Huang et al. 2025, Determining layer-wise sparsity (ATP), arXiv:2502.14770; released code"

    def __post_init__(self) -> None:
        check_range("step", self.step, 1e-6, 1)
        check_range("evaluations", self.evaluations, 1, 10_000)

    def request(self, evidence: Evidence) -> Sequence[float]:
        sites = evidence.sites
        found = [
            rising(sites, evidence.target, slope)
            for slope in slopes(evidence.target, sites[0].n_blocks, self.step, self.evaluations)
        ]
        if len(found) == 1:
            return found[0]
        losses = evidence.losses(found)
        return found[min(range(len(found)), key=losses.__getitem__)]


ALLOCATORS.add("atp", Atp())
