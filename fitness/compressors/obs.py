"""ExactOBS: each row loses its weights one at a time, the cheapest first, and what is left adapts after each.

What a row loses says nothing of its neighbours, so that one run gives every number of weights to remove; which rows
lose how many, their costs decide.
Source: Frantar and Alistarh 2022 (OBC, arXiv:2208.11580), section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal, problem_of
from evoprune.fitness.gram import DAMPINGS
from evoprune.fitness.row_surgery import Removals, after_removals, removals
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Group


@dataclass(frozen=True)
class ExactOBS:
    """Remove weights one at a time in every row, the others adapt (ExactOBS).

    Attributes:
        damping: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
    """

    damping: float = DAMPINGS[0]

    needs: ClassVar[frozenset[str]] = frozenset({"H"})
    reads_criterion: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = False
    keeps_weights: ClassVar[bool] = False
    groups: ClassVar[frozenset[Group]] = frozenset({"row", "layer"})
    cost: ClassVar[Cost] = "cubic by row"
    source: ClassVar[str] = "Frantar and Alistarh 2022 (OBC), arXiv:2208.11580"

    def __post_init__(self) -> None:
        check_range("damping", self.damping, 0, 1)

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        problem, asked = problem_of(weight, statistics["H"], self.damping), list(goals)
        found: dict[tuple[int, int] | None, tuple[Tensor, Tensor]] = {}
        for pattern in dict.fromkeys(goal.pattern for goal in asked):
            order = removals(problem, pattern)
            counts = [_counts(goal, order) for goal in asked if goal.pattern == pattern]
            found[pattern] = after_removals(weight, problem, order, torch.stack(counts))
        results = {pattern: zip(*parts, strict=True) for pattern, parts in found.items()}
        for goal in asked:
            yield next(results[goal.pattern])


def _counts(goal: Goal, order: Removals) -> Tensor:
    """[out] int64: how many each row loses."""
    rows, steps = order.columns.shape
    if goal.pattern is not None:
        return torch.full((rows,), steps, device=order.columns.device)
    if goal.group == "row":
        return torch.full((rows,), goal.removed // rows, device=order.columns.device)
    return order.cheapest(goal.removed)


COMPRESSORS.add("obs", ExactOBS())
