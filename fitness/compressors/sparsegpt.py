"""SparseGPT: a sweep over the columns in which the weights to the right make up for each one that goes.

With U the upper Cholesky factor of the inverse Hessian, H⁻¹ = Uᵀ U, removing the weight w of column j costs its row
w² / U_jj² once the columns to the left are fixed, and the best answer of those to the right is to add
- (w / U_jj) U_j,j+1:. In each block of columns the weights with the lowest cost go, of whichever rows; N:M patterns
choose in each row of every M columns when the sweep gets there.
Source: Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1 and section 3.3, with damping and blocks of its
reference code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Goal
from evoprune.fitness.gram import inverse_factor
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.mask import mask, mask_of_count
from evoprune.metrics.records import MaskRule

BLOCK = 128
"""Columns among which weights compete, and after which the columns to the right hear of them."""


class SparseGPT:
    """Later columns make up for the weights that go (SparseGPT).

    Two things differ from the published code. Just as many weights go as were asked for, spread over the blocks of
    columns by their width, where it removes one more in each block. And inputs that are always zero lose their weights
    first, but no more of them than have to go: they are not emptied at a sparsity of 0.
    """

    needs: frozenset[str] = frozenset({"H"})
    reads_criterion = False
    keeps_mask = False
    keeps_weights = False

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        gram = statistics["H"]
        diagonal = gram.diagonal()
        # At a mean of 1 a dead input, whose place on the diagonal becomes 1, weighs in the damping as others do.
        scale = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
        try:
            upper = inverse_factor(gram / scale).float()
        except EvopruneError as error:
            raise InvalidInput(f"{error}: calibrate on more text, or on another") from None
        for goal in goals:
            yield _sweep(weight, upper, diagonal == 0, goal)


def _sweep(weight: Tensor, upper: Tensor, dead: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """The new weight and its mask.

    Args:
        weight: [out, in] float32.
        upper: U, [in, in] float32.
        dead: [in] bool, the inputs that are always zero.
        goal: what has to go.
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
            errors[:, at] = block[:, at].masked_fill(kept[:, at], 0) / factor[at, at]
            block[:, at + 1 :] -= errors[:, at].outer(factor[at, at + 1 :])
        block.masked_fill_(~kept, 0)
        new[:, end:] -= errors @ upper[begin:end, end:]
    return new, keep


COMPRESSORS.add("sparsegpt", SparseGPT())
