"""One cut through the scores of all matrices: what falls below it in a matrix is what the matrix loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use, group_weights, grouped, shared_out
from evoprune.metrics.global_cut import removed_by_global_cut
from evoprune.metrics.records import Site, removed_count


def sparsity_below_cut(
    evidence: Evidence, scores: Callable[[Site], Tensor], granularity: str, share: Callable[[Tensor], Tensor]
) -> list[float]:
    """Fraction of each group's weights whose scores are among the lowest of the whole model.

    Args:
        evidence: gives the matrices and the target.
        scores: of a site, [out, in] float32.
        granularity: what shares a sparsity.
        share: what becomes of the scores of one matrix before they are compared with those of others.
    """
    sites = evidence.sites
    groups = grouped(sites, granularity)
    total = removed_count(evidence.target, sum(site.weights for site in sites))
    removed = removed_by_global_cut(lambda: (share(scores(site)) for site in sites), total)
    below = [sum(removed[index] for index in group) for group in groups]
    return shared_out(
        groups, [lost / weights for lost, weights in zip(below, group_weights(sites, groups), strict=True)]
    )


def over_mean(scores: Tensor) -> Tensor:
    """Scores in units of the mean of their matrix; as they are if that is zero."""
    mean = scores.mean(dtype=torch.float64).float()
    return scores / mean if mean > 0 else scores


def layerwise_adaptive(weight: Tensor) -> Tensor:
    """LAMP scores: w^2 over the sum of the squares of all weights of its matrix that are not smaller.

    Args:
        weight: [out, in] float32.

    Returns:
        [out, in] float32; the largest weight of a matrix has 1, so that no matrix is emptied.

    Source: Lee et al. 2021, arXiv:2010.07611, section 2. Equal weights are ordered by index.
    """
    squares = weight.double().square().flatten()
    ascending, order = squares.sort(stable=True)
    # Summed from the largest down, so that the last ratio is exactly 1.
    remaining = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.where(remaining > 0, ascending / remaining, torch.zeros_like(ascending))
    return torch.empty_like(squares).scatter_(0, order, scores).float().view_as(weight)


@dataclass(frozen=True)
class GlobalMagnitude:
    """The smallest weights of the whole model go.

    Attributes:
        granularity: what shares a sparsity: matrix, block or kind.
    """

    granularity: str = "matrix"

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset()
    source: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626"

    def __post_init__(self) -> None:
        grouped((), self.granularity)

    def request(self, evidence: Evidence) -> Sequence[float]:
        return sparsity_below_cut(evidence, lambda site: evidence.weight(site).abs(), self.granularity, lambda s: s)


@dataclass(frozen=True)
class GlobalWanda:
    """The lowest Wanda scores of the whole model go, in units of the mean of their matrix.

    Without those units the matrices with the smallest inputs would be emptied.

    Attributes:
        granularity: what shares a sparsity: matrix, block or kind.
        normalise: divide the scores of a matrix by their mean.
    """

    granularity: str = "matrix"
    normalise: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"X_l2"})
    uses: ClassVar[frozenset[Use]] = frozenset()
    source: ClassVar[str] = "Sun et al. 2024, arXiv:2306.11695, compared across matrices"

    def __post_init__(self) -> None:
        grouped((), self.granularity)

    def request(self, evidence: Evidence) -> Sequence[float]:
        def scores(site: Site) -> Tensor:
            return evidence.weight(site).abs() * evidence.statistic(site, "X_l2")

        return sparsity_below_cut(
            evidence, scores, self.granularity, over_mean if self.normalise else lambda unchanged: unchanged
        )


@dataclass(frozen=True)
class Lamp:
    """LAMP: magnitudes in relation to the larger weights of their matrix, cut globally.

    Attributes:
        granularity: what shares a sparsity: matrix, block or kind.
    """

    granularity: str = "matrix"

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset()
    source: ClassVar[str] = "Lee et al. 2021, arXiv:2010.07611"

    def __post_init__(self) -> None:
        grouped((), self.granularity)

    def request(self, evidence: Evidence) -> Sequence[float]:
        return sparsity_below_cut(evidence, evidence.weight, self.granularity, layerwise_adaptive)


ALLOCATORS.add("global-magnitude", GlobalMagnitude())
ALLOCATORS.add("global-wanda", GlobalWanda())
ALLOCATORS.add("lamp", Lamp())
