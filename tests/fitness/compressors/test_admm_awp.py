"""What splitting and projected descent must hold to beyond the contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from evoprune.fitness.compressors import Goal, compress, relative_output_error
from evoprune.fitness.compressors.awp import _Descent
from evoprune.fitness.gram import damped
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule
from tests.fitness.compressors.test_refit import solved
from tests.layers import synthetic_layer


def wanda(weight: Tensor, gram: Tensor, target: float | tuple[int, int]) -> Goal:
    rule = MaskRule(None, target) if isinstance(target, tuple) else MaskRule(target)
    return Goal.of_mask(mask(weight.abs() * gram.diagonal().sqrt(), rule), rule.pattern)


@pytest.mark.parametrize("target", [0.5, 0.7, (2, 4), (1, 4)], ids=str)
@pytest.mark.parametrize("decay", [0.8, 1.5])
def test_splitting_finds_a_better_mask_than_wanda(decay: float, target: float | tuple[int, int]) -> None:
    weight, gram = synthetic_layer(decay)
    goal = wanda(weight, gram, target)
    ours = compress("admm", weight, Goal(goal.removed, goal.pattern, group="row"), {"H": gram})
    refitted = compress("refit", weight, goal, {"H": gram})
    assert ours.error is not None and refitted.error is not None and ours.error < refitted.error
    # It ends with the best weights on its mask.
    expected = solved(weight, ours.mask, damped(gram))
    assert ours.error == pytest.approx(relative_output_error(weight, expected.float(), gram=gram), rel=1e-3)


def test_of_inputs_that_have_nothing_in_common_the_largest_products_stay() -> None:
    weight, _ = synthetic_layer(out=8, width=32)
    gram = torch.linspace(0.5, 2, 32).diag()
    goal = wanda(weight, gram, 0.5)
    for name, asked in (("admm", Goal(goal.removed, group="row")), ("awp", goal), ("obs", Goal(128, group="row"))):
        found = compress(f"{name}:damping=0", weight, asked, {"H": gram})
        assert torch.equal(found.mask, goal.mask)
        torch.testing.assert_close(found.weight, weight.masked_fill(~found.mask, 0))


@pytest.mark.parametrize("target", [0.6, (2, 4)], ids=str)
def test_no_step_down_raises_the_error(target: float | tuple[int, int]) -> None:
    weight, gram = synthetic_layer(1.5)
    goal = wanda(weight, gram, target)
    descent, hessian = _Descent(weight, gram, 0.01), damped(gram)
    errors = []
    for steps in (1, 2, 3, 5, 10, 30, 100):
        new = descent.pruned(goal, steps, 0).new
        errors.append(relative_output_error(weight, new, gram=hessian))
    assert all(after <= before for before, after in itertools.pairwise(errors))  # type: ignore[operator]
    # One step by hand, from the mask, in inputs of the same size.
    assert goal.mask is not None
    sizes = hessian.double().diagonal().sqrt()
    scaled = hessian.double() / sizes / sizes[:, None]
    dense, start = weight * sizes, weight.masked_fill(~goal.mask, 0) * sizes
    values = start + (dense - start) @ scaled / torch.linalg.eigvalsh(scaled)[-1]
    rule = MaskRule(None, target) if isinstance(target, tuple) else MaskRule(target)
    keep = mask(values.abs().float(), rule)
    first = descent.pruned(goal, 1, 0)
    assert torch.equal(first.keep, keep)
    torch.testing.assert_close(first.new.double(), values.masked_fill(~keep, 0) / sizes, rtol=1e-4, atol=1e-6)


def test_rows_keep_the_counts_of_the_mask() -> None:
    weight, gram = synthetic_layer(out=8, width=32, tokens=200)
    goal = Goal.of_mask(mask(weight.abs() * gram.diagonal().sqrt(), MaskRule(0.5, None, "layer")))
    assert goal.mask is not None
    for spelled in ("awp", "awp:ramp=20", "awp:bits=3", "awp:bits=3,width=10,ramp=7"):
        found = compress(spelled, weight, goal, {"H": gram})
        assert torch.equal(found.mask.sum(1), goal.mask.sum(1))


@pytest.mark.parametrize("target", [0.5, (2, 4)], ids=str)
def test_rounding_and_pruning_together_end_on_evenly_spaced_values(target: float | tuple[int, int]) -> None:
    """Every group of columns of a row: at most 2^bits values, all whole multiples of one step, and the exact count."""
    weight, gram = synthetic_layer(out=8, width=32, tokens=200)
    goal = wanda(weight, gram, target)
    found = compress("awp:bits=3,width=16,ramp=5,rounded_steps=10", weight, goal, {"H": gram})
    assert int((~found.mask).sum()) == goal.removed
    for group in found.weight.double().view(-1, 16):
        values = torch.cat([group, group.new_zeros(1)]).unique()
        assert len(values) <= 2**3
        reach = (values[-1] - values[0]).item()
        # The step is the reach over a whole number below 2^bits.
        assert any(
            torch.allclose(values * part / reach, (values * part / reach).round(), atol=1e-5) for part in range(1, 2**3)
        )


def test_a_ramp_finds_a_better_mask_than_it_was_given() -> None:
    weight, gram = synthetic_layer()
    goal = wanda(weight, gram, 0.7)
    plain, ramp = (compress(spelled, weight, goal, {"H": gram}).error for spelled in ("awp", "awp:ramp=50"))
    assert plain is not None and ramp is not None and ramp < 0.95 * plain
