"""Diversity-aware sparsity (TAMP): matrices whose outputs differ much from token to token keep more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use, check_numbers, group_weights, grouped, shared_out
from evoprune.fitness.diversity import PAIRS
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import derived_seed
from evoprune.metrics.parameters import check_choice, check_range


def kept_by_score(
    scores: Sequence[float],
    sizes: Sequence[int],
    target: float,
    *,
    delta: float = 0.1,
    omega: float = 0.0,
    gamma: float = 1.0,
    floor: float = 0.0,
) -> list[int]:
    """How many weights each group keeps: a floor, and a share of the rest in proportion to score^gamma * size^omega.

    Args:
        scores: one number >= 0 per group; high keeps more.
        sizes: weights in each group.
        target: fraction of all weights that goes, in [0, 1).
        delta: no group loses more than target + delta.
        omega: 0 gives every group the same bonus for the same score, so that small matrices stay dense, as published;
            1 is fair to sizes: equal scores give equal sparsities.
        gamma: how sharply scores are told apart; 0 ignores them.
        floor: no group loses less than this fraction.

    Returns:
        Whole numbers that add up to round((1 - target) * all weights) exactly. What a group cannot take is shared
        among the others; if only groups with score 0 are left, in proportion to their sizes.

    Raises:
        InvalidInput: a score is negative or not finite, or the floor is above the target.

    Source: Lee et al. 2025, TAMP, arXiv:2504.09897, and its released code, whose branch for too large a sum adds
    instead of taking away; multimodal allocation chapter, 5.4.
    """
    if any(not math.isfinite(score) or score < 0 for score in scores):
        raise InvalidInput("a score is negative or no finite number: no allocation follows from it")
    if floor > target:
        raise InvalidInput(f"every group should lose at least {floor:g}, but the whole model only {target:g}")
    total = round((1 - target) * sum(sizes))
    least = [max(1 - target - delta, 0.0) * size for size in sizes]
    most = [(1 - floor) * size for size in sizes]
    shares = [score**gamma * size**omega for score, size in zip(scores, sizes, strict=True)]
    kept = list(least)
    free = set(range(len(sizes)))
    while free and (rest := total - math.fsum(kept)) > 1e-9 * total:
        weights = {index: shares[index] for index in sorted(free)}
        if not math.fsum(weights.values()) > 0:
            weights = {index: float(sizes[index]) for index in weights}
        whole = math.fsum(weights.values())
        # A group that is full leaves before the others are given anything, so that the order does not matter.
        full = [index for index in weights if kept[index] + rest * weights[index] / whole >= most[index]]
        for index in full or weights:
            kept[index] = most[index] if full else kept[index] + rest * weights[index] / whole
        free -= set(full) if full else free
    return _whole(kept, sizes, total)


def _whole(kept: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Integers by largest remainder that add up to `total`; the first of equals gets more."""
    rounded = [min(int(share + 1e-6), size) for share, size in zip(kept, sizes, strict=True)]
    order = sorted(range(len(kept)), key=lambda index: rounded[index] - kept[index])
    missing = total - sum(rounded)
    while missing:
        sign = 1 if missing > 0 else -1
        for index in order if sign > 0 else reversed(order):
            if missing and 0 <= rounded[index] + sign <= sizes[index]:
                rounded[index] += sign
                missing -= sign
    return rounded


@dataclass(frozen=True)
class Das:
    """Matrices whose outputs are alike for all tokens of a sample lose more (TAMP).

    Attributes:
        delta: no matrix loses more than the target plus this.
        omega: 0 as published, where small matrices stay dense whatever their scores; 1 is fair to sizes.
        gamma: exponent of the diversity; 0 ignores it.
        floor: no matrix loses less than this fraction.
        pairs: tokens to compare: all, or only those with positive similarity (as published; slow).
        granularity: what shares a sparsity: matrix, block or kind.
        modalities: compare tokens within each modality and between each two, every comparison having the same
            weight; else all tokens alike. The same on text.
        shuffle: a seed that deals the diversities out among the matrices at random, to see what they are worth; 0
            leaves them in place.
    """

    delta: float = 0.1
    omega: float = 0.0
    gamma: float = 1.0
    floor: float = 0.0
    pairs: str = "all"
    granularity: str = "matrix"
    modalities: bool = True
    shuffle: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset({"outputs"})
    source: ClassVar[str] = "Lee et al. 2025, TAMP, arXiv:2504.09897; released code"

    def __post_init__(self) -> None:
        check_range("delta", self.delta, 0, 1)
        check_range("omega", self.omega, 0, 4)
        check_range("gamma", self.gamma, 0, 16)
        check_range("floor", self.floor, 0, 1)
        check_choice("pairs", self.pairs, PAIRS)
        check_range("shuffle", self.shuffle, 0, 2**31)
        grouped((), self.granularity)

    def request(self, evidence: Evidence) -> Sequence[float]:
        sites = evidence.sites
        groups = grouped(sites, self.granularity)
        diversity = evidence.diversity(self.pairs, self.modalities)
        scores = [math.fsum(diversity[index] for index in group) / len(group) for group in groups]
        check_numbers("the diversity", sites, groups, scores)
        if self.shuffle:
            scores = _dealt_out(scores, [min(sites[index].name for index in group) for group in groups], self.shuffle)
        sizes = group_weights(sites, groups)
        kept = kept_by_score(
            scores,
            sizes,
            evidence.target,
            delta=self.delta,
            omega=self.omega,
            gamma=self.gamma,
            floor=self.floor,
        )
        return shared_out(groups, [1 - stays / size for stays, size in zip(kept, sizes, strict=True)])


def _dealt_out(scores: Sequence[float], names: Sequence[str], seed: int) -> list[float]:
    """The scores in an order that follows from the names and the seed, whatever the order they come in."""
    order = sorted(range(len(names)), key=lambda index: names[index])
    drawn = sorted(order, key=lambda index: derived_seed(seed, f"shuffled diversity {names[index]}"))
    found = dict(zip(order, (scores[index] for index in drawn), strict=True))
    return [found[index] for index in range(len(names))]


ALLOCATORS.add("das", Das())
ALLOCATORS.add("das-size-fair", Das(omega=1.0))
