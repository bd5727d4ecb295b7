"""Rank bytes against the mask rule itself, and against ranks by sorting pairs in Python."""

from __future__ import annotations

from math import ceil

import pytest
import torch

from evoprune.metrics.errors import InvalidCandidate
from evoprune.metrics.mask import mask
from evoprune.metrics.ranks import rank_bytes
from evoprune.metrics.records import LEVELS, MaskRule

WIDTHS = (1, 2, 3, 5, 7, 16, 31, 100, 127, 192, 255, 256, 257, 300, 511, 512, 513, 1000)


def scores(width: int, *, distinct: int | None = None, rows: int = 6) -> torch.Tensor:
    """[rows, width] float32 of both signs; with few distinct values where `distinct` says so, zeros of both signs."""
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(rows, width, generator=generator)
    if distinct is not None:
        drawn = (drawn * distinct / 4).round() / distinct
        drawn[:, ::2] *= -1
    return drawn


@pytest.mark.parametrize("distinct", [None, 1, 5])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_level_is_the_mask_of_its_sparsity(width: int, distinct: int | None) -> None:
    drawn = scores(width, distinct=distinct)
    ranks = rank_bytes(drawn)
    for level in range(LEVELS):
        keep = ranks >= level
        assert torch.equal(keep, mask(drawn, MaskRule(level / LEVELS)))
        assert ((~keep).sum(1) == level * width // LEVELS).all()


@pytest.mark.parametrize("width", [3, 100, 256, 300])
def test_ranks_by_sorting_pairs(width: int) -> None:
    drawn = scores(width, distinct=5)
    for row, ranks in zip(drawn.tolist(), rank_bytes(drawn).tolist(), strict=True):
        order = sorted(range(width), key=lambda column: (row[column], column))
        assert [ranks[column] for column in order] == [ceil(256 * (p + 1) / width) - 1 for p in range(width)]


def test_extremes_order_as_numbers() -> None:
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    row = torch.tensor([[huge, tiny, -0.0, 0.0, -tiny, -huge, 1.0, -1.0]])
    assert rank_bytes(row).argsort(1).tolist() == [[5, 7, 4, 2, 3, 1, 6, 0]]


def test_a_matrix_of_many_parts_and_one_of_long_rows() -> None:
    for shape in ((2000, 300), (3, 300_000)):
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before = drawn.clone()
        for level in (1, 77, 255):
            assert torch.equal(rank_bytes(drawn) >= level, mask(drawn, MaskRule(level / LEVELS)))
        assert torch.equal(drawn, before)


def test_expanded_scores_are_read_as_they_look() -> None:
    row = torch.tensor([[3.0, 1.0, 2.0, 0.5]])
    assert torch.equal(rank_bytes(row.expand(5, 4)), rank_bytes(row).expand(5, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_have_no_ranks(bad: float) -> None:
    with pytest.raises(InvalidCandidate, match="NONFINITE"):
        rank_bytes(torch.tensor([[1.0, bad]]))
