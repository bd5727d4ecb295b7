"""Masked least squares by conjugate gradients against a dense solution of every row."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from evoprune.fitness.compressors import Goal, compress, relative_output_error
from evoprune.fitness.gram import damped
from evoprune.fitness.masked_refit import refit
from tests.layers import synthetic_layer


def solved(weight: Tensor, keep: Tensor, hessian: Tensor) -> Tensor:
    """Row by row in float64: the best weights on the columns that stay."""
    new, wide = torch.zeros_like(weight, dtype=torch.float64), hessian.double()
    for row, kept in enumerate(keep):
        new[row, kept] = torch.linalg.solve(wide[kept][:, kept], wide[kept] @ weight[row].double())
    return new


@pytest.mark.parametrize("decay", [0.3, 0.8, 1.5])
def test_it_is_the_dense_solution_of_every_row(decay: float) -> None:
    weight, gram = synthetic_layer(decay, out=24)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > torch.linspace(0, 1, 24)[:, None]
    assert keep[0].all() and not keep[-1].any()
    hessian = damped(gram)
    expected = solved(weight, keep, hessian)
    found = refit(weight, keep, hessian)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(found[0], weight[0])
    made = compress("refit", weight, Goal.of_mask(keep), {"H": gram})
    assert made.error == pytest.approx(relative_output_error(weight, expected.float(), gram=gram), rel=1e-4)
    assert torch.equal(made.mask, keep)


def test_no_step_raises_the_error() -> None:
    weight, gram = synthetic_layer(1.5)
    keep, hessian = weight.abs() > weight.abs().median(), damped(gram)
    steps = [0, 1, 2, 3, 5, 8, 10, 20, 200]
    errors = [relative_output_error(weight, refit(weight, keep, hessian, step), gram=hessian) for step in steps]
    assert all(after <= before for before, after in itertools.pairwise(errors))  # type: ignore[operator]
    assert errors[-2] == pytest.approx(errors[-1], rel=1e-2)
    for step in (1, 10):
        found = compress(f"refit:steps={step}", weight, Goal.of_mask(keep), {"H": gram / gram.diagonal().mean()})
        assert found.error == pytest.approx(
            relative_output_error(weight, refit(weight, keep, hessian, step), gram=gram), rel=1e-3
        )


def test_damping_pulls_towards_the_weights_as_they_were() -> None:
    weight, gram = synthetic_layer(tokens=60)  # fewer than inputs
    keep = weight.abs() > weight.abs().median()
    moved = [
        (compress(f"refit:damping={damping}", weight, Goal.of_mask(keep), {"H": gram}).weight - weight)[keep].norm()
        for damping in (0.001, 0.01, 0.1, 1)
    ]
    assert moved == sorted(moved, reverse=True)
