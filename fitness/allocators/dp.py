"""Dynamic programming: the sparsities whose output errors, matrix by matrix, add up to the least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use, grouped, shared_out
from evoprune.fitness.compressors import relative_output_error
from evoprune.metrics.mask import mask
from evoprune.metrics.parameters import check_choice, check_range
from evoprune.metrics.records import MaskRule, removed_count

STATISTICS = ("H", "X_ss")
# Finer units of cost than this many for the whole budget change no decision that the levels leave open.
MAX_UNITS = 200_000


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

    Attributes:
        levels: sparsities 0, 1 / levels, 2 / levels and so on are tried.
        error: statistic that errors are measured with: H (whole Gram matrix) or X_ss (its diagonal; cheaper).
        granularity: what shares a sparsity: matrix, block or kind.
    """

    levels: int = 16
    error: str = "H"
    granularity: str = "matrix"

    uses: ClassVar[frozenset[Use]] = frozenset({"scores"})
    source: ClassVar[str] = "Frantar and Alistarh 2022, SPDY, arXiv:2201.13096; the baseline of EvoPress"

    def __post_init__(self) -> None:
        check_range("levels", self.levels, 2, 100)
        check_choice("error", self.error, STATISTICS)
        grouped((), self.granularity)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.error})

    def request(self, evidence: Evidence) -> Sequence[float]:
        sites = evidence.sites
        groups = grouped(sites, self.granularity)
        grid = [level / self.levels for level in range(self.levels)]
        errors = [[0.0] * len(grid) for _ in groups]
        costs = [[0] * len(grid) for _ in groups]
        for place, group in enumerate(groups):
            for site in (sites[index] for index in group):
                weight, scores = evidence.weight(site), evidence.scores(site)
                named = {"gram" if self.error == "H" else "input_squares": evidence.statistic(site, self.error)}
                for level, sparsity in enumerate(grid):
                    pruned = weight.masked_fill(~mask(scores, MaskRule(sparsity)), 0)
                    errors[place][level] += relative_output_error(weight, pruned, **named) or 0.0
                    costs[place][level] += site.out_features * removed_count(sparsity, site.in_features)
        budget = removed_count(evidence.target, sum(site.weights for site in sites))
        return shared_out(groups, [grid[level] for level in least_error(errors, costs, budget)])


ALLOCATORS.add("dp", DynamicProgramming())
