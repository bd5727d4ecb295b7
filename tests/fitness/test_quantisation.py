"""Grids against a search over their ranges one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evoprune.fitness.quantisation import Grid, check_bits
from evoprune.metrics.errors import InvalidInput


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_best_of_all_ranges(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[0, 3], weight[1], weight[2] = 9, weight[1].abs(), 0
    found = Grid.of(weight, bits, symmetric=symmetric).nearest(weight).numpy()
    top = 2**bits - 1
    for row, ours in zip(weight.numpy(), found, strict=True):
        low, high = min(row.min(), 0), max(row.max(), 0)
        if symmetric:
            high = max(high, -low)
            low = -high if low < 0 else low
        best = np.inf
        for hundredths in range(100, 20, -1):
            if high == low:
                continue
            scale = hundredths / 100 * (high - low) / top
            zero = (top + 1) / 2 if symmetric else np.round(-hundredths / 100 * low / scale)
            there = scale * (np.clip(np.round(row / scale) + zero, 0, top) - zero)
            best = min(best, (np.abs(there - row) ** 2.4).sum())
        assert (np.abs(ours - row) ** 2.4).sum() == (pytest.approx(best) if np.isfinite(best) else 0)
        assert len(np.unique(ours)) <= 2**bits


def test_columns_have_grids_of_their_own() -> None:
    weight = torch.randn(4, 21, generator=torch.Generator().manual_seed(0))
    grid = Grid.of(weight, 3, width=8)
    for begin in (0, 8, 16):
        part = weight[:, begin : begin + 8]
        assert torch.equal(grid.nearest(weight)[:, begin : begin + 8], Grid.of(part, 3).nearest(part))
    assert torch.equal(grid.nearest(grid.nearest(weight)), grid.nearest(weight))
    assert not grid.nearest(torch.zeros_like(weight)).any()


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_without_a_grid(bits: int) -> None:
    with pytest.raises(InvalidInput, match=rf"bits {bits} is outside \[2, 8\]"):
        check_bits(bits)
