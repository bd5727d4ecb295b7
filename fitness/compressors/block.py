"""Block sparsity: whole blocks of a matrix go, and the weights that stay make up for them.

The rows of a row of blocks share their inputs, so they share one Hessian: with P the inverse of H on the columns that
are left, removing block C of rows R costs tr(W_RC [P]_CC⁻¹ W_RCᵀ) and moves the others by - W_RC [P]_CC⁻¹ P_C:. Each
row of blocks loses its cheapest block over and over; a goal takes the first of all rows together, by cost, and what is
left gets the best weights there are, W H_:K H_KK⁻¹.
Source: blocks of one size, one curve for each matrix, Xu et al. 2024 (LPViT), arXiv:2407.02068; cost and update of a
block Frantar and Alistarh 2022 (OBC), arXiv:2208.11580, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal, problem_of
from evoprune.fitness.gram import DAMPINGS, wide
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Group

# Inverses that are in memory at a time.
_BYTES = 1 << 28


@dataclass(frozen=True)
class Block:
    """Whole blocks go, those that cost the output least, and the other blocks of their rows make up for them.

    A count that is no multiple of the block is met all the same: of the next block its least weights go, and the rest
    of it stays.

    Attributes:
        height: rows of a block.
        width: columns of a block.
        damping: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
    """

    height: int = 16
    width: int = 16
    damping: float = DAMPINGS[0]

    needs: ClassVar[frozenset[str]] = frozenset({"H"})
    reads_criterion: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = False
    keeps_weights: ClassVar[bool] = False
    groups: ClassVar[frozenset[Group]] = frozenset()
    cost: ClassVar[Cost] = "cubic"
    source: ClassVar[str] = "Xu et al. 2024 (LPViT), arXiv:2407.02068, with the update of arXiv:2208.11580"

    def __post_init__(self) -> None:
        check_range("height", self.height, 1, 1 << 12)
        check_range("width", self.width, 1, 1 << 12)
        check_range("damping", self.damping, 0, 1)

    def check(self, out_features: int, in_features: int, pattern: tuple[int, int] | None) -> None:
        """Refuse a matrix that does not fall into blocks, and a pattern within them.

        Raises:
            InvalidInput: says which.
        """
        size = f"{self.height} × {self.width}"
        if pattern is not None:
            raise InvalidInput(
                f"compressor 'block' removes whole blocks of {size}, not {pattern[0]}:{pattern[1]}: give a sparsity"
            )
        if out_features % self.height or in_features % self.width:
            raise InvalidInput(
                f"blocks of {size} do not divide a matrix of {out_features} × {in_features}: give a height that "
                f"divides {out_features} and a width that divides {in_features}"
            )

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.check(weight.shape[0], weight.shape[1], None)
        problem = problem_of(weight, statistics["H"], self.damping)
        # What belongs to inputs that are always zero counts as well, so that it stays as it is.
        hessian, dense = problem.hessian, wide(weight).view(-1, self.height, weight.shape[1])
        order, costs = self._removals(dense, torch.cholesky_inverse(problem.factor))
        # As if a row's costs rose, which greedy removals nearly do: its blocks then go in the order in which they were
        # removed.
        ranked = costs.cummax(1).values.flatten().argsort(stable=True)
        for goal in goals:
            self.check(weight.shape[0], weight.shape[1], goal.pattern)
            yield self._kept(weight, dense, hessian, order, ranked, goal.removed)

    def _removals(self, dense: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """In which order a row of blocks loses them, and what each then costs.

        Args:
            dense: [rows of blocks, height, in].
            inverse: H⁻¹, [in, in].

        Returns:
            Indices of blocks, and costs at their removal, both [rows of blocks, blocks in a row].
        """
        rows_at_once = max(1, _BYTES // (inverse.numel() * inverse.element_size()))
        parts = [self._removals_of(rows.clone(), inverse) for rows in dense.split(rows_at_once)]
        order, costs = zip(*parts, strict=True)
        return torch.cat(order), torch.cat(costs)

    def _removals_of(self, left: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        count, _, columns = left.shape
        blocks = columns // self.width
        inverses = inverse.repeat(count, 1, 1)
        live = torch.ones(count, blocks, dtype=torch.bool, device=left.device)
        eye = torch.eye(self.width, dtype=left.dtype, device=left.device)
        each, order, costs = torch.arange(count, device=left.device), [], []
        for _ in range(blocks):
            tiled = inverses.view(count, blocks, self.width, blocks, self.width)
            own = tiled.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
            factors = torch.linalg.cholesky(torch.where(live[..., None, None], own, eye))
            pieces = left.view(count, -1, blocks, self.width).permute(0, 2, 3, 1)
            cost = torch.linalg.solve_triangular(factors, pieces, upper=False).square().sum((2, 3))
            chosen = cost.masked_fill(~live, torch.inf).argmin(1)
            order.append(chosen)
            costs.append(cost[each, chosen])
            at = chosen[:, None] * self.width + torch.arange(self.width, device=left.device)
            rows = inverses[each[:, None], at]
            solved = torch.cholesky_solve(rows, factors[each, chosen])
            left -= pieces[each, chosen].transpose(1, 2) @ solved
            inverses -= rows.transpose(1, 2) @ solved
            live[each, chosen] = False
            gone = ~live.repeat_interleave(self.width, 1)
            left.masked_fill_(gone[:, None], 0)
            inverses.masked_fill_(gone[:, None] | gone[:, :, None], 0)
        return torch.stack(order, 1), torch.stack(costs, 1)

    def _kept(
        self, weight: Tensor, dense: Tensor, hessian: Tensor, order: Tensor, ranked: Tensor, removed: int
    ) -> tuple[Tensor, Tensor]:
        """The new weight and its mask; arguments as in `compress` and `_removals`."""
        whole, rest = divmod(removed, self.height * self.width)
        per_row = torch.bincount(ranked[:whole] // order.shape[1], minlength=len(order))
        stays = torch.arange(order.shape[1], device=order.device) >= per_row[:, None]
        live = torch.empty_like(stays).scatter_(1, order, stays)
        keep = live.repeat_interleave(self.width, 1)[:, None].repeat(1, self.height, 1)
        new = dense.clone()
        for row in (~live).any(1).nonzero().flatten().tolist():
            new[row] = _best(dense[row], hessian, keep[row, 0])
        if rest:
            row, step = divmod(int(ranked[whole]), order.shape[1])
            columns = slice(int(order[row, step]) * self.width, (int(order[row, step]) + 1) * self.width)
            scores = new[row, :, columns].square() * hessian.diagonal()[columns]
            doomed = scores.flatten().argsort(stable=True)[:rest]
            part = keep[row, :, columns]
            keep[row, :, columns] = part.flatten().index_fill(0, doomed, False).view(part.shape)
            for line in (~keep[row, :, columns]).any(1).nonzero().flatten().tolist():
                new[row, line] = _best(dense[row, line : line + 1], hessian, keep[row, line])[0]
        return new.float().view(weight.shape), keep.view(weight.shape)


def _best(rows: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """The weights on the columns of `keep`, [in] bool, that lose least of the output of `rows`, [n, in]."""
    new = torch.zeros_like(rows)
    if bool(keep.any()):
        factor = torch.linalg.cholesky(hessian[keep][:, keep])
        new[:, keep] = torch.cholesky_solve(hessian[keep] @ rows.T, factor).T
    return new


COMPRESSORS.add("block", Block())
