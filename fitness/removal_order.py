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

# Of two columns that can stand in for each other the second costs more once the first is gone: by 1 / (1 - ρ²), where ρ
# is their correlation in H⁻¹. Two with a ρ² from here on do not go in one round.
_ALIKE = 0.1


@dataclass(frozen=True)
class Problem:
    """The output error of one matrix, as a function of what it becomes: tr((W - V) H (W - V)ᵀ).

    Attributes:
        weight: W, [out, in], the best of all weights, with zeros for inputs that are always zero.
        hessian: H, [in, in], of a mean diagonal about 1, damped, so that it can be inverted.
        factor: its lower Cholesky factor.
        damping: what was added to its diagonal.
    """

    weight: Tensor
    hessian: Tensor
    factor: Tensor
    damping: float

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor, damping: float = DAMPINGS[0], missing: Tensor | None = None) -> Problem:
        """The problem of a matrix on its inputs.

        Args:
            weight: W₀, [out, in], of any float type: for an input x, W₀ x is what should be put out.
            gram: [in, in] float32 or float64, Σ x xᵀ over the inputs times any number; the result has its dtype.
            damping: the least; see `evoprune.fitness.gram.damped_cholesky`.
            missing: [out, in], Σ d xᵀ times the same number, where W₀ x + d should be put out: the best of all weights
                is then W₀ + Σ d xᵀ H⁻¹, with H damped, which pulls it towards W₀.

        Raises:
            EvopruneError: `gram` is not positive definite, even damped.
        """
        diagonal = gram.diagonal()
        dead = diagonal == 0
        # At a mean of 1 a dead input, whose place on the diagonal becomes 1, weighs in the damping as others do.
        mean = diagonal.sum() / (~dead).sum().clamp(min=1)
        hessian = gram / mean.clamp(min=torch.finfo(gram.dtype).tiny)
        factor, damping = damped_cholesky(hessian, damping)
        best = weight.to(gram.dtype).masked_fill(dead, 0)
        if missing is not None:
            best += torch.cholesky_solve(missing.T / mean.clamp(min=torch.finfo(gram.dtype).tiny), factor).T
        return cls(best, damped(hessian, damping), factor, damping)


def column_order(problem: Problem, share: float = SHARE) -> Tensor:
    """Columns in the order in which they go, [in] int64.

    Args:
        problem: the matrix and its inputs.
        share: of the columns that are left, how many go in one round, in [0, 1): at least one, and fewer where many can
            stand in for each other. Scores are those at the beginning of the round. 0 is one at a time.

    Equal scores lose the lower column first; inputs that are always zero cost nothing and go before all others.
    """
    left, gone = _Remaining(problem, 1), []
    while left.count:
        count = max(math.ceil(share * left.count), 1)
        gone.append(left.remove(left.scores().argsort(stable=True)[:count], apart=True))
    return torch.cat(gone)


def group_order(problem: Problem, size: int) -> Tensor:
    """Groups of `size` consecutive columns in the order in which they go, one at a time; [in / size] int64.

    Such as the heads of an attention, or the columns of all query heads that read one key and value head.
    """
    left, gone = _Remaining(problem, size), []
    while left.count:
        gone.append(left.remove(left.scores().argmin()[None]))
    return torch.cat(gone)


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
    left, gone = _Remaining(problem, size), []
    while left.count:
        scores = left.scores().view(sets, -1)
        gone.append(left.remove(scores.argmin(dim=1) + scores.shape[1] * torch.arange(sets, device=scores.device)))
    return torch.stack(gone, dim=1)


class _Remaining:
    """What is left of a matrix, in groups of so many consecutive columns, of which some go at a time.

    Of H⁻¹, which only the columns that go have to be known of in full, nothing is updated but its diagonal blocks: with
    the rows U of those before them, theirs are P_G: - U_:Gᵀ U, and with C Cᵀ what these have on G itself, C⁻¹ times
    them are the next of U. So U is the pivoted Cholesky factor of the inverse P at the beginning, and a column costs
    half of what it does where the whole inverse follows. Groups that have gone keep their places till they are half of
    all; then the inverse of those that are left is made anew, so that rounding does not add up either.

    Attributes:
        count: how many groups are left.
    """

    def __init__(self, problem: Problem, size: int) -> None:
        self.count = len(problem.hessian) // size
        self._hessian, self._size = problem.hessian, size
        # Each column as a row, so that taking some away moves whole rows.
        self._weight = problem.weight.T.contiguous()
        self._begin(torch.arange(self.count, device=problem.hessian.device), problem.factor)

    def scores(self) -> Tensor:
        """What it costs to take away each group, infinite for those that have gone; a group's index is its place."""
        if self._size == 1:
            costs = torch.linalg.vector_norm(self._weight, dim=1).square() / self._blocks[:, 0, 0]
        else:
            weight = self._weight.view(len(self._groups), self._size, -1)
            halves = torch.linalg.solve_triangular(torch.linalg.cholesky(self._blocks), weight, upper=False)
            costs = halves.square().sum((1, 2))
        return costs.masked_fill_(self._gone, torch.inf)

    def remove(self, places: Tensor, *, apart: bool = False) -> Tensor:
        """Take away the groups at these places at once; returns which they were, counted through over the matrix.

        Args:
            places: among those of `scores`, distinct.
            apart: of single columns, those stay that one of the places before can stand in for.
        """
        columns = _places(places, self._size)
        rows = self._rows(columns)
        if apart:
            alone = ~_repeats(rows[:, columns])
            places, columns, rows = places[alone], columns[alone], rows[alone]
        groups = self._groups[places]
        factor, failed = torch.linalg.cholesky_ex(rows[:, columns])
        if failed.item():
            self._renew()
            places = torch.searchsorted(self._groups, groups)
            columns = _places(places, self._size)
            rows = self._rows(columns)
            factor = torch.linalg.cholesky(rows[:, columns])
        new = self._upper[self._used : self._used + len(columns)]
        new.copy_(torch.linalg.solve_triangular(factor, rows, upper=False))
        half = torch.linalg.solve_triangular(factor, self._weight[columns], upper=False)
        self._weight.addmm_(new.T, half, alpha=-1)
        self._blocks -= _blocks_of_square(new, self._size)
        self._used += len(columns)
        self._gone[places] = True
        self._blocks[places] = torch.eye(self._size, dtype=new.dtype, device=new.device)
        self.count -= len(groups)
        if 0 < 2 * self.count <= len(self._groups):
            self._renew()
        return groups

    def _rows(self, columns: Tensor) -> Tensor:
        """Rows of the inverse of what is left, [columns, all of the present stage]."""
        rows, upper = self._inverse[columns], self._upper[: self._used]
        return rows.addmm_(upper[:, columns].T, upper, alpha=-1)

    def _renew(self) -> None:
        """Forget those that have gone, and invert what is left."""
        stay = (~self._gone).nonzero()[:, 0]
        self._weight = self._weight[_places(stay, self._size)]
        groups = self._groups[stay]
        columns = _places(groups, self._size)
        hessian = self._hessian.index_select(0, columns).index_select(1, columns)
        self._begin(groups, torch.linalg.cholesky(hessian))

    def _begin(self, groups: Tensor, factor: Tensor) -> None:
        """Let these groups be all; the factor is that of their part of H."""
        self._groups, self._inverse = groups, torch.cholesky_inverse(factor)
        self._gone = torch.zeros(len(groups), dtype=torch.bool, device=groups.device)
        blocks = self._inverse.view(len(groups), self._size, len(groups), self._size).diagonal(dim1=0, dim2=2)
        self._blocks = blocks.permute(2, 0, 1).contiguous()
        self._upper, self._used = torch.empty_like(self._inverse), 0


def _repeats(inverse: Tensor) -> Tensor:
    """[n] bool: whether one before can stand in for it; of the rows and columns [n, n] of H⁻¹ of some columns."""
    scale = inverse.diagonal().rsqrt()
    alike = (inverse * scale * scale[:, None]).square().tril(-1)
    return (alike >= _ALIKE).any(1)


def _blocks_of_square(matrix: Tensor, size: int) -> Tensor:
    """[n / size, size, size]: diagonal blocks of Mᵀ M, of M [m, n]."""
    if size == 1:
        return matrix.square().sum(0)[:, None, None]
    parts = matrix.view(len(matrix), -1, size)
    return torch.einsum("kgi,kgj->gij", parts, parts)


def _places(groups: Tensor, size: int) -> Tensor:
    """The columns of groups of `size`."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).reshape(-1)
