"""Scores to rank bytes: one byte a weight, from which a comparison gives the mask of any sparsity l / 256.

With p the position of a weight, from 0, in its row's ascending order by (score, column index), its rank is

    ceil(256 (p + 1) / in) - 1,

so that rank < l exactly for the floor(l * in / 256) weights that `mask` removes from the row at sparsity l / 256.
Source: layerwise sparsity allocation, section 5.6, whose floor(256 p / in) agrees only where 256 divides the width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evoprune.metrics.mask import check_finite
from evoprune.metrics.records import LEVELS

GONE = LEVELS
"""The level of a matrix of which nothing is left, its bias neither."""

# Weights sorted at a time: what is needed beside the matrix stays small, and in a processor's cache.
_WEIGHTS_AT_ONCE = 1 << 18


def rank_bytes(scores: Tensor) -> Tensor:
    """The level up to which each weight stays.

    Args:
        scores: [out, in] float32, low = removed first; ties lose the lower column first.

    Returns:
        [out, in] uint8; ``rank_bytes(scores) >= l`` is the mask, True = keep, of sparsity l / 256 within rows.

    Raises:
        InvalidCandidate: NONFINITE, a score is NaN or infinite.
    """
    check_finite(scores)
    width = scores.shape[1]
    columns = torch.arange(width, device=scores.device)
    by_position = (torch.div((columns + 1) * LEVELS + width - 1, width, rounding_mode="floor") - 1).to(torch.uint8)
    ranks = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    rows = max(_WEIGHTS_AT_ONCE // width, 1)
    for part, found in zip(scores.split(rows), ranks.split(rows), strict=True):
        found.scatter_(1, _order(part, columns), by_position.expand(part.shape))
    return ranks


def _order(rows: Tensor, columns: Tensor) -> Tensor:
    """[rows, in] int64: the columns of each row in ascending order by (score, column)."""
    # Adding zero makes -0 a 0, with which it ties.
    bits = (rows + 0.0).view(torch.int32).to(torch.int64)
    # Bits of floats order as integers do once the negative ones are turned around. With the column below them all keys
    # differ, and plain numbers sort several times faster than pairs, or than indices by a stable sort.
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).bitwise_left_shift_(32).bitwise_or_(columns)
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)
    else:
        keys = keys.sort(dim=1).values
    return keys.bitwise_and_(0xFFFFFFFF)
