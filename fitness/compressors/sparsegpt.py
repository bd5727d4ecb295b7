"""SparseGPT: a sweep over the columns in which the weights to the right make up for each one that goes.

With U the upper Cholesky factor of the inverse Hessian, H⁻¹ = Uᵀ U, removing the weight w of column j costs its row
w² / U_jj² once the columns to the left are fixed, and the best answer of those to the right is to add
- (w / U_jj) U_j,j+1:. In each block of columns the weights with the lowest cost go, of whichever rows; N:M patterns
choose in each row of every M columns when the sweep gets there. A weight that is rounded to a grid in place of going
is answered in the same way.
Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1 and section 3.3, with damping and blocks of its
reference code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal
from evoprune.fitness.gram import DAMPINGS, inverse_factor
from evoprune.fitness.quantisation import Grid, check_bits, rounds
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.mask import mask, mask_of_count
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Group, MaskRule

BLOCK = 128
"""Columns among which weights compete, and after which the columns to the right hear of them."""


@dataclass(frozen=True)
class SparseGPT:
    """Later columns make up for the weights that go (SparseGPT).

    Two things differ from the published code. Just as many weights go as were asked for, spread over the blocks of
    columns by their width, where it removes one more in each block. And inputs that are always zero lose their weights
    first, but no more of them than have to go: they are not emptied at a sparsity of 0.

    Attributes:
        bits: of a weight that stays, from 2 to 8, on a grid by row that suits the dense row; None and 16 leave
            them whole.
        damping: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
    """

    bits: int | None = None
    damping: float = DAMPINGS[0]

    needs: ClassVar[frozenset[str]] = frozenset({"H"})
    reads_criterion: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = False
    keeps_weights: ClassVar[bool] = False
    groups: ClassVar[frozenset[Group]] = frozenset()
    cost: ClassVar[Cost] = "cubic"
    source: ClassVar[str] = "Frantar and Alistarh 2023, arXiv:2301.00774"

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_bits(self.bits)
        check_range("damping", self.damping, 0, 1)

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        gram = statistics["H"]
        diagonal = gram.diagonal()
        # At a mean of 1 a dead input, whose place on the diagonal becomes 1, weighs in the damping as others do.
        scale = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
        try:
            upper = inverse_factor(gram / scale, self.damping).float()
        except EvopruneError as error:
            raise InvalidInput(f"{error}: calibrate on more text, or on another") from None
        grid = Grid.of(weight, self.bits) if rounds(self.bits) else None
        for goal in goals:
            yield _sweep(weight, upper, diagonal == 0, goal, grid)


def _sweep(weight: Tensor, upper: Tensor, dead: Tensor, goal: Goal, grid: Grid | None) -> tuple[Tensor, Tensor]:
    """The new weight and its mask.

    Args:
        weight: [out, in] float32.
        upper: U, [in, in] float32.
        dead: [in] bool, the inputs that are always zero.
        goal: what has to go.
        grid: by row, what the others are rounded to, if they are.
    """
    new, keep = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    width = weight.shape[1]
    every = 1 if goal.pattern is None else goal.pattern[1]
    step = max(BLOCK // every, 1) * every
    for begin in range(0, width, step):
        end = min(begin + step, width)
        block, kept, factor = new[:, begin:end], keep[:, begin:end], upper[begin:end, begin:end]
        # Zero for dead inputs, whatever their weights are.
        per_cost = (~dead[begin:end]) / factor.diagonal().square()
        if goal.pattern is None:
            # Whole numbers that add up to `removed` over all blocks.
            count = goal.removed * end // width - goal.removed * begin // width
            kept.copy_(mask_of_count(block.square() * per_cost, count))
        errors = torch.zeros_like(block)
        for at in range(end - begin):
            if goal.pattern is not None and at % every == 0:
                group = slice(at, at + every)
                kept[:, group] = mask(block[:, group].square() * per_cost[group], MaskRule(None, goal.pattern))
            column = block[:, at : at + 1]
            final = (column if grid is None else grid.nearest(column)).masked_fill(~kept[:, at : at + 1], 0)
            errors[:, at] = (column - final)[:, 0] / factor[at, at]
            block[:, at : at + 1] = final
            block[:, at + 1 :] -= errors[:, at].outer(factor[at, at + 1 :])
        new[:, end:] -= errors @ upper[begin:end, end:]
    return new, keep


COMPRESSORS.add("sparsegpt", SparseGPT())
