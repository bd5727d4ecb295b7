"""A matrix as a sparse core between two block-diagonal wrappers: as tensors, and as a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from evoprune.fitness.adapters import SiteModule
from evoprune.metrics.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Factors:
    """A matrix A S B.

    Attributes:
        core: S, [out, in], zero outside its mask.
        left: the blocks of A, [out / d, d, d].
        right: the blocks of B, [in / e, e, e].
    """

    core: Tensor
    left: Tensor
    right: Tensor

    def to(self, dtype: torch.dtype) -> Factors:
        """The same in another dtype."""
        return Factors(self.core.to(dtype), self.left.to(dtype), self.right.to(dtype))

    def merged(self) -> Tensor:
        """A S B, [out, in] float32: no sparser than any dense matrix."""
        core, left, right = self.core.float(), self.left.float(), self.right.float()
        rows, columns = core.shape
        inside = torch.einsum("rke,keg->rkg", core.view(rows, *right.shape[:2]), right)
        return (left @ inside.reshape(*left.shape[:2], columns)).view(rows, columns)


class FactoredLinear(nn.Linear):
    """y = A S B x + bias. Its `weight` is S; A and B are `left` and `right`, see `Factors`.

    S keeps its pattern, so that its product can be done by a kernel for N:M; the other two are thin.

    Source: Liu et al. 2025 (ARMOR), arXiv:2510.05528.
    """

    def __init__(self, in_features: int, out_features: int, left: int, right: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.left = nn.Parameter(torch.eye(left).repeat(out_features // left, 1, 1))
        self.right = nn.Parameter(torch.eye(right).repeat(in_features // right, 1, 1))

    @classmethod
    def of(cls, bound: SiteModule, factors: Factors) -> FactoredLinear:
        """What takes the place of a layer, with its bias, device and training mode; asks for no gradients."""
        rows, columns = factors.core.shape
        bias = bound.bias()
        with torch.device("meta"):
            found = cls(columns, rows, factors.left.shape[1], factors.right.shape[1], bias=bias is not None)
        values = {"weight": factors.core, "left": factors.left, "right": factors.right, "bias": bias}
        for name, value in values.items():
            if value is not None:
                setattr(found, name, nn.Parameter(value.contiguous().clone(), requires_grad=False))
        return found.train(bound.module.training)

    @property
    def widths(self) -> tuple[int, int]:
        """How wide the blocks of A and of B are."""
        return self.left.shape[1], self.right.shape[1]

    def factors(self) -> Factors:
        """What it holds, detached."""
        return Factors(self.weight.detach(), self.left.detach(), self.right.detach())

    def forward(self, input: Tensor) -> Tensor:
        """[..., out] of [..., in]."""
        inside = functional.linear(_wrapped(self.right, input), self.weight)
        found = _wrapped(self.left, inside)
        return found if self.bias is None else found + self.bias


def refuse_factored(sites: Iterable[SiteModule]) -> None:
    """Refuse what would take the core of a `FactoredLinear` for all of it.

    Raises:
        InvalidInput: a site is bound to one.
    """
    for bound in sites:
        if isinstance(bound.module, FactoredLinear):
            raise InvalidInput(
                f"{bound.site.name} has wrappers around its sparse core: prune the model that it was made of"
            )


def _wrapped(blocks: Tensor, values: Tensor) -> Tensor:
    """The product of a block-diagonal matrix, [n, d, d], with the vectors in the last axis of [..., n * d]."""
    return torch.einsum("nij,...nj->...ni", blocks, values.unflatten(-1, blocks.shape[:2])).flatten(-2)
