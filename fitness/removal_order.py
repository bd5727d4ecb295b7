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

from evoprune.fitness.gram import damped, damped_cholesky

SHARE = 0.05
"""Of the columns that are left, how many go in one round."""

# Among so many times the columns of a round those that go are chosen, one at a time: of two that can stand in for each
# other, the second costs much more once the first is gone.
_POOL = 2


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
    def of(cls, weight: Tensor, gram: Tensor) -> Problem:
        """The problem of a matrix on its inputs.

        Args:
            weight: [out, in], of any float type.
            gram: [in, in] float32 or float64, Σ x xᵀ over the inputs times any number; the result has its dtype.

        Raises:
            EvopruneError: `gram` is not positive definite, even damped.
        """
        diagonal = gram.diagonal()
        dead = diagonal == 0
        # At a mean of 1 a dead input, whose place on the diagonal becomes 1, weighs in the damping as others do.
        mean = diagonal.sum() / (~dead).sum().clamp(min=1)
        hessian = gram / mean.clamp(min=torch.finfo(gram.dtype).tiny)
        factor, damping = damped_cholesky(hessian)
        return cls(weight.to(gram.dtype).masked_fill(dead, 0), damped(hessian, damping), factor, damping)


def column_order(problem: Problem, share: float = SHARE) -> Tensor:
    """Columns in the order in which they go, [in] int64.

    Args:
        problem: the matrix and its inputs.
        share: of the columns that are left, how many go in one round, in [0, 1): at least one. Between rounds all
            scores are exact; inside a round only those of the cheapest columns are kept so. 0 is one at a time.

    Equal scores lose the lower column first; inputs that are always zero cost nothing and go before all others.
    """
    left, gone = _Remaining(problem), []
    while len(left.columns):
        count = max(math.ceil(share * len(left.columns)), 1)
        pool = left.column_scores().argsort(stable=True)[: max(_POOL * count, 1)]
        chosen = pool[_cheapest(left.inverse[pool][:, pool], left.weight[:, pool], count)]
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
        weight: [out, left], what they have become.
        inverse: [left, left], of their part of H.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._target = problem.hessian @ problem.weight.T
        self.columns = torch.arange(len(problem.hessian), device=problem.hessian.device)
        self.weight = problem.weight
        self.inverse = torch.cholesky_inverse(problem.factor)
        self._solved = len(self.columns)

    def remove(self, places: Tensor) -> None:
        """Take away the columns at these places among those left, at once."""
        keep = torch.ones(len(self.columns), dtype=torch.bool, device=places.device)
        keep[places] = False
        self.columns = self.columns[keep]
        # Rounding adds up over the steps, so at every half all is computed anew, which costs next to nothing.
        if 2 * len(self.columns) < self._solved:
            self._solve()
            return
        rows = self.inverse[places]
        factor, failed = torch.linalg.cholesky_ex(rows[:, places])
        if failed.item():
            self._solve()
            return
        half = torch.linalg.solve_triangular(factor, rows[:, keep], upper=False)
        gone = torch.linalg.solve_triangular(factor, self.weight[:, places].T, upper=False)
        self.weight = torch.addmm(self.weight[:, keep], gone.T, half, alpha=-1)
        self.inverse = torch.addmm(self.inverse[keep][:, keep], half.T, half, alpha=-1)

    def _solve(self) -> None:
        factor = torch.linalg.cholesky(self._problem.hessian[self.columns][:, self.columns])
        self.inverse = torch.cholesky_inverse(factor)
        self.weight = torch.cholesky_solve(self._target[self.columns], factor).T
        self._solved = len(self.columns)

    def column_scores(self) -> Tensor:
        """[left]: what it costs to take away each column."""
        return self.weight.square().sum(0) / self.inverse.diagonal()

    def group_scores(self, size: int) -> Tensor:
        """[left / size]: what it costs to take away each `size` consecutive columns."""
        count = len(self.columns) // size
        blocks = self.inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        halves = torch.linalg.solve_triangular(
            torch.linalg.cholesky(blocks), self.weight.T.reshape(count, size, -1), upper=False
        )
        return halves.square().sum((1, 2))


def _cheapest(inverse: Tensor, weight: Tensor, count: int) -> Tensor:
    """The places of `count` columns in the order in which they go, one at a time.

    Args:
        inverse: [n, n], of the columns to choose from.
        weight: [out, n], theirs.

    With c = H⁻¹_:i / √H⁻¹_ii and v = (WᵀW)_:i / √H⁻¹_ii - ‖W_:i‖² / (2 H⁻¹_ii) c, column i takes c cᵀ from H⁻¹ and
    v cᵀ + c vᵀ from WᵀW. Only diagonals are kept up to date; a column of the two is made when it is needed.
    """
    if count == 1:
        return (weight.square().sum(0) / inverse.diagonal()).argmin()[None]
    gram = weight.T @ weight
    variances, norms = inverse.diagonal().clone(), gram.diagonal().clone()
    barred = torch.zeros_like(norms)
    c, v = inverse.new_zeros(count, len(norms)), inverse.new_zeros(count, len(norms))
    chosen = []
    for step in range(count):
        at = (norms.clamp(min=0) / variances + barred).argmin(dim=0, keepdim=True)
        c_at, v_at = c[:step].index_select(1, at)[:, 0], v[:step].index_select(1, at)[:, 0]
        root = variances.index_select(0, at).rsqrt()
        c[step] = (inverse.index_select(0, at)[0] - c[:step].T @ c_at) * root
        column = (gram.index_select(0, at)[0] - v[:step].T @ c_at - c[:step].T @ v_at) * root
        v[step] = column - column.index_select(0, at) * root / 2 * c[step]
        norms -= 2 * c[step] * v[step]
        # What is left of a variance is at least 1 / H_jj, and that is above rounding.
        variances -= c[step].square()
        variances.index_fill_(0, at, 1)
        barred.index_fill_(0, at, math.inf)
        chosen.append(at)
    return torch.cat(chosen)


def _places(groups: Tensor, size: int) -> Tensor:
    """The columns of groups of `size`."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).reshape(-1)
