"""What every compressor must hold to, and the mask alone in detail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from evoprune.fitness.compressors import (
    COMPRESSORS,
    AtRunTime,
    Goal,
    Limited,
    compress,
    compress_all,
    relative_output_error,
)
from evoprune.metrics.errors import EvopruneError, InvalidInput, UnknownName

TOKENS, OUT, IN = 200, 16, 32


@pytest.fixture
def inputs() -> torch.Tensor:
    """[TOKENS, IN], correlated."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def keep(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs() > 0.5


@pytest.fixture(params=[name for name in COMPRESSORS if not isinstance(COMPRESSORS[name], AtRunTime)])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def goals_of(name: str, keep: torch.Tensor) -> list[Goal]:
    """As few to remove as the mask says, all, none, and half of every 4 unless the compressor refuses patterns."""
    pairs = (torch.arange(IN) % 4 < 2).expand(OUT, IN)
    goals = [
        Goal.of_mask(keep),
        Goal.of_mask(torch.zeros_like(keep)),
        Goal.of_mask(torch.ones_like(keep)),
        Goal.of_mask(pairs, (2, 4)),
    ]
    plugin = COMPRESSORS[name]
    if isinstance(plugin, Limited):
        plugin.check(OUT, IN, None)
        try:
            plugin.check(OUT, IN, (2, 4))
        except InvalidInput:
            goals.pop()
    return goals if plugin.reads_criterion else [replace(goal, mask=None) for goal in goals]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract(
    name: str, inputs: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor, dtype: torch.dtype
) -> None:
    gram = inputs.T @ inputs / TOKENS
    statistics, dense, goals = {"H": gram, "X_ss": gram.diagonal()[None]}, weight.to(dtype), goals_of(name, keep)
    before, mask_before, gram_before = dense.clone(), keep.clone(), statistics["H"].clone()
    results = list(compress_all(name, dense, goals, statistics))
    assert torch.equal(dense, before)
    assert torch.equal(keep, mask_before)
    assert torch.equal(statistics["H"], gram_before)
    plugin = COMPRESSORS[name]
    for goal, result in zip(goals, results, strict=True):
        assert result.weight.shape == weight.shape
        assert result.weight.dtype == dtype
        assert int((~result.mask).sum()) == goal.removed
        sparse = result.weight if result.factors is None else result.factors.core
        assert torch.equal(sparse[~result.mask], torch.zeros(goal.removed, dtype=dtype))
        assert not plugin.keeps_mask or torch.equal(result.mask, goal.mask)
        assert not plugin.keeps_weights or torch.equal(result.weight[result.mask], dense[result.mask])
        lost = inputs @ (dense.float() - result.weight.float()).T
        assert result.error == pytest.approx(
            (lost.square().sum() / (inputs @ dense.float().T).square().sum()).item(), rel=1e-4, abs=1e-12
        )
        alone = compress(name, dense, goal, statistics)
        assert torch.equal(alone.weight, result.weight)
    assert torch.equal(results[2].weight, dense)


def test_the_mask_alone_changes_no_kept_weight(weight: torch.Tensor, keep: torch.Tensor) -> None:
    result = compress("mask", weight, Goal.of_mask(keep), {})
    assert torch.equal(result.weight[keep], weight[keep])
    assert result.error is None


def test_removed_weights_become_plain_zero() -> None:
    weight = torch.tensor([[float("nan"), -1.0, 2.0]])
    result = compress("mask", weight, Goal.of_mask(torch.tensor([[False, False, True]])), {})
    assert result.weight.tolist() == [[0, 0, 2]]
    assert not result.weight.signbit().any()


def test_error_by_hand() -> None:
    weight, new = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    squares = torch.tensor([[4.0, 1.0]])
    expected = (1 * 4 + 16 * 1) / (1 * 4 + 4 * 1 + 9 * 4 + 16 * 1)
    assert relative_output_error(weight, new, input_squares=squares) == pytest.approx(expected)
    assert relative_output_error(weight, new, gram=squares[0].diag()) == pytest.approx(expected)
    assert relative_output_error(weight, torch.zeros(2, 2), gram=squares[0].diag()) == 1
    assert relative_output_error(weight, weight, input_squares=squares) == 0
    assert relative_output_error(weight, new, input_squares=torch.zeros(2)) == 0
    assert relative_output_error(weight, new) is None


@pytest.mark.parametrize(
    ("weights", "masks", "said"),
    [
        (lambda weight: weight, lambda keep: keep, "outside its mask"),
        (lambda weight: weight / 0, lambda keep: keep, "not finite"),
        (torch.zeros_like, torch.zeros_like, "removed 512 weights and not"),
    ],
)
def test_broken_compressors_are_caught(
    weights: Callable[[torch.Tensor], torch.Tensor],
    masks: Callable[[torch.Tensor], torch.Tensor],
    said: str,
    weight: torch.Tensor,
    keep: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = weights(weight), masks(keep)
    monkeypatch.setattr(COMPRESSORS["mask"], "compress", lambda _, goals, given: (made for _ in goals), raising=False)
    with pytest.raises(EvopruneError, match=said):
        compress("mask", weight, Goal.of_mask(keep), {})


def test_a_pattern_that_is_left_is_caught(weight: torch.Tensor) -> None:
    other = (torch.arange(IN) < IN // 2).expand(OUT, IN)
    with pytest.raises(EvopruneError, match="left the pattern 2:4"):
        compress("mask", weight, Goal(OUT * IN // 2, (2, 4), other), {})


def test_unknown_name(weight: torch.Tensor, keep: torch.Tensor) -> None:
    with pytest.raises(UnknownName, match="no compressor 'masc'; did you mean 'mask'"):
        compress("masc", weight, Goal.of_mask(keep), {})
