"""Orders of removal and refits against brute force, least squares and the published loop, one removal at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from evoprune.fitness.gram import damped, damped_cholesky
from evoprune.fitness.refit import Factor, zero_error
from evoprune.fitness.removal_order import Problem, balanced_order, column_order, group_order
from evoprune.metrics.errors import EvopruneError

OUT = 7


def layer(width: int, *, out: int = OUT, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A matrix and the Gram matrix of inputs that say much the same."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=draw, dtype=torch.float64)
    inputs = torch.randn(8 * width, width, generator=draw, dtype=torch.float64) * torch.arange(1, width + 1) ** -0.6
    inputs = inputs @ torch.linalg.qr(mixed).Q
    return torch.randn(out, width, generator=draw, dtype=torch.float64).to(dtype), (inputs.T @ inputs).to(dtype)


def problem_of(width: int, **more: int) -> Problem:
    return Problem.of(*layer(width, **more))


def best(problem: Problem, kept: Tensor) -> tuple[Tensor, float]:
    """The least-squares weight on these columns, by a library that knows nothing of Cholesky, and its error."""
    root = torch.linalg.cholesky(problem.hessian.double()).T  # inputs whose Gram matrix H is
    weight = problem.weight.double()
    solved = torch.linalg.lstsq(root[:, kept], root @ weight.T).solution.T
    change = weight.clone()
    change[:, kept] -= solved
    return solved, torch.trace(change @ problem.hessian.double() @ change.T).item()


def published(
    problem: Problem, choose: Callable[[Tensor, Tensor, list[int]], list[int]], stay: int
) -> tuple[list[int], float, Tensor]:
    """(order, accumulated scores, weight) of the loop as DarwinLM's paper has it, with a full inverse throughout."""
    weight, inverse = problem.weight.double().clone(), torch.linalg.inv(problem.hessian.double())
    left, order, total = list(range(weight.shape[1])), [], 0.0
    while len(left) > stay:
        gone = choose(weight, inverse, left)
        block = torch.linalg.inv(inverse[gone][:, gone])
        total += torch.trace(weight[:, gone] @ block @ weight[:, gone].T).item()
        weight = weight - weight[:, gone] @ block @ inverse[gone]
        inverse = inverse - inverse[:, gone] @ block @ inverse[gone]
        weight[:, gone] = 0
        left = [column for column in left if column not in gone]
        order += gone
    return order, total, weight


def cheapest(size: int) -> Callable[[Tensor, Tensor, list[int]], list[int]]:
    def choose(weight: Tensor, inverse: Tensor, left: list[int]) -> list[int]:
        def score(gone: list[int]) -> float:
            return torch.trace(weight[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ weight[:, gone].T).item()

        return min((left[at : at + size] for at in range(0, len(left), size)), key=score)

    return choose


@pytest.mark.parametrize("width", [24, 63])
def test_one_column_at_a_time_is_the_published_loop(width: int) -> None:
    problem = problem_of(width)
    for stay in (0, 1, width // 3, width - 1):
        order, total, weight = published(problem, cheapest(1), stay)
        found = column_order(problem, share=0)
        assert found[: len(order)].tolist() == order
        factor = Factor.of(problem, found.flip(0))
        kept = found[width - stay :].sort().values
        assert torch.allclose(factor.weight(stay), weight[:, kept], atol=1e-10)
        assert factor.errors(zero_error(problem))[stay].item() * zero_error(problem).item() == pytest.approx(total)


@pytest.mark.parametrize("size", [2, 8])
def test_groups_are_the_published_loop(size: int) -> None:
    problem = problem_of(32)
    order, _, weight = published(problem, cheapest(size), 2 * size)
    found = group_order(problem, size)
    assert found[:-2].repeat_interleave(size).mul(size).tolist() == [at - at % size for at in order]
    kept = [column for column in range(32) if column // size in found[-2:].tolist()]
    assert torch.allclose(Factor.of(problem, torch.arange(32)).refit(kept), weight[:, kept], atol=1e-10)


def test_balanced_groups_by_hand() -> None:
    """Four sets of three groups of two columns: each set loses its cheapest, and all of them at once."""
    problem = problem_of(24)

    def choose(weight: Tensor, inverse: Tensor, left: list[int]) -> list[int]:
        quarter = len(left) // 4
        sets = [left[at : at + quarter] for at in range(0, len(left), quarter)]
        return [column for one in sets for column in cheapest(2)(weight, inverse, one)]

    order, _, _ = published(problem, choose, 0)
    found = balanced_order(problem, 4, 2)
    assert found.shape == (4, 3)
    assert found.T.reshape(-1).tolist() == [column // 2 for column in order[::2]]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_every_width_is_the_least_squares_solution(dtype: torch.dtype, within: float) -> None:
    problem = Problem.of(*layer(256, out=16, dtype=dtype))
    factor = Factor.of(problem, column_order(problem).flip(0))
    stored = Factor(factor.order, factor.lower.to(dtype), factor.target.to(dtype))
    errors = factor.errors(zero_error(problem))
    assert errors[0] == 1 and errors[-1].item() == pytest.approx(0, abs=1e-12) and bool((errors.diff() <= 0).all())
    for width in (1, 2, 77, 128, 255, 256):
        kept = factor.order[:width].sort().values
        solved, error = best(problem, kept)
        for found in (stored.weight(width), stored.refit(kept.tolist())):
            assert found.dtype == dtype
            assert ((found - solved).norm() / solved.norm()).item() < within
        assert errors[width].item() * zero_error(problem).item() == pytest.approx(error, rel=1e-4, abs=1e-9)
    kept = torch.arange(3, 200, 5)
    solved, _ = best(problem, kept)
    assert ((stored.refit(kept.tolist()) - solved).norm() / solved.norm()).item() < within
    assert stored.refit([]).shape == stored.weight(0).shape == (16, 0)


def test_the_first_to_go_is_the_cheapest_of_all() -> None:
    problem = problem_of(8)
    assert column_order(problem, share=0)[0] == min(range(8), key=lambda at: best(problem, without(8, [at]))[1])
    pairs = [[at, at + 1] for at in range(0, 8, 2)]
    assert group_order(problem, 2)[0] == min(range(4), key=lambda at: best(problem, without(8, pairs[at]))[1])
    # Greedy is not best, and not far from it.
    greedy = best(problem, column_order(problem)[4:].sort().values)[1]
    every = [best(problem, torch.tensor(kept))[1] for kept in combinations(range(8), 4)]
    assert min(every) * (1 - 1e-12) <= greedy < sorted(every)[len(every) // 10]


def without(width: int, gone: list[int]) -> Tensor:
    return torch.tensor([column for column in range(width) if column not in gone])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounds_lose_next_to_nothing(dtype: torch.dtype) -> None:
    problem = Problem.of(*layer(200, out=50, dtype=dtype))
    exact, rounds = (
        Factor.of(problem, column_order(problem, share).flip(0)).errors(zero_error(problem)) for share in (0, 0.05)
    )
    assert sorted(column_order(problem).tolist()) == list(range(200))
    assert bool((rounds[20:180] <= 1.03 * exact[20:180]).all())


def test_of_two_that_can_stand_in_for_each_other_one_stays() -> None:
    weight, gram = layer(20)
    twins = torch.arange(20).repeat(2)
    problem = Problem.of(weight[:, twins], gram[twins][:, twins])
    # Half of them in one round, by scores at its beginning, would take both.
    order = column_order(problem, share=0.5)
    assert sorted((order[20:] % 20).tolist()) == list(range(20))
    assert Factor.of(problem, order.flip(0)).errors(zero_error(problem))[20] < 1e-2


@pytest.mark.parametrize("fails_at", [1, 7])
def test_an_inverse_spoiled_by_rounding_is_made_anew(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of it that has no factor gives the same order as one that has."""
    problem = problem_of(48)

    def orders() -> list[Tensor]:
        return [column_order(problem), group_order(problem, 2), balanced_order(problem, 4, 2)]

    expected, factorise, calls = orders(), torch.linalg.cholesky_ex, 0

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        factor, failed = factorise(matrix)
        return (factor * float("nan"), failed + 1) if calls % 10 == fails_at else (factor, failed)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    assert all(map(torch.equal, orders(), expected))
    assert calls > 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inputs_that_are_always_zero_go_first(dtype: torch.dtype) -> None:
    weight, gram = layer(30, dtype=dtype)
    dead = [0, 7, 8, 21, 22, 23]
    gram[dead] = 0
    gram[:, dead] = 0
    gram *= 1e-9  # their 1 on the diagonal must not weigh more than what is alive
    problem = Problem.of(weight, gram)
    order = column_order(problem)
    assert order[: len(dead)].tolist() == dead
    assert group_order(problem, 3)[0] == 7
    factor = Factor.of(problem, order.flip(0))
    assert factor.weight(30).isfinite().all()
    assert not factor.weight(30)[:, dead].any()
    assert factor.errors(zero_error(problem))[24].item() == pytest.approx(0, abs=1e-12)
    nothing = Problem.of(weight, torch.zeros_like(gram))
    assert column_order(nothing).tolist() == list(range(30))
    assert not Factor.of(nothing, torch.arange(30)).errors(zero_error(nothing)).any()


def test_damping_grows_until_it_works() -> None:
    weight, gram = layer(12)
    assert Problem.of(weight, gram).damping == 0.01
    # What rounding can make of a Gram matrix: one direction with less than nothing.
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -0.05 * gram.diagonal().mean()
    spoiled = vectors * values @ vectors.T
    problem = Problem.of(weight, spoiled)
    assert problem.damping == damped_cholesky(spoiled)[1] == 0.1
    mean = spoiled.diagonal().mean()
    assert torch.allclose(problem.hessian * mean, damped(spoiled, 0.1))
    for hopeless in (gram - 3 * torch.eye(12) * gram.diagonal().mean(), gram * float("nan")):
        with pytest.raises(EvopruneError, match="12 inputs is not positive definite, even damped"):
            Problem.of(weight, hopeless)
