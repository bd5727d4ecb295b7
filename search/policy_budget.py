"""From what is asked for to the budget that the masks of a policy have."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from evoprune.fitness.mask_units import UnitTable
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import removed_count
from evoprune.search.config_policy import PolicyTarget
from evoprune.search.policies import Budget, Knapsack, Strata


def budget_of(table: UnitTable, target: PolicyTarget, prior: NDArray[np.float64]) -> Budget:
    """How much of the units every mask keeps.

    What is kept costs no more than what is asked for leaves; what goes only with a whole part counts as kept.

    Args:
        table: the units.
        target: what is asked for.
        prior: [n] scores; where no part may go, the best unit of each block and kind always stays.

    Raises:
        InvalidInput: so much cannot go.
    """
    if table.strata is not None:
        labels, each = table.strata
        return Strata(labels, np.full(int(labels[-1]) + 1, each, dtype=np.int64))
    assert target.sparsity is not None
    pinned = _best_of_rows(table, prior) if target.drop == "none" else None
    if target.budget == "global":
        return _by_cost(table, target, pinned)
    labels = table.groups if target.budget == "block" else _kinds(table)
    counts = np.bincount(labels)
    keep = np.array([count - _removed(target.sparsity, int(count)) for count in counts], dtype=np.int64)
    least = np.bincount(labels, weights=pinned, minlength=len(counts)) if pinned is not None else np.zeros(len(counts))
    if (keep < least).any() or not keep.any():
        where = " in every block" if target.budget == "block" else ""
        raise InvalidInput(
            f"{target.sparsity:g} of every kind of unit cannot go{where} while some of it stays: give a lower "
            "--sparsity, or smaller units"
        )
    return Strata(labels, keep, pinned)


def keep_rates(budget: Budget) -> NDArray[np.float64]:
    """[n]: the share of what a unit has its budget with that stays."""
    if isinstance(budget, Knapsack):
        return np.full(budget.n, budget.budget / int(budget.costs.sum()))
    found: NDArray[np.float64] = (budget.keep / np.bincount(budget.labels, minlength=len(budget.keep)))[budget.labels]
    return found


def _by_cost(table: UnitTable, target: PolicyTarget, pinned: NDArray[np.bool_] | None) -> Budget:
    """All units together: by number where they cost the same."""
    assert target.sparsity is not None
    costs = table.costs
    left = table.dense - removed_count(target.sparsity, table.dense) - table.fixed
    needed = int(costs.min()) if pinned is None else int(costs[pinned].sum())
    if left < needed:
        most = 1 - (needed + table.fixed) / table.dense
        raise InvalidInput(
            f"{target.sparsity:g} of the {target.cost} of heads and MLPs cannot go in such units: at most "
            f"{int(1e4 * most) / 1e4:g} can; give a lower --sparsity, or smaller units"
        )
    if (costs == costs[0]).all():
        return Strata(np.zeros(table.n, dtype=np.int64), np.array([left // int(costs[0])]), pinned)
    return Knapsack(costs, left, pinned)


def _kinds(table: UnitTable) -> NDArray[np.int64]:
    """[n]: the kind of each unit, numbered as they come first."""
    numbers: dict[str, int] = {}
    by_row = [numbers.setdefault(row.kind, len(numbers)) for row in table.rows]
    return np.asarray(by_row, dtype=np.int64)[table.groups]


def _best_of_rows(table: UnitTable, prior: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[n]: the unit of each row with the highest score, of equals the first."""
    found = np.zeros(table.n, dtype=bool)
    for row in range(len(table.rows)):
        units = table.of_row(row)
        found[units.start + int(np.argmax(prior[units]))] = True
    return found


def _removed(sparsity: float, count: int) -> int:
    """The fewest of so many that are no less than this fraction."""
    return math.ceil(Fraction(repr(sparsity)) * count)
