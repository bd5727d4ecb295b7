"""Which columns of a matrix go first, and what the others become: optimal brain surgery on groups of columns.

With H the Gram matrix of a layer's inputs, taking the columns G away costs tr(W_G (H⁻¹_GG)⁻¹ W_Gᵀ) of the squared
output error tr(ΔW H ΔWᵀ) if all other columns make up for it as well as they can, W ← W - W_G (H⁻¹_GG)⁻¹ H⁻¹_G: and
H⁻¹ ← H⁻¹ - H⁻¹_:G (H⁻¹_GG)⁻¹ H⁻¹_G:. What goes is chosen greedily, the cheapest first. Whatever the order, the result
is the least-squares solution on the columns that are left, see `evoprune.fitness.refit`.
Source: Hassibi and Stork 1992; Kurtic et al. 2023 (ZipLM, arXiv:2302.04089), section 3.1; layerwise sparsity
allocation, sections 1.1 and 5.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evoprune.fitness.gram import DAMPINGS, damped, damped_cholesky

SHARE = 0.05
"""Of the columns that are left, how many go in one round."""

# A round chooses among so many times the columns that it takes.
_POOL = 2

# Of two columns that can stand in for each other the second costs more once the first is gone: by 1 / (1 - ρ²), where ρ
# is their correlation in H⁻¹. Two with a ρ² from here on do not go in one round.
_ALIKE = 0.1


@dataclass(frozen=True)
class Problem:
    """The output error of one matrix, as a function of what it becomes: tr((W - V) H (W - V)ᵀ).

    Attributes:
        weight: W, [out, in], with zeros for inputs that are always zero.
        hessian: H, [in, in], of a mean diagonal about 1, damped, so that it can be inverted.
        factor: its lower Cholesky factor.
        damping: what was added to its diagonal.
    """

    weight: Tensor
    hessian: Tensor
    factor: Tensor
    damping: float

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, damping: float = DAMPINGS[0]) -> Problem:
        """The problem of a matrix on its inputs.

        Args:
            weight: [out, in], of any float type.
            gram: [in, in] float32 or float64, Σ x xᵀ over the inputs times any number; the result has its dtype.
            damping: the least; see `evoprune.fitness.gram.damped_cholesky`.

        Raises:
            EvopruneError: `gram` is not positive definite, even damped.
        """
        diagonal = gram.diagonal()
        dead = diagonal == 0
        # At a mean of 1 a dead input, whose place on the diagonal becomes 1, weighs in the damping as others do.
        mean = diagonal.sum() / (~dead).sum().clamp(min=1)
        hessian = gram / mean.clamp(min=torch.finfo(gram.dtype).tiny)
        factor, damping = damped_cholesky(hessian, damping)
        return cls(weight.to(gram.dtype).masked_fill(dead, 0), damped(hessian, damping), factor, damping)


def column_order(problem: Problem, share: float = SHARE) -> Tensor:
    """Columns in the order in which they go, [in] int64.

    Args:
        problem: the matrix and its inputs.
        share: of the columns that are left, how many go in one round, in [0, 1): at least one, and fewer where many can
            stand in for each other. Scores are those at the beginning of the round. 0 is one at a time.

    Equal scores lose the lower column first; inputs that are always zero cost nothing and go before all others.
    """
    left, gone = _Remaining(problem), []
    while len(left.columns):
        count = max(math.ceil(share * len(left.columns)), 1)
        pool = left.column_scores().argsort(stable=True)[: _POOL * count]
        chosen = pool[~_repeats(left.inverse[pool][:, pool])][:count]
        gone.append(left.columns[chosen])
        left.remove(chosen)
    return torch.cat(gone)


def group_order(problem: Problem, size: int) -> Tensor:
    """Groups of `size` consecutive columns in the order in which they go, one at a time; [in / size] int64.

    Such as the heads of an attention, or the columns of all query heads that read one key and value head.
    """
    left, gone = _Remaining(problem), []
    while len(left.columns):
        at = left.group_scores(size).argmin()
        gone.append(left.columns[at * size] // size)
        left.remove(_places(at[None], size))
    return torch.stack(gone)


def balanced_order(problem: Problem, sets: int, size: int) -> Tensor:
    """Groups of columns in the order in which they go, as many of every set at a time.

    Each step takes the cheapest group of every set, by the scores at its beginning, and these at once.

    Args:
        problem: the matrix and its inputs.
        sets: so many sets of consecutive groups, such as KV groups.
        size: of a group, in columns, such as those of a query head.

    Returns:
        [sets, groups of a set] int64: the groups of each set, counted through over all sets.
    """
    left, gone = _Remaining(problem), []
    while len(left.columns):
        scores = left.group_scores(size).view(sets, -1)
        at = scores.argmin(dim=1) + scores.shape[1] * torch.arange(sets, device=scores.device)
        gone.append(left.columns[at * size] // size)
        left.remove(_places(at, size))
    return torch.stack(gone, dim=1)


class _Remaining:
    """What is left of a matrix.

    Attributes:
        columns: those that are left, ascending.
        weight: [left, out], what they have become, each column as a row, so that taking some away moves whole rows.
        inverse: [left, left], of their part of H.
    """

    def __init__(self, problem: Problem) -> None:
        self._hessian = problem.hessian
        self.columns = torch.arange(len(problem.hessian), device=problem.hessian.device)
        self.weight = problem.weight.T.contiguous()
        self.inverse = torch.cholesky_inverse(problem.factor)
        self._inverted = len(self.columns)

    def remove(self, places: Tensor) -> None:
        """Take away the columns at these places among those left, at once."""
        keep = torch.ones(len(self.columns), dtype=torch.bool, device=places.device)
        keep[places] = False
        stay = keep.nonzero()[:, 0]
        rows = self.inverse[places]
        factor, failed = torch.linalg.cholesky_ex(rows[:, places])
        if failed.item():
            self._invert()
            rows = self.inverse[places]
            factor = torch.linalg.cholesky(rows[:, places])
        half = torch.linalg.solve_triangular(factor, rows.index_select(1, stay), upper=False)
        gone = torch.linalg.solve_triangular(factor, self.weight[places], upper=False)
        self.columns = self.columns[stay]
        self.weight = self.weight.index_select(0, stay).addmm_(half.T, gone, alpha=-1)
        # Rounding adds up over the steps, so at every half the inverse is made anew, which costs next to nothing.
        if 2 * len(stay) < self._inverted:
            self._invert()
        else:
            self.inverse = self.inverse.index_select(0, stay).index_select(1, stay).addmm_(half.T, half, alpha=-1)

    def _invert(self) -> None:
        hessian = self._hessian[self.columns][:, self.columns]
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        self._inverted = len(self.columns)

    def column_scores(self) -> Tensor:
        """[left]: what it costs to take away each column."""
        return torch.linalg.vector_norm(self.weight, dim=1).square() / self.inverse.diagonal()

    def group_scores(self, size: int) -> Tensor:
        """[left / size]: what it costs to take away each `size` consecutive columns."""
        count = len(self.columns) // size
        blocks = self.inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        halves = torch.linalg.solve_triangular(
            torch.linalg.cholesky(blocks), self.weight.view(count, size, -1), upper=False
        )
        return halves.square().sum((1, 2))


def _repeats(inverse: Tensor) -> Tensor:
    """[n] bool: whether one before can stand in for it; of the rows and columns [n, n] of H⁻¹ of some columns."""
    scale = inverse.diagonal().rsqrt()
    alike = (inverse * scale * scale[:, None]).square().tril(-1)
    return (alike >= _ALIKE).any(1)


def _places(groups: Tensor, size: int) -> Tensor:
    """The columns of groups of `size`."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).reshape(-1)
