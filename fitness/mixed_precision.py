"""Bits by matrix: as few in all as a budget says, where they cost the least.

An allocator says what each level of each matrix costs; the levels are then those whose costs add up to the least, as in
the dynamic program over sparsities.
Source: Frantar and Alistarh 2022 (OBC, arXiv:2208.11580), section 6; pruning operators, sections 1.4 and 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import torch

from evoprune.fitness.allocating import ModelEvidence
from evoprune.fitness.allocators import ALLOCATORS, Allocator, BitAllocator, Level
from evoprune.fitness.allocators.dp import DynamicProgramming, least_error
from evoprune.fitness.allocators.uniform import Uniform
from evoprune.fitness.compressors import at_bits
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.quantisation import WHOLE_BITS, check_bits
from evoprune.fitness.samples import Sequences
from evoprune.fitness.statistics import Statistics
from evoprune.metrics.allocation import Allocation, BitBudget, SiteSparsity, repair
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import parameters_of
from evoprune.metrics.records import MaskRule, Site, removed_count

LEVELS = (2, 3, 4, 8, WHOLE_BITS)
"""Bits that a matrix may have, unless others are asked for."""


@dataclass(frozen=True)
class BitTarget:
    """Bits that are asked for.

    Attributes:
        mean: of a weight that stays.
        levels: what a matrix may have.

    Raises:
        InvalidInput: a level without a grid, one twice or none; or a mean that no levels give.
    """

    mean: float
    levels: tuple[int, ...] = LEVELS

    def __post_init__(self) -> None:
        for bits in self.levels:
            check_bits(bits)
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise InvalidInput(
                f"levels of bits are {','.join(map(str, self.levels)) or 'none'}: give each once, such as 2,3,4,8"
            )
        if not min(self.levels) <= self.mean <= max(self.levels):  # a NaN is refused too
            raise InvalidInput(
                f"a mean of {self.mean:g} bits cannot be reached: the levels are {', '.join(map(str, self.levels))}"
            )

    @classmethod
    def of(cls, mean: float, levels: str | Sequence[int] | None) -> BitTarget:
        """With levels as they are written on the command line, such as ``2,3,4,8``.

        Raises:
            InvalidInput: as above, or a level is no whole number.
        """
        if levels is None:
            return cls(float(mean))
        words = levels.split(",") if isinstance(levels, str) else levels
        try:
            return cls(float(mean), tuple(sorted(int(word) for word in words)))
        except ValueError:
            raise InvalidInput(f"levels of bits are {str(levels)[:60]!r}: give whole numbers such as 2,3,4,8") from None

    def budget(self, weights: int) -> int:
        """The bits of so many weights: the floor of the decimal number that was written, times them."""
        return math.floor(Fraction(repr(self.mean)) * weights)


def check_allocates_bits(name: str, allocator: Allocator, target: BitTarget) -> None:
    """Refuse an allocator that shares out no bits, or not such a mean.

    Raises:
        InvalidInput: says which do.
    """
    if isinstance(allocator, Uniform):
        if target.mean not in target.levels:
            raise InvalidInput(
                f"{target.mean:g} bits are none of the levels {', '.join(map(str, target.levels))}, and uniform gives "
                "every matrix the same: name an allocator that mixes them, such as dp"
            )
    elif not isinstance(allocator, BitAllocator):
        able = [known for known in ALLOCATORS if isinstance(ALLOCATORS[known], (BitAllocator, Uniform))]
        raise InvalidInput(f"allocator {name!r} shares out no bits; {', '.join(able)} do")


@torch.no_grad()
def allocate_bits(
    language_model: LanguageModel,
    name: str,
    allocator: Allocator,
    target: BitTarget,
    rule: MaskRule,
    *,
    compressor: str,
    criterion: Criterion,
    statistics: Statistics | None = None,
    calibration: Sequences | None = None,
    search: Sequences | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Allocation:
    """Bits for each matrix of a model, at one sparsity or pattern, or at sparsities that the allocator chooses too.

    The budget is what a model of that sparsity has if each weight that stays has the mean of the bits. No choice of
    levels within it costs less in all; so no matrix could have more bits at a lower cost with what is left of it.

    Args:
        language_model: dense; where losses are measured matrices are replaced in place and put back.
        name, allocator: a registered one, with its parameters; see `BitAllocator`.
        target: the bits.
        rule: what goes from every matrix, by row or in a pattern.
        compressor: as `compressor_of` takes it, without bits.
        criterion, statistics, calibration, search, progress: as of `allocate_model`; statistics at least those of the
            allocator and `needed_statistics`.

    Raises:
        InvalidInput: the compressor has no bits or not these, the allocator shares out none, or the budget is out of
            reach.
    """
    check_allocates_bits(name, allocator, target)
    for bits in target.levels:
        at_bits(compressor, bits)
    sites = [bound.site for bound in language_model.sites]
    wanted = [rule.fraction] * len(sites)
    shares = wanted if rule.pattern is not None else repair(wanted, sites, rule.fraction)
    budget = target.budget(sum(_kept(site, share) for site, share in zip(sites, shares, strict=True)))
    tried = allocator.tried if isinstance(allocator, DynamicProgramming) else ()
    if tried and rule.pattern is not None:
        raise InvalidInput("a pattern fixes the sparsity of every row: leave out the pattern, or the sparsities of dp")
    levels = [[Level(bits, share) for share, bits in product(tried or (own,), target.levels)] for own in shares]
    sizes = [
        [level.bits * _kept(site, level.sparsity) for level in row] for site, row in zip(sites, levels, strict=True)
    ]
    least = sum(map(min, sizes))
    if least > budget:
        raise InvalidInput(
            f"the budget is {budget:,} bits, and the fewest that the levels allow are {least:,}: give more bits"
        )
    if isinstance(allocator, BitAllocator):
        evidence = ModelEvidence(
            language_model, rule.fraction, criterion, statistics, calibration, search, progress,
            compressor=compressor, pattern=rule.pattern,
        )  # fmt: skip
        costs = allocator.level_costs(evidence, levels)
        for site, row in zip(sites, costs, strict=True):
            if not all(map(math.isfinite, row)):
                raise InvalidInput(f"what bits of {site.name} cost is no finite number: no allocation follows from it")
        chosen = least_cost(costs, sizes, budget)
    else:
        chosen = [target.levels.index(int(target.mean))] * len(sites)
    found = tuple(
        SiteSparsity(site.name, (site.out_features, site.in_features), row[at].sparsity, row[at].bits)
        for site, row, at in zip(sites, levels, chosen, strict=True)
    )
    removed, weights = sum(site.removed for site in found), sum(site.weights for site in found)
    return Allocation(
        model=type(language_model.model).__name__,
        sparsity=removed / weights if tried else rule.fraction,
        sites=found,
        allocator=name,
        parameters={**parameters_of(allocator), "bit_levels": list(target.levels), "compressor": compressor},
        bits=BitBudget(target.mean, budget),
    )


def least_cost(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """One level per matrix such that the sizes are within the budget and the costs add up to the least.

    Args:
        costs: by matrix and level.
        sizes: bits, by matrix and level; the smallest of each matrix together within the budget.
        budget: bits.

    Returns:
        Level of each matrix; among sums of equal cost the largest size. As exact as `least_error`, whose costs are here
        what a level saves; where that is not exact, what it misses the budget by is taken and given back level by
        level, the best in cost by bit first.
    """
    fronts = [_front(*row) for row in zip(costs, sizes, strict=True)]
    errors = [[row[level] for level in front] for row, front in zip(costs, fronts, strict=True)]
    bits = [[row[level] for level in front] for row, front in zip(sizes, fronts, strict=True)]
    saved = [[row[0] - size for size in row] for row in bits]
    goal = sum(row[0] for row in bits) - budget
    places = least_error(errors, saved, goal) if goal > 0 else [0] * len(bits)
    left = budget - sum(row[place] for row, place in zip(bits, places, strict=True))
    left = _moved(places, errors, bits, left, 1)
    _moved(places, errors, bits, left, -1)
    return [front[place] for front, place in zip(fronts, places, strict=True)]


def _front(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Levels that no other of at most their size costs less than; the largest first."""
    order = sorted(range(len(costs)), key=lambda level: (sizes[level], costs[level]))
    front: list[int] = []
    for level in order:
        if not front or (costs[level] <= costs[front[-1]] and sizes[level] > sizes[front[-1]]):
            front.append(level)
    return front[::-1]


def _moved(
    places: list[int], errors: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], left: int, step: int
) -> int:
    """Go level by level, down (1) while the budget is overdrawn, up (-1) while more fits in it; what is left of it."""

    def rate(index: int) -> float:
        here, there = places[index], places[index] + step
        return (errors[index][there] - errors[index][here]) / abs(bits[index][there] - bits[index][here])

    while step < 0 or left < 0:
        able = [
            index
            for index, place in enumerate(places)
            if 0 <= place + step < len(bits[index])
            and (step > 0 or bits[index][place - 1] - bits[index][place] <= left)
        ]
        if not able:
            break
        index = min(able, key=rate)
        left += bits[index][places[index]] - bits[index][places[index] + step]
        places[index] += step
    return left


def _kept(site: Site, sparsity: float) -> int:
    return site.out_features * (site.in_features - removed_count(sparsity, site.in_features))
