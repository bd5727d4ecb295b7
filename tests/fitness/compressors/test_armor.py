"""ARMOR: it begins as NoWag, no step loses more, groups are those of brute force, the layer says what it merges to."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.compressors import Goal, compress
from evoprune.fitness.compressors.armor import Armor, Fit
from evoprune.fitness.factored import FactoredLinear, Factors
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, Site

OUT, IN = 24, 32
PATTERNS: list[tuple[int, int] | None] = [(2, 4), (1, 4), (4, 8), None]


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(OUT, IN, generator=generator) * torch.rand(IN, generator=generator)


@pytest.fixture
def squares() -> Tensor:
    return torch.rand(1, IN, generator=torch.Generator().manual_seed(1)) + 0.1


def goal_of(pattern: tuple[int, int] | None) -> Goal:
    return Goal(OUT * IN // 2 if pattern is None else OUT * IN * (pattern[1] - pattern[0]) // pattern[1], pattern)


def started(weight: Tensor, squares: Tensor, pattern: tuple[int, int] | None, **settings: int) -> Fit:
    normal = weight / (weight.norm(dim=0) + 1e-5)
    normal = normal / (normal.norm(dim=1, keepdim=True) + 1e-5)
    return Armor(**settings).started(normal.double(), squares[0].double(), goal_of(pattern))


def test_it_begins_as_nowag(weight: Tensor, squares: Tensor) -> None:
    core, keep, left, right = next(Armor(rounds=0).compress(weight, [goal_of((2, 4))], {"X_ss": squares}))  # type: ignore[misc]
    columns = weight.norm(dim=0) + 1e-5
    rows = (weight / columns).norm(dim=1, keepdim=True) + 1e-5
    expected = mask((weight / columns / rows).square() * squares, MaskRule(None, (2, 4)))
    assert torch.equal(keep, expected)
    torch.testing.assert_close(Factors(core, left, right).merged(), weight * expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_step_loses_more_and_the_pattern_holds(
    weight: Tensor, squares: Tensor, pattern: tuple[int, int] | None
) -> None:
    fit = started(weight, squares, pattern)
    losses, counts = [fit.loss()], int(fit.live.sum())
    per_group = fit.live.unflatten(3, (-1, fit.group)).sum(4)
    for _ in range(4):
        for step in (Fit.with_left, Fit.with_right, Fit.with_values, Fit.with_supports):
            fit = step(fit)
            losses.append(fit.loss())
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]
    assert int(fit.live.sum()) == counts
    assert torch.equal(fit.live.unflatten(3, (-1, fit.group)).sum(4), per_group)
    assert not fit.core[~fit.live].any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_ends_below_the_mask_that_it_began_with(
    weight: Tensor, squares: Tensor, pattern: tuple[int, int] | None
) -> None:
    statistics = {"X_ss": squares, "H": squares[0].diag()}
    found = compress("armor", weight, goal_of(pattern), statistics)
    _, keep, *_ = next(Armor(rounds=0).compress(weight, [goal_of(pattern)], statistics))
    start = weight * keep
    lost = ((weight - start).square() * squares).sum() / (weight.square() * squares).sum()
    assert found.error is not None and found.error < lost
    assert found.factors is not None
    assert torch.equal(found.weight, found.factors.merged())
    assert int((found.weight == 0).sum()) == 0


def test_wrappers_are_the_best_there_are(weight: Tensor, squares: Tensor) -> None:
    """Against gradients: none is left on A after its step, nor on B after its."""
    fit = started(weight, squares, (2, 4))
    for step, name in ((Fit.with_left, "left"), (Fit.with_right, "right")):
        fit = step(fit)
        wrapper = getattr(fit, name).clone().requires_grad_(True)
        moved = replace(fit, **{name: wrapper})
        lost = (moved._error().square() * fit.squares[:, None]).sum()
        assert torch.autograd.grad(lost, wrapper)[0].abs().max() < 1e-3 * lost.detach()


def test_a_group_gets_the_best_support_of_all(weight: Tensor, squares: Tensor) -> None:
    """One tile of one row: every support of every group is tried, and solved by least squares."""
    generator = torch.Generator().manual_seed(2)
    fit = replace(
        Armor().started(weight[:1, :8].double(), squares[0, :8].double(), Goal(4)),
        left=torch.full((1, 1, 1), 1.3, dtype=torch.float64),
        right=torch.randn(1, 8, 8, generator=generator, dtype=torch.float64),
    )
    live = fit.live.view(2, 4)
    root = fit.squares[0].sqrt()
    tries = []
    for group in range(2):
        for support in combinations(range(4), int(live[group].sum())):
            core = fit.core.view(2, 4).clone()
            core[group] = 0
            target = ((fit.target.view(8) - 1.3 * core.view(8) @ fit.right[0]) * root)[:, None]
            rows = (1.3 * fit.right[0].view(2, 4, 8)[group, list(support)] * root).T
            core[group, list(support)] = torch.linalg.lstsq(rows, target).solution[:, 0]
            tried = replace(fit, core=core.view(fit.core.shape))
            tries.append((tried.loss(), core))
    expected = min(tries, key=lambda tried: tried[0])
    found = fit.with_supports()
    assert found.loss() == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found.core.view(2, 4), expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_says_what_the_merged_matrix_says(weight: Tensor, squares: Tensor, bias: bool) -> None:
    found = compress("armor", weight, goal_of((2, 4)), {"X_ss": squares})
    dense = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    layer = FactoredLinear.of(SiteModule(Site("a", "a", 0, 1, OUT, IN), dense, False), found.factors)  # type: ignore[arg-type]
    dense.weight.copy_(found.weight)
    inputs = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(inputs), dense(inputs), rtol=1e-5, atol=1e-5)
    assert layer.widths == (8, 8)
    assert int((layer.weight.view(OUT, -1, 4) != 0).sum(2).max()) == 2


def test_planted_wrappers_are_found() -> None:
    """A matrix that is a 2:4 core in wrappers is told from its neighbours: nearly nothing of it is lost."""
    generator = torch.Generator().manual_seed(4)
    core = torch.randn(32, 32, generator=generator)
    core *= mask(core.abs(), MaskRule(None, (2, 4)))
    left, right = (torch.eye(8) + 0.2 * torch.randn(4, 8, 8, generator=generator) for _ in range(2))
    planted = Factors(core, left, right).merged()
    squares = torch.ones(1, 32)
    found = compress("armor", planted, Goal(512, (2, 4)), {"X_ss": squares, "H": torch.eye(32)})
    alone = mask(planted.abs(), MaskRule(None, (2, 4)))
    lost = ((planted * ~alone).square().sum() / planted.square().sum()).item()
    assert found.error is not None and found.error < 0.1 * lost


def test_what_it_cannot_do(weight: Tensor, squares: Tensor) -> None:
    with pytest.raises(InvalidInput, match="every support of 16 columns: give a pattern N:M with M up to 8"):
        compress("armor", weight, goal_of((8, 16)), {"X_ss": squares})
    with pytest.raises(InvalidInput, match="blocks of 16 do not fit 24 × 32 in groups of 4: give a multiple of 4 that"):
        next(Armor(block=16).compress(weight, [goal_of((2, 4))], {"X_ss": squares}))
