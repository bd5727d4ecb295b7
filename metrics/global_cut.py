"""How many weights of each matrix go if the lowest scores of all of them go, without holding all scores at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from evoprune.metrics.mask import check_finite

_HALF = 16
_BINS = 1 << _HALF


def removed_by_global_cut(scores: Callable[[], Iterable[Tensor]], removed: int) -> list[int]:
    """How many of the `removed` lowest scores each matrix holds; ties lose the earlier matrix first.

    The bits of a float32, read as a whole number, are in the order of the floats, so the cut is found by counting: the
    upper half of the bits in one pass, the lower half in a second.

    Args:
        scores: gives the matrices one after another, [out, in] float32 each, the same ones at each of three calls.
        removed: how many weights go in all.

    Returns:
        One count per matrix; they add up to `removed`, or to all there are if those are fewer.

    Raises:
        InvalidCandidate: NONFINITE, a score is NaN or infinite.
    """
    if removed <= 0:
        return [0 for _ in scores()]
    upper = torch.zeros(_BINS, dtype=torch.int64)
    for matrix in scores():
        check_finite(matrix)
        upper += _counts((_keys(matrix) >> _HALF) + _BINS // 2)
    high, below = _position(upper, removed)
    lower = torch.zeros(_BINS, dtype=torch.int64)
    for matrix in scores():
        keys = _keys(matrix)
        lower += _counts(keys[(keys >> _HALF) + _BINS // 2 == high] & (_BINS - 1))
    low, _ = _position(lower, removed - below)
    cut = ((high - _BINS // 2) << _HALF) | low
    counts, tied = [], []
    for matrix in scores():
        keys = _keys(matrix)
        counts.append(int((keys < cut).sum()))
        tied.append(int((keys == cut).sum()))
    left = removed - sum(counts)
    for index, ties in enumerate(tied):
        taken = min(ties, max(left, 0))
        counts[index] += taken
        left -= taken
    return counts


def _keys(scores: Tensor) -> Tensor:
    """int32 numbers in the order of the floats; a negative zero equals a positive one."""
    bits = (scores.reshape(-1).float() + 0.0).contiguous().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _counts(bins: Tensor) -> Tensor:
    return torch.bincount(bins, minlength=_BINS).cpu()


def _position(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the number of this rank, from 1, and how many numbers lie in bins below it."""
    up_to = counts.cumsum(0)
    place = min(int(torch.searchsorted(up_to, rank)), len(counts) - 1)
    return place, int(up_to[place] - counts[place])
