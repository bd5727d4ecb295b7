"""SparseGPT against a sweep that inverts the Hessian at every column, and against the best weights for its mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evoprune.fitness.compressors import Compressed, Goal, compress, compress_all, relative_output_error, sparsegpt
from evoprune.fitness.quantisation import Grid
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule

OUT, IN, TOKENS = 16, 48, 512
PATTERNS: list[tuple[int, int] | None] = [None, (2, 4), (1, 4), (2, 3)]


def layer(*, dead: tuple[int, ...] = (), tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """A weight and a Gram matrix whose inputs are correlated and of very different size (pruners.md 0.4)."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=torch.float64)).Q
    sizes = torch.arange(1, IN + 1, dtype=torch.float64) ** -0.4
    inputs = torch.randn(tokens, IN, generator=generator, dtype=torch.float64) * sizes @ rotation.T
    inputs[:, :4] *= 10
    inputs[:, list(dead)] = 0
    weight = torch.randn(OUT, IN, generator=generator) / IN**0.5
    return weight, (inputs.T @ inputs / tokens).float()


def goal_of(pattern: tuple[int, int] | None, removed: int) -> Goal:
    return Goal(removed if pattern is None else OUT * IN * (pattern[1] - pattern[0]) // pattern[1], pattern)


def naive(weight: Tensor, gram: Tensor, goal: Goal, block: int, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
    """Column by column in float64: the inverse of what is left of the Hessian says what a removal costs and how the
    columns to the right make up for it (optimal brain surgeon, with the columns to the left fixed); or a rounding."""
    hessian = gram.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    new, keep = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)

    def inverse(at: int) -> Tensor:
        return hessian[at:, at:].inverse()

    for at in range(IN):
        if goal.pattern is None and at % block == 0:
            last = min(at + block, IN)
            costs = torch.stack([new[:, j] ** 2 / inverse(j)[0, 0] for j in range(at, last)], 1)
            count = goal.removed * last // IN - goal.removed * at // IN
            doomed = costs.flatten().argsort(stable=True)[:count]
            keep[:, at:last] = torch.ones(costs.numel(), dtype=torch.bool).scatter(0, doomed, False).view(costs.shape)
        elif goal.pattern is not None and at % goal.pattern[1] == 0:
            n, m = goal.pattern
            costs = torch.stack([new[:, j] ** 2 / inverse(j)[0, 0] for j in range(at, at + m)], 1)
            keep[:, at : at + m] = costs.argsort(1).argsort(1) >= m - n
        left = inverse(at)
        there = new[:, at : at + 1] if grid is None else grid.nearest(new[:, at : at + 1])
        there = there[:, 0].masked_fill(~keep[:, at], 0)
        error = (new[:, at] - there) / left[0, 0]
        new[:, at:] -= error[:, None] * left[0]
        new[:, at] = there
    return new, keep


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [16, 20, 128])
def test_it_is_the_sweep_step_by_step(
    pattern: tuple[int, int] | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt, "BLOCK", block)
    weight, gram = layer()
    goal = goal_of(pattern, 461)
    expected, keep = naive(weight, gram, goal, block)
    found = compress("sparsegpt", weight, goal, {"H": gram})
    assert torch.equal(found.mask, keep)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_rounding_is_answered_as_removing_is(pattern: tuple[int, int] | None) -> None:
    weight, gram = layer()
    goal, grid = goal_of(pattern, 461), Grid.of(weight.double(), 3)
    expected, keep = naive(weight, gram, goal, sparsegpt.BLOCK, grid)
    found = compress("sparsegpt:bits=3", weight, goal, {"H": gram})
    assert torch.equal(found.mask, keep)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(grid.nearest(found.weight.double()), found.weight.double(), rtol=1e-5, atol=1e-7)


def best_possible(weight: Tensor, gram: Tensor, keep: Tensor) -> float:
    """The error of the weights that fit best on a mask: W H_:K inv(H_KK), row by row."""
    best, hessian = torch.zeros_like(weight, dtype=torch.float64), gram.double()
    for row, kept in enumerate(keep):
        best[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row].double())
    found = relative_output_error(weight, best.float(), gram=gram)
    assert found is not None
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_its_error_lies_between_that_of_the_best_weights_for_its_mask_and_that_of_its_mask_alone(
    pattern: tuple[int, int] | None,
) -> None:
    weight, gram = layer()
    found = compress("sparsegpt", weight, goal_of(pattern, 461), {"H": gram})
    alone = relative_output_error(weight, weight.masked_fill(~found.mask, 0), gram=gram)
    assert found.error is not None and alone is not None
    assert best_possible(weight, gram, found.mask) * (1 - 1e-6) <= found.error < alone


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_it_loses_less_than_wanda(pattern: tuple[int, int] | None) -> None:
    weight, gram = layer()
    scores = weight.abs() * gram.diagonal().sqrt()
    keep = mask(scores, MaskRule(0.5) if pattern is None else MaskRule(None, pattern))
    wanda = compress("mask", weight, Goal.of_mask(keep), {"H": gram}).error
    ours = compress("sparsegpt", weight, goal_of(pattern, OUT * IN // 2), {"H": gram}).error
    assert ours is not None and wanda is not None and ours < wanda


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_once_more_changes_nothing(pattern: tuple[int, int] | None) -> None:
    weight, gram = layer()
    goal = goal_of(pattern, 461)
    once = compress("sparsegpt", weight, goal, {"H": gram}).weight
    assert torch.equal(compress("sparsegpt", once, goal, {"H": gram}).weight, once)


def levels(weight: Tensor, gram: Tensor, counts: list[int]) -> list[Compressed]:
    return list(compress_all("sparsegpt", weight, [Goal(count) for count in counts], {"H": gram}))


def test_just_as_many_weights_go_at_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "BLOCK", 20)
    weight, gram = layer()
    counts = [0, 1, 2, 100, 383, 767, 768]
    for count, found in zip(counts, levels(weight, gram, counts), strict=True):
        assert int((found.weight == 0).sum()) == count
    assert torch.equal(levels(weight, gram, [0])[0].weight, weight)


def test_a_diagonal_hessian_leaves_the_largest_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "BLOCK", 16)
    weight, _ = layer()
    found = compress("sparsegpt", weight, Goal(384), {"H": torch.eye(IN)})
    for begin in range(0, IN, 16):
        block = weight[:, begin : begin + 16]
        cut = block.abs().flatten().sort().values[127]
        assert torch.equal(found.mask[:, begin : begin + 16], block.abs() > cut)
    assert torch.equal(found.weight[found.mask], weight[found.mask])


def test_dead_inputs_lose_their_weights_first_and_change_no_other() -> None:
    dead = (0, 7, 31)
    weight, gram = layer(dead=dead)
    (few, more) = levels(weight, gram, [2 * OUT, 400])
    assert set((~few.mask).nonzero()[:, 1].tolist()) <= set(dead)
    assert few.error == 0
    assert not more.mask[:, list(dead)].any()
    assert more.weight.isfinite().all()
    # A layer that never had these inputs, with the damping that the ones on their places bring.
    alive = [column for column in range(IN) if column not in dead]
    (alone,) = levels(weight[:, alive], gram[alive][:, alive], [400 - 3 * OUT])
    assert more.error == pytest.approx(alone.error, rel=0.02)


def test_fewer_tokens_than_inputs_and_any_unit_will_do() -> None:
    weight, gram = layer(tokens=10)
    assert torch.linalg.matrix_rank(gram) < IN
    found = compress("sparsegpt", weight, Goal(400), {"H": gram})
    again = compress("sparsegpt", weight, Goal(400), {"H": gram * 2.0**-40})
    assert torch.equal(found.weight, again.weight)
    nothing = compress("sparsegpt", weight, Goal(400), {"H": torch.zeros(IN, IN)})
    assert nothing.error == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_went_in(dtype: torch.dtype) -> None:
    weight, gram = layer()
    found = compress("sparsegpt", weight.to(dtype), Goal(400), {"H": gram})
    full = compress("sparsegpt", weight.to(dtype).float(), Goal(400), {"H": gram})
    assert found.weight.dtype == dtype
    assert torch.equal(found.weight, full.weight.to(dtype))
    # The error is that of what is written.
    assert found.error == relative_output_error(weight.to(dtype).float(), found.weight.float(), gram=gram)


def test_a_hessian_that_cannot_be_or_is_missing_is_one_clear_line() -> None:
    weight, gram = layer()
    for statistics, said in (({"H": -gram}, "not positive definite.*more text"), ({}, "reads H, which was not coll")):
        with pytest.raises(InvalidInput, match=said) as refusal:
            compress("sparsegpt", weight, Goal(400), statistics)
        assert "\n" not in str(refusal.value)
