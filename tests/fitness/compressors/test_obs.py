"""Surgery row by row against the same steps by brute force: every removal solved anew, every rounding inverted anew."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from evoprune.fitness import row_surgery
from evoprune.fitness.compressors import Goal, compress, compress_all, relative_output_error
from evoprune.fitness.gram import damped
from evoprune.fitness.quantisation import Grid
from evoprune.fitness.removal_order import Problem
from evoprune.fitness.row_surgery import after_removals, removals
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule
from tests.fitness.compressors.test_refit import solved
from tests.layers import synthetic_layer


def problem_of(weight: Tensor, gram: Tensor) -> Problem:
    return Problem.of(weight, gram.double())


def lost(row: Tensor, kept: list[int], hessian: Tensor) -> float:
    """Half the squared output error of a row that has the best weights on some columns."""
    keep = torch.zeros(len(row), dtype=torch.bool)
    keep[kept] = True
    gone = row - solved(row[None], keep[None], hessian)[0]
    return (gone @ hessian @ gone).item() / 2


def greedy(row: Tensor, hessian: Tensor, pattern: tuple[int, int] | None) -> tuple[list[int], list[float]]:
    """Every removal that may be tried at every step, with the best weights on all that would be left."""
    left, order, losses, before = list(range(len(row))), [], [], 0.0
    n, m = pattern or (0, len(row))
    while True:
        may = [column for column in left if sum(other // m == column // m for other in left) > n]
        if not may:
            return order, losses
        after = {column: lost(row, [other for other in left if other != column], hessian) for column in may}
        best = min(may, key=lambda column: after[column])
        left.remove(best)
        order.append(best)
        losses.append(after[best] - before)
        before = after[best]


@pytest.mark.parametrize(("width", "pattern"), [(6, None), (8, None), (8, (2, 4)), (8, (1, 4)), (6, (2, 3))])
def test_order_and_losses_are_those_of_single_removals(width: int, pattern: tuple[int, int] | None) -> None:
    weight, gram = synthetic_layer(1.0, out=5, width=width, tokens=50)
    problem = problem_of(weight, gram)
    found = removals(problem, pattern)
    for row, columns, losses in zip(problem.weight, found.columns, found.losses, strict=True):
        order, expected = greedy(row, problem.hessian, pattern)
        assert columns.tolist() == order
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("group", ["row", "layer"])
def test_on_eight_columns_it_is_the_greedy_choice_of_all_rows(group: str) -> None:
    weight, gram = synthetic_layer(1.0, out=5, width=8, tokens=50)
    hessian = problem_of(weight, gram).hessian
    rows = [greedy(row, hessian, None) for row in weight.double()]
    steps = sorted((loss, row) for row, (_, losses) in enumerate(rows) for loss in losses)
    goals = [Goal(removed, group=group) for removed in (0, 5, 20, 25, 40)]  # type: ignore[arg-type]
    for goal, found in zip(goals, compress_all("obs", weight, goals, {"H": gram}), strict=True):
        keep = torch.ones_like(weight, dtype=torch.bool)
        for at, (order, _) in enumerate(rows):
            share = goal.removed // 5 if group == "row" else sum(row == at for _, row in steps[: goal.removed])
            keep[at, order[:share]] = False
        assert torch.equal(found.mask, keep)
        torch.testing.assert_close(found.weight.double(), solved(weight, keep, hessian), rtol=1e-4, atol=1e-6)


def test_greed_is_not_far_from_the_best_of_all_masks() -> None:
    weight, gram = synthetic_layer(1.0, out=5, width=8, tokens=50)
    hessian = problem_of(weight, gram).hessian
    best = sum(min(lost(row, list(kept), hessian) for kept in combinations(range(8), 4)) for row in weight.double())
    found = compress("obs", weight, Goal(20, group="row"), {"H": gram}).weight.double()
    ours = ((weight - found) @ hessian * (weight - found)).sum().item() / 2
    assert best * (1 - 1e-6) <= ours < 1.3 * best


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_weights_are_the_refit_of_their_mask_whatever_fits_in_memory(
    pattern: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = synthetic_layer(1.5, out=7, width=120)
    goals = [Goal(420, pattern)] if pattern else [Goal(count) for count in (1, 400, 700, 840)]
    found = list(compress_all("obs", weight, goals, {"H": gram}))
    for made in found:
        expected = solved(weight, made.mask, problem_of(weight, gram).hessian)
        assert (made.weight - expected).norm() <= 1e-4 * expected.norm()
    monkeypatch.setattr(row_surgery, "_BYTES", 3 * 8 * 120 * 120)
    monkeypatch.setattr(row_surgery, "_STEPS", 7)
    for made, other in zip(found, compress_all("obs", weight, goals, {"H": gram}), strict=True):
        assert torch.equal(made.mask, other.mask)
        torch.testing.assert_close(made.weight, other.weight)


def test_goals_of_several_patterns_come_back_in_their_order() -> None:
    weight, gram = synthetic_layer(out=5, width=24, tokens=100)
    goals = [Goal(60, (2, 4)), Goal(30), Goal(90, (1, 4)), Goal(100), Goal(60, (2, 4))]
    found = list(compress_all("obs", weight, goals, {"H": gram}))
    for goal, made in zip(goals, found, strict=True):
        assert torch.equal(made.weight, compress("obs", weight, goal, {"H": gram}).weight)


def test_counts_of_each_row_are_met() -> None:
    weight, gram = synthetic_layer(out=5, width=24, tokens=100)
    problem, counts = problem_of(weight, gram), torch.tensor([[0, 1, 7, 23, 24]])
    new, keep = after_removals(weight, problem, removals(problem), counts)
    assert (~keep[0]).sum(1).tolist() == counts[0].tolist()
    assert torch.equal(new[0, 0], weight[0])


def rounded(row: Tensor, keep: Tensor, hessian: Tensor, scale: float, zero: float, top: int) -> Tensor:
    """A row on its grid, with the inverse made anew at every step (OBC, section 5)."""
    row, free = row.clone(), keep.nonzero()[:, 0].tolist()

    def errors() -> Tensor:
        at = row[free]
        return scale * (((at / scale).round() + zero).clamp(0, top) - zero) - at

    while free:
        inverse, error = torch.linalg.inv(hessian[free][:, free]), errors()
        beyond = error.abs() > scale / 2 + 1e-9
        place = int(torch.where(beyond, error.abs(), -1).argmax()) if beyond.any() else int(
            (error**2 / inverse.diagonal()).argmin()
        )  # fmt: skip
        row[free] += inverse[:, place] * error[place] / inverse[place, place]
        free.pop(place)
    return row


@pytest.mark.parametrize("spelled", ["obq:bits=3", "obq:bits=2,symmetric=true"])
def test_rounding_step_by_step(spelled: str) -> None:
    weight, gram = synthetic_layer(1.0, out=6, width=40, tokens=200)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > torch.linspace(0, 1, 6)[:, None]
    hessian = problem_of(weight, gram).hessian
    start = solved(weight, keep, hessian)
    bits, symmetric = int(spelled[9]), "symmetric" in spelled
    grid = Grid.of(start, bits, symmetric=symmetric)
    made = compress(spelled, weight, Goal.of_mask(keep), {"H": gram})
    for row, kept in enumerate(keep):
        expected = rounded(start[row], kept, hessian, grid.scale[row].item(), grid.zero[row].item(), grid.top)
        torch.testing.assert_close(made.weight[row].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grid.nearest(made.weight.double()), made.weight.double(), rtol=1e-5, atol=1e-7)


def test_more_bits_lose_less_and_all_of_them_less_than_rounding_alone() -> None:
    weight, gram = synthetic_layer(0.8, out=16)
    keep = mask(weight.abs() * gram.diagonal().sqrt(), MaskRule(0.5))
    refitted = compress("refit", weight, Goal.of_mask(keep), {"H": gram})
    assert refitted.error is not None
    for name in ("obq", "awp", "sparsegpt"):
        goal = Goal(int((~keep).sum()), mask=keep)
        errors = []
        for bits in (2, 3, 4, 8):
            found = compress(f"{name}:bits={bits}", weight, goal, {"H": gram})
            assert found.error is not None
            assert max(len(row.unique()) for row in found.weight) <= 2**bits  # 0 is on the grid
            errors.append(found.error)
            if name != "sparsegpt":
                nearest = Grid.of(refitted.weight, bits).nearest(refitted.weight)
                alone = relative_output_error(weight, nearest.masked_fill(~keep, 0), gram=gram)
                assert alone is not None and (bits == 8 or found.error < alone)
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1.3 * refitted.error


def test_hessians_that_are_not_damped_enough_for_the_first_try() -> None:
    weight, gram = synthetic_layer(out=5, width=24, tokens=100)
    spoiled = gram - (torch.linalg.eigvalsh(gram)[0] + 0.05 * gram.diagonal().mean()) * torch.eye(24)
    assert torch.linalg.eigvalsh(damped(spoiled))[0] < 0 < torch.linalg.eigvalsh(damped(spoiled, 0.1))[0]
    for name in ("obs", "admm", "sparsegpt"):
        assert compress(name, weight, Goal(60), {"H": spoiled}).weight.isfinite().all()
