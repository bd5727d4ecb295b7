"""Grids of few values that weights are rounded to: uniform, each row's or each group of its columns' own.

Source: Frantar and Alistarh 2022 (OBC, arXiv:2208.11580) and its reference code: the range of a grid is that of the
weights times the factor in 1.00, 0.99, ..., 0.21 whose rounding errors have the least sum of |error|^2.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from evoprune.metrics.errors import InvalidInput

LEAST_BITS, MOST_BITS = 2, 8
WHOLE_BITS = 16
"""Bits of a weight that is not rounded: it counts as these, and stays as it is in the model's dtype."""

_FACTORS = tuple(1 - step / 100 for step in range(80))
_NORM = 2.4


def check_bits(bits: int) -> None:
    """Refuse bits of a weight for which there is no grid, unless they are those of a whole weight.

    Raises:
        InvalidInput: says which there are.
    """
    if bits != WHOLE_BITS and not LEAST_BITS <= bits <= MOST_BITS:
        raise InvalidInput(
            f"bits {bits} is outside [{LEAST_BITS}, {MOST_BITS}], and not {WHOLE_BITS}, which leaves weights whole"
        )


def rounds(bits: int | None) -> TypeGuard[int]:
    """Whether weights of so many bits are brought to a grid; None are whole."""
    return bits is not None and bits != WHOLE_BITS


def rounding_error(weight: Tensor, bits: int) -> float:
    """|W - Q(W)|² / |W|², Q to the nearest value of the grid of each row; 0 of whole weights, and of an empty matrix.

    Args:
        weight: [out, in], of any floating dtype.
        bits: from 2 to 8, or 16.
    """
    whole = weight.double().square().sum().item()
    if not rounds(bits) or whole == 0:
        return 0.0
    return (Grid.of(weight, bits).nearest(weight) - weight).double().square().sum().item() / whole


@dataclass(frozen=True)
class Grid:
    """The values scale * (q - zero) for whole q from 0 to `top`; 0 is one of them.

    Attributes:
        scale: distance of two values, [out, 1] or [out, in].
        zero: whole numbers, of the same shape.
        top: 2^bits - 1.
    """

    scale: Tensor
    zero: Tensor
    top: int

    @classmethod
    def of(cls, weight: Tensor, bits: int, *, width: int | None = None, symmetric: bool = False) -> Grid:
        """The grid that suits a matrix.

        Args:
            weight: [out, in], of any floating dtype.
            bits: from 2 to 8.
            width: so many consecutive columns of a row have a grid of their own, the last ones perhaps fewer; None is
                one for the row.
            symmetric: the range is as long below zero as above.
        """
        if width is None:
            return _fitted(weight, bits, symmetric)
        parts = [_fitted(part, bits, symmetric) for part in weight.split(width, dim=1)]
        sizes = [part.shape[1] for part in weight.split(width, dim=1)]
        return cls(_spread([part.scale for part in parts], sizes), _spread([part.zero for part in parts], sizes),
                   parts[0].top)  # fmt: skip

    def rows(self, part: slice) -> Grid:
        """That of some rows."""
        return Grid(self.scale[part], self.zero[part], self.top)

    def nearest(self, values: Tensor) -> Tensor:
        """[out, in] values rounded to the grid."""
        return ((values / self.scale).round_() + self.zero).clamp_(0, self.top).sub_(self.zero).mul_(self.scale)


def _spread(columns: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    return torch.cat([column.expand(-1, size) for column, size in zip(columns, sizes, strict=True)], dim=1)


def _fitted(weight: Tensor, bits: int, symmetric: bool) -> Grid:
    """One grid for each row."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = torch.where(low < 0, -high, low)
    empty = high == low
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    top = 2**bits - 1
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.empty_like(low), torch.empty_like(low)
    for factor in _FACTORS:
        tried = factor * (high - low) / top
        grid = Grid(tried, torch.full_like(tried, (top + 1) / 2) if symmetric else (-factor * low / tried).round(), top)
        error = (grid.nearest(weight) - weight).abs_().pow_(_NORM).sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
    return Grid(scale, zero, top)
