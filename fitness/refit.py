"""The best that a matrix can be on some of its columns, from one Cholesky factor for all widths.

On the columns K the weight of the least squared output error is W_K = (W H)_:K (H_KK)⁻¹. With the columns sorted by how
long they stay, H = L Lᵀ and Y = L⁻¹ H Wᵀ, the first k of them solve L_kkᵀ W_Kᵀ = Y_k: one triangular solve for each
width. And their output error is what the rows of Y behind the k-th hold.
Source: layerwise sparsity allocation, section 5.6 (nested database).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evoprune.fitness.gram import wide
from evoprune.fitness.removal_order import Problem

# In which a product with a triangular matrix is computed: all but one of sixteen of its zeros are left out.
_STRIPS = 16


@dataclass(frozen=True)
class Factor:
    """What any width of a matrix is solved from.

    Attributes:
        order: [n] int64, columns, that which stays longest first.
        lower: L, [n, n], lower Cholesky factor of the damped H in this order.
        target: Y = L⁻¹ H Wᵀ, [n, out], in this order.
    """

    order: Tensor
    lower: Tensor
    target: Tensor

    @classmethod
    def of(cls, problem: Problem, order: Tensor) -> Factor:
        """The factor of a matrix, or of some of its columns, in float64 where the device has it.

        Args:
            problem: the matrix and its inputs.
            order: [n] int64, distinct columns, that which stays longest first.
        """
        rows = problem.hessian.index_select(0, order)
        lower = torch.linalg.cholesky(wide(rows.index_select(1, order)))
        weight = wide(problem.weight.T)
        if len(order) == len(weight):
            return cls(order, lower, _upper_product(lower, weight[order]))
        return cls(order, lower, torch.linalg.solve_triangular(lower, wide(rows) @ weight, upper=False))

    def of_weight(self, weight: Tensor) -> Factor:
        """The factor of another weight, [out, in], on the same inputs: of L⁻¹ H Wᵀ, Lᵀ Wᵀ in this order is left."""
        return Factor(self.order, self.lower, _upper_product(self.lower, weight.to(self.lower.dtype).T[self.order]))

    def weight(self, width: int) -> Tensor:
        """[out, width]: the best weight on the first `width` columns of the order, in ascending order of columns."""
        solved = torch.linalg.solve_triangular(self.lower[:width, :width].T, self.target[:width], upper=True)
        return solved[self.order[:width].argsort()].T

    def refit(self, columns: Sequence[int]) -> Tensor:
        """[out, kept]: the best weight on any of the columns, which are given and returned in ascending order.

        H_KK is the product of rows of L with themselves, and (H Wᵀ)_K that of the same rows with Y. Of columns that
        come first in the order this is `weight`, without another factorisation.
        """
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(self.order), device=self.order.device)
        kept = places[torch.tensor(columns, dtype=torch.int64, device=places.device)]
        if len(columns) == 0 or int(kept.max()) < len(columns):
            return self.weight(len(columns))
        rows, target = wide(self.lower[kept]), wide(self.target)
        factor = torch.linalg.cholesky(rows @ rows.T)
        return torch.cholesky_solve(rows @ target, factor).T.to(self.target.dtype)

    def errors(self, total: Tensor) -> Tensor:
        """[n + 1] float64: the output error at every width, in units of `total`, that of a matrix of zeros.

        The error is that on the damped H, tr((W - V) H (W - V)ᵀ).
        """
        explained = torch.cat([total.new_zeros(1), wide(self.target).square().sum(1).cumsum(0)])
        return ((total - explained) / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(min=0)


def _upper_product(lower: Tensor, right: Tensor) -> Tensor:
    """Lᵀ R of L, [n, n], and R, [n, m], without most of the zeros of L."""
    product = torch.empty_like(right)
    starts = range(0, len(lower), max(len(lower) // _STRIPS, 1))
    for begin, end in zip(starts, [*starts[1:], len(lower)], strict=True):
        torch.mm(lower[begin:, begin:end].T, right[begin:], out=product[begin:end])
    return product


def zero_error(problem: Problem) -> Tensor:
    """tr(W H Wᵀ) on the damped H: the output error of a matrix of zeros."""
    weight = wide(problem.weight)
    return ((weight @ wide(problem.hessian)) * weight).sum()
