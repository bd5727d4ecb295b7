"""The mask rule against a brute-force sort that shares no code with it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.mask import global_masks, mask, mask_of_counts, threshold_le_mask
from evoprune.metrics.records import MaskRule, removed_count

SPARSITIES = ["0", "0.1", "0.29", "0.5", "0.7", "0.99"]


def _brute(groups: list[list[float]], removed: list[int]) -> list[list[bool]]:
    """Keep flags: python's stable sort by score, then the first ones of each group go."""
    flags = []
    for values, count in zip(groups, removed, strict=True):
        gone = set(sorted(range(len(values)), key=lambda index: values[index])[:count])
        flags.append([index not in gone for index in range(len(values))])
    return flags


def _scores(kind: str, rows: int = 9, columns: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(rows, columns, generator=generator)
    if kind == "tied":
        scores = (2 * scores).round()
    elif kind == "constant":
        scores = torch.full_like(scores, 0.5)
    elif kind == "signed zeros":
        scores = torch.where(scores > 0, 0.0, -0.0)
    elif kind == "extreme":
        scores = scores.sign() * 10 ** (30 * scores.tanh())
    elif kind == "expanded":
        scores = scores[:1].expand(rows, columns)
    return scores


KINDS = ["distinct", "tied", "constant", "signed zeros", "extreme", "expanded"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_row_layer_and_global(kind: str, sparsity: str) -> None:
    scores, fraction = _scores(kind), Fraction(sparsity)
    share = float(sparsity)
    rows = _brute(scores.tolist(), [math.floor(fraction * 24)] * 9)
    assert mask(scores, MaskRule(share)).tolist() == rows
    flat = scores.flatten().tolist()
    (layer,) = _brute([flat], [math.floor(fraction * 216)])
    assert mask(scores, MaskRule(share, group="layer")).flatten().tolist() == layer
    other = 0.5 * _scores("tied", 4, 10)
    (both,) = _brute([flat + other.flatten().tolist()], [math.floor(fraction * 256)])
    first, second = global_masks([scores, other], share)
    assert first.shape == scores.shape and second.shape == other.shape
    assert first.flatten().tolist() + second.flatten().tolist() == both


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (5, 24), (17, 24)])
def test_patterns(kind: str, pattern: tuple[int, int]) -> None:
    scores = _scores(kind)
    kept, width = pattern
    blocks = scores.reshape(-1, width).tolist()
    expected = _brute(blocks, [width - kept] * len(blocks))
    keep = mask(scores, MaskRule(pattern=pattern))
    assert keep.reshape(-1, width).tolist() == expected
    assert (keep.reshape(-1, width).sum(1) == kept).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_masks_as_a_cpu_does(kind: str) -> None:
    scores, other = _scores(kind), _scores("tied", 4, 10)
    rules = [MaskRule(float(sparsity), group=group) for sparsity in SPARSITIES for group in ("row", "layer")]
    for rule in [*rules, MaskRule(pattern=(2, 4)), MaskRule(pattern=(1, 3)), MaskRule(pattern=(17, 24))]:
        assert torch.equal(mask(scores.cuda(), rule).cpu(), mask(scores, rule)), rule
    found = global_masks([scores.cuda(), other.cuda()], 0.6)
    assert all(map(torch.equal, (keep.cpu() for keep in found), global_masks([scores, other], 0.6)))


def test_counts_are_those_of_the_decimal_number() -> None:
    assert int(100 * 0.29) == 28
    assert removed_count(0.29, 100) == 29
    assert (~mask(torch.randn(3, 100), MaskRule(0.29))).sum(1).tolist() == [29, 29, 29]
    for percent in range(100):
        assert removed_count(percent / 100, 1000) == 10 * percent


def test_ties_lose_the_lower_column_first() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert mask(scores, MaskRule(0.5)).tolist() == [[False, False, True, True], [False, False, True, True]]
    assert mask(scores, MaskRule(pattern=(1, 2))).tolist() == [[True, False, False, True], [False, True, False, True]]
    assert mask(scores, MaskRule(0.25, group="layer")).flatten().tolist() == [False, False] + [True] * 6


def test_a_width_that_m_does_not_divide_is_refused() -> None:
    with pytest.raises(InvalidInput, match="2:4 needs a width that 4 divides"):
        mask(torch.randn(2, 6), MaskRule(pattern=(2, 4)))


def test_global_needs_all_matrices() -> None:
    with pytest.raises(InvalidInput, match="global_masks"):
        mask(torch.randn(2, 6), MaskRule(0.5, group="global"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [MaskRule(0.5), MaskRule(0.5, group="layer"), MaskRule(pattern=(2, 4))])
def test_scores_that_are_not_finite_never_become_a_mask(bad: float, rule: MaskRule) -> None:
    scores = torch.randn(4, 8)
    scores[2, 3] = bad
    with pytest.raises(InvalidCandidate) as refused:
        mask(scores, rule)
    assert refused.value.reason == "NONFINITE"
    with pytest.raises(InvalidCandidate):
        global_masks([torch.randn(2, 2), scores], 0.5)


def test_too_many_tied_rows_are_refused() -> None:
    scores = torch.arange(80.0).view(20, 4)
    scores[0] = 1.0
    assert mask(scores, MaskRule(0.5), max_tied=0.05).sum() == 40
    scores[1, 1:3] = 6.0
    with pytest.raises(InvalidCandidate) as refused:
        mask(scores, MaskRule(0.5), max_tied=0.05)
    assert refused.value.reason == "TIES"
    with pytest.raises(InvalidCandidate):
        mask(scores, MaskRule(pattern=(2, 4)), max_tied=0.05)
    mask(scores, MaskRule(0.5))
    # Equal scores away from the cut are no tie.
    mask(torch.tensor([[0.0, 0.0, 1.0, 2.0]]), MaskRule(0.75), max_tied=0.0)


def test_a_chance_tie_does_not_refuse_a_whole_matrix() -> None:
    scores = torch.arange(100.0).view(10, 10)
    scores[5, 0] = scores[4, 9]
    assert mask(scores, MaskRule(0.5, group="layer"), max_tied=0.05).sum() == 50
    with pytest.raises(InvalidCandidate):
        mask(scores.clamp(40, 60), MaskRule(0.3, group="layer"), max_tied=0.05)


def test_magnitude_of_the_reference_code() -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).abs()
    cut = torch.sort(scores.flatten())[0][int(scores.numel() * 0.5)]
    expected = scores <= cut
    assert torch.equal(threshold_le_mask(scores, 0.5), ~expected)
    assert int(expected.sum()) == 151
    assert int((~mask(scores, MaskRule(0.5, group="layer"))).sum()) == 150


@pytest.mark.parametrize("kind", ["random", "tied", "constant", "signed zeros"])
@pytest.mark.parametrize("counts", [[0, 1, 2, 5, 12, 20, 23, 24, 24], [7] * 9, [24] * 9])
def test_counts_of_their_own_for_every_row(kind: str, counts: list[int]) -> None:
    scores = _scores(kind)
    assert mask_of_counts(scores, torch.tensor(counts)).tolist() == _brute(scores.tolist(), counts)
