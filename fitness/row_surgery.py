"""Optimal brain surgery on every row of a matrix by itself: its weights are fixed one at a time, and the others adapt.

With H the Gram matrix of a layer's inputs, a row w and G = H⁻¹ on its weights that are still free, bringing weight p to
a value q costs (w_p - q)² / 2 G_pp of the output error if the free weights answer with w ← w - G_:p (w_p - q) / G_pp;
then p is fixed, and G ← G - G_:p G_p: / G_pp. Each row chooses the next by itself, so each has its own G. They are made
anew after some steps only, by one product: what a step reads of them, a column, is put together from those before.
Source: Frantar and Alistarh 2022 (OBC, arXiv:2208.11580), sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evoprune.fitness.quantisation import Grid, rounds
from evoprune.fitness.removal_order import Problem

# Steps between two products; and bytes of the inverses of the rows that are worked on at a time: on a CPU as many as
# its caches hold, elsewhere enough to be busy.
_STEPS = 16
_BYTES = 1 << 24
_BYTES_ELSEWHERE = 1 << 30


@dataclass(frozen=True)
class Removals:
    """In which order the weights of every row go.

    Attributes:
        columns: [out, steps] int64, the column that goes at each step.
        losses: [out, steps], half of what each adds to the squared output error.
    """

    columns: Tensor
    losses: Tensor

    def cheapest(self, count: int) -> Tensor:
        """[out] int64: how many each row loses if as many go as `count` says, the cheapest steps of all rows first."""
        chosen = self.losses.flatten().argsort(stable=True)[:count]
        return (chosen // self.losses.shape[1]).bincount(minlength=len(self.losses))


def removals(problem: Problem, pattern: tuple[int, int] | None = None) -> Removals:
    """Greedily the cheapest weight of each row at each step.

    Args:
        problem: the matrix and its inputs.
        pattern: (n, m): n weights stay of every m consecutive columns; None: all go.

    Equal costs lose the lower column first.
    """
    rows, width = problem.weight.shape
    steps = width if pattern is None else width // pattern[1] * (pattern[1] - pattern[0])
    inverse = torch.cholesky_inverse(problem.factor)
    columns = torch.empty(rows, steps, dtype=torch.int64, device=inverse.device)
    losses = torch.empty(rows, steps, dtype=inverse.dtype, device=inverse.device)
    for part in _parts(problem.weight):
        surgery = _Surgery(problem.weight[part], inverse, torch.zeros_like(problem.weight[part], dtype=torch.bool))
        gone = torch.zeros(len(problem.weight[part]), width // (pattern or (0, width))[1], device=inverse.device)
        for step in range(steps):
            costs = surgery.weight.square() / surgery.diagonal
            if pattern is not None:
                full = gone.gather(1, surgery.columns // pattern[1]) >= pattern[1] - pattern[0]
                costs = costs.masked_fill(full, torch.inf)
            places = costs.masked_fill(surgery.fixed, torch.inf).argmin(1)
            column, cost = surgery.fix(places, torch.zeros_like(surgery.weight[:, 0]))
            columns[part, step], losses[part, step] = column, cost / 2
            if pattern is not None:
                gone.scatter_add_(1, column[:, None] // pattern[1], torch.ones_like(gone[:, :1]))
    return Removals(columns, losses)


def after_removals(weight: Tensor, problem: Problem, found: Removals, counts: Tensor) -> tuple[Tensor, Tensor]:
    """What each row has become after so many of its removals: the best weights on what is left of it.

    Args:
        weight: W, [out, in] float32, as it is for inputs that are always zero too.
        problem: of the same matrix.
        found: the order in which weights go.
        counts: [goals, out] int64, how many have gone.

    Returns:
        [goals, out, in] float32 and the masks, [goals, out, in] bool, True = keep.

    One Cholesky factor of H with the columns of a row sorted by how long they stay serves all goals: the first k of
    them answer to the others, R, with the solution x of L_kkᵀ x = L_Rkᵀ w_R.
    """
    rows, width = weight.shape
    stays = torch.full((rows, width), found.columns.shape[1], device=weight.device)
    steps = torch.arange(found.columns.shape[1], device=weight.device)
    stays.scatter_(1, found.columns, steps.expand_as(found.columns))
    order = stays.argsort(dim=1, descending=True, stable=True)
    new, keep = torch.empty(len(counts), rows, width), torch.empty(len(counts), rows, width, dtype=torch.bool)
    new, keep = new.to(weight.device), keep.to(weight.device)
    places, hessian = torch.arange(width, device=weight.device), problem.hessian
    for part in _parts(problem.weight):
        mine = order[part]
        lower = torch.linalg.cholesky(hessian[mine[:, :, None], mine[:, None, :]])
        sorted_weight = weight[part].to(lower.dtype).gather(1, mine)
        for goal, gone in enumerate(counts):
            stay = places < (width - gone[part])[:, None]
            pull = (lower.mT @ sorted_weight.masked_fill(stay, 0)[:, :, None]).masked_fill_(~stay[:, :, None], 0)
            upper = lower.masked_fill(~stay[:, :, None], 0)
            upper.diagonal(dim1=1, dim2=2).masked_fill_(~stay, 1)
            answer = torch.linalg.solve_triangular(upper.mT, pull, upper=True)[:, :, 0]
            values = (sorted_weight + answer).masked_fill_(~stay, 0)
            new[goal, part] = torch.empty_like(values).scatter_(1, mine, values).float()
            keep[goal, part] = torch.empty_like(stay).scatter_(1, mine, stay)
    return new, keep


def quantised(problem: Problem, keep: Tensor, bits: int, symmetric: bool) -> Tensor:
    """The matrix on a mask, every weight rounded to the grid of its row, one at a time.

    Rows start from the best weights on their mask. The next is always that whose rounding costs least; but of those
    that lie beyond their grid, the farthest go first, while enough weights are left to make up for them. Weights of
    inputs that are always zero become zero, so that they do not widen the grid.

    Args:
        problem: the matrix and its inputs.
        keep: [out, in] bool, True = keep.
        bits: of the grid; 16 leaves the best weights on the mask as they are.
        symmetric: see `Grid.of`.

    Returns:
        [out, in] float32, zero outside the mask.
    """
    new, hessian = torch.empty_like(problem.weight, dtype=torch.float32), problem.hessian
    for part in _parts(problem.weight):
        mine, kept = problem.weight[part], keep[part]
        own = hessian * (kept[:, :, None] & kept[:, None, :])
        own.diagonal(dim1=1, dim2=2)[~kept] = 1
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(own))
        pull = (mine.masked_fill(kept, 0) @ hessian).masked_fill_(~kept, 0)
        start = (mine + (inverse @ pull[:, :, None])[:, :, 0]).masked_fill_(~kept, 0)
        if not rounds(bits):
            new[part] = start.float()
            continue
        grid = Grid.of(start, bits, symmetric=symmetric)
        surgery = _Surgery(start, inverse, ~kept)
        for _ in range(int(kept.sum(1).max())):
            values = grid.nearest(surgery.weight)
            errors = (values - surgery.weight).abs_()
            beyond = (errors > grid.scale / 2 * (1 + 1e-9)) & ~surgery.fixed
            costs = torch.where(beyond.any(1, keepdim=True), torch.where(beyond, -errors, torch.inf),
                                errors.square() / surgery.diagonal)  # fmt: skip
            places = costs.masked_fill(surgery.fixed, torch.inf).argmin(1)
            surgery.fix(places, values.gather(1, places[:, None])[:, 0])
        new[part] = surgery.whole().masked_fill_(~kept, 0).float()
    return new


def _parts(weight: Tensor) -> Iterator[slice]:
    """Rows of a matrix whose inverses are in memory at a time."""
    rows, width = weight.shape
    count = max((_BYTES if weight.device.type == "cpu" else _BYTES_ELSEWHERE) // (8 * width * width), 1)
    for begin in range(0, rows, count):
        yield slice(begin, min(begin + count, rows))


class _Surgery:
    """Some rows on the table.

    Attributes:
        columns: [rows, left] int64, those that the others have a place for: the free ones, and some that are fixed.
        weight: [rows, left], what they have become.
        fixed: [rows, left] bool.
        diagonal: [rows, left], of G; no matter where `fixed`.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, fixed: Tensor) -> None:
        """G is given as [in, in] or [rows, in, in], anything where `fixed`; it is not changed."""
        rows, width = weight.shape
        self.columns = torch.arange(width, device=weight.device).repeat(rows, 1)
        self.weight, self.fixed = weight.clone(), fixed.clone()
        self._whole = weight.clone()
        self._inverse = inverse.expand(rows, -1, -1).clone()
        self.diagonal = self._inverse.diagonal(dim1=1, dim2=2).clone()
        self._changes = torch.zeros(rows, width, _STEPS, dtype=inverse.dtype, device=inverse.device)
        self._steps = 0
        self._rows = torch.arange(rows, device=weight.device)

    def fix(self, places: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Bring the weight at one place of each row to a value; nothing happens to rows where it is fixed already.

        Args:
            places: [rows] int64, among `columns`.
            values: [rows].

        Returns:
            The columns, [rows] int64, and what it costs: (w_p - q)² / G_pp, [rows].
        """
        rows, column_of = self._rows, self.columns[self._rows, places]
        before = self._changes[..., : self._steps]
        column = self._inverse[rows, places] - (before @ before[rows, places][:, :, None])[:, :, 0]
        idle = self.fixed[rows, places]
        column.masked_fill_(self.fixed, 0)
        pivot = column[rows, places].clamp_(min=torch.finfo(column.dtype).tiny)
        error = (self.weight[rows, places] - values).masked_fill_(idle, 0)
        change = column / pivot.sqrt()[:, None]
        self.weight.addcmul_(change, (error / pivot.sqrt())[:, None], value=-1)
        self.weight[rows, places] = torch.where(idle, self.weight[rows, places], values)
        self.fixed[rows, places] = True
        self.diagonal.addcmul_(change, change, value=-1)
        self._changes[..., self._steps] = change
        self._steps += 1
        if self._steps == _STEPS:
            self._fold()
        return column_of, error.square() / pivot

    def whole(self) -> Tensor:
        """[rows, in]: all weights of the rows."""
        return self._whole.scatter(1, self.columns, self.weight)

    def _fold(self) -> None:
        """Make G anew; where most weights are fixed by now, without these."""
        self._inverse.baddbmm_(self._changes, self._changes.mT, alpha=-1)
        self._steps = 0
        left = int((~self.fixed).sum(1).max())
        if 4 * left <= 3 * self.fixed.shape[1]:
            self._whole = self.whole()
            stay = self.fixed.to(torch.int8).argsort(dim=1, stable=True)[:, :left].sort(1).values
            self.columns, self.weight, self.fixed = (
                part.gather(1, stay) for part in (self.columns, self.weight, self.fixed)
            )
            self._inverse = self._inverse[self._rows[:, None, None], stay[:, :, None], stay[:, None, :]]
            self._changes = self._changes[:, :left].clone()
        self.diagonal = self._inverse.diagonal(dim1=1, dim2=2).clone()
