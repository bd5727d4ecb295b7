"""OWL: blocks with many outliers keep more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use, around, check_numbers, grouped, shared_out
from evoprune.metrics.parameters import check_range


def outlier_ratio(scores: Iterable[Tensor], multiple: float) -> float:
    """Fraction of the scores of one group that exceed `multiple` times their mean.

    Args:
        scores: float32, of any shapes; read twice.
        multiple: M of the paper.
    """
    matrices = list(scores)
    count = sum(matrix.numel() for matrix in matrices)
    mean = math.fsum(matrix.double().sum().item() for matrix in matrices) / count
    return sum(int((matrix > multiple * mean).sum()) for matrix in matrices) / count


@dataclass(frozen=True)
class Owl:
    """Blocks whose scores hold many outliers keep more: S - (LOD - mean LOD), the ratios scaled to 2 * spread.

    The scores are those of the criterion inside. One reproduction uses the ratio with the opposite sign, which prunes
    blocks with outliers more; this is the published sign.

    Attributes:
        spread: largest distance from the mean would be twice this (lambda of the paper).
        outlier: a score above this many times the mean of its group is an outlier (M of the paper).
        granularity: what shares a sparsity: block, kind or matrix.
    """

    spread: float = 0.08
    outlier: float = 5.0
    granularity: str = "block"

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset({"scores"})
    source: ClassVar[str] = "Yin et al. 2024, arXiv:2310.05175, section 3; released code"

    def __post_init__(self) -> None:
        check_range("spread", self.spread, 0, 1)
        check_range("outlier", self.outlier, 0, 1e6)
        grouped((), self.granularity)

    def request(self, evidence: Evidence) -> Sequence[float]:
        sites = evidence.sites
        groups = grouped(sites, self.granularity)
        ratios = [outlier_ratio([evidence.scores(sites[index]) for index in group], self.outlier) for group in groups]
        check_numbers("the outlier ratio", sites, groups, ratios)
        return shared_out(groups, around(evidence.target, [-ratio for ratio in ratios], self.spread))


ALLOCATORS.add("owl", Owl())
