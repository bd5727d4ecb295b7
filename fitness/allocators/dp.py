"""Dynamic programming: the sparsities whose output errors, matrix by matrix, add up to the least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np
from torch import Tensor

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Level, Use, grouped, shared_out
from evoprune.fitness.compressors import relative_output_error
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.parameters import check_choice, check_range
from evoprune.metrics.records import MaskRule, Site, removed_count

ERRORS = ("H", "X_ss", "loss")
# Finer units of cost than this many for the whole budget change no decision that the levels leave open.
MAX_UNITS = 200_000
# The error of a matrix without which the model gives no finite numbers.
_LOST = 1e6


def least_error(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    budget: int,
    *,
    most: int | None = None,
    units: int = MAX_UNITS,
) -> list[int]:
    """One level per group such that the costs reach the budget and the errors add up to the least.

    Args:
        errors: by group and level, level 0 first; where `most` is None not falling with the level.
        costs: weights removed, by group and level, whole numbers; 0 at level 0.
        budget: weights to remove; if all groups together cannot, the largest costs are aimed at.
        most: weights that may go at most, where levels can be chosen so that they do.
        units: parts of the budget in which costs are told apart, at most.

    Returns:
        Level of each group. Among sums of equal error the least cost wins, then the lower levels of the later groups.

    Exact while the budget is at most `units` times the largest common divisor of the costs, else for costs rounded to
    units of that share.

    Source: allocation chapter, 2.5: D[l][c] = min_s D[l - 1][c - cost_s] + e_(l, s).
    """
    unit = max(math.gcd(*(cost for row in costs for cost in row)), -(-budget // units), 1)
    prices = [[round(cost / unit) for cost in row] for row in costs]
    goal = min(-(-budget // unit), sum(max(row) for row in prices))
    # What costs more than this could give up the level of one group and still reach the goal.
    places = goal + max(max(row) for row in prices) + 1
    best = np.full(places, np.inf)
    best[0] = 0.0
    choices = np.zeros((len(costs), places), dtype=np.int16)
    for group in range(len(costs)):
        after = np.full(places, np.inf)
        for level, price in enumerate(prices[group]):
            through = np.full(places, np.inf)
            through[price:] = best[: places - price] + errors[group][level]
            better = through < after
            after[better] = through[better]
            choices[group, better] = level
        best = after
    within = best[goal:] if most is None else best[goal : max(most // unit, goal) + 1]
    place = goal + int((within if np.isfinite(within).any() else best[goal:]).argmin())
    levels = [0] * len(costs)
    for group in reversed(range(len(costs))):
        levels[group] = int(choices[group, place])
        place -= prices[group][levels[group]]
    return levels


@dataclass(frozen=True)
class DynamicProgramming:
    """The levels whose relative output errors add up to the least at the budget, each matrix taken by itself.

    Of bits, the errors are those of what the compressor makes of a matrix at each level.

    Attributes:
        levels: sparsities 0, 1 / levels, 2 / levels and so on are tried, where no bits are shared out.
        error: what errors are measured with: H (whole Gram matrix), X_ss (its diagonal; cheaper), or what the matrix
            alone adds to the loss (slow).
        granularity: what shares a sparsity: matrix, block or kind.
        sparsities: beside bits, tried of each matrix, separated by commas, such as 0,0.25,0.5; none leaves every matrix
            that of the target.
    """

    levels: int = 16
    error: str = "H"
    granularity: str = "matrix"
    sparsities: str = ""

    source: ClassVar[str] = "Frantar and Alistarh 2022, SPDY, arXiv:2201.13096; the baseline of EvoPress"

    def __post_init__(self) -> None:
        check_range("levels", self.levels, 2, 100)
        check_choice("error", self.error, ERRORS)
        grouped((), self.granularity)
        _ = self.tried

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.error}) - {"loss"}

    @property
    def uses(self) -> frozenset[Use]:
        return frozenset({"scores", "losses by matrix"} if self.error == "loss" else {"scores"})

    @property
    def tried(self) -> tuple[float, ...]:
        """`sparsities` as numbers.

        Raises:
            InvalidInput: one is none in [0, 1).
        """
        found = []
        for word in filter(None, (part.strip() for part in self.sparsities.split(","))):
            try:
                found.append(MaskRule(float(word)).fraction)
            except ValueError:
                raise InvalidInput(f"sparsities are {self.sparsities[:60]!r}: give some such as 0,0.25,0.5") from None
        return tuple(sorted(set(found)))

    def request(self, evidence: Evidence) -> Sequence[float]:
        if self.tried:
            raise InvalidInput("sparsities of allocator 'dp' are tried beside bits: give --bits too, or leave them out")
        sites = evidence.sites
        groups = grouped(sites, self.granularity)
        grid = [level / self.levels for level in range(self.levels)]
        errors = [[0.0] * len(grid) for _ in groups]
        costs = [[0] * len(grid) for _ in groups]
        for place, group in enumerate(groups):
            for site in (sites[index] for index in group):
                weight, scores = evidence.weight(site), evidence.scores(site)
                pruned = (weight.masked_fill(~mask(scores, MaskRule(sparsity)), 0) for sparsity in grid)
                for level, error in enumerate(self._errors(evidence, site, pruned)):
                    errors[place][level] += error
                    costs[place][level] += site.out_features * removed_count(grid[level], site.in_features)
        # A loss may fall by chance where more goes.
        errors = [list(accumulate(row, max)) for row in errors]
        budget = removed_count(evidence.target, sum(site.weights for site in sites))
        return shared_out(groups, [grid[level] for level in least_error(errors, costs, budget)])

    def level_costs(self, evidence: Evidence, levels: Sequence[Sequence[Level]]) -> Sequence[Sequence[float]]:
        if self.granularity != "matrix":
            raise InvalidInput(f"bits are shared out by matrix: leave out granularity={self.granularity}")
        found = []
        for site, own in zip(evidence.sites, levels, strict=True):
            made = evidence.compressed(site, own)
            if self.error == "H":
                found.append([error for _, error in made])
            else:
                found.append(self._errors(evidence, site, (weight for weight, _ in made)))
        return found

    def _errors(self, evidence: Evidence, site: Site, made: Iterable[Tensor]) -> list[float]:
        """Of each replacement of a matrix, [out, in], in their order."""
        if self.error == "loss":
            dense = evidence.dense_loss()
            losses = evidence.losses_with((site, weight) for weight in made)
            return [min(max(loss - dense, 0.0), _LOST) for loss in losses]
        named = {"gram" if self.error == "H" else "input_squares": evidence.statistic(site, self.error)}
        weight = evidence.weight(site)
        return [relative_output_error(weight, new, **named) or 0.0 for new in made]


ALLOCATORS.add("dp", DynamicProgramming())
