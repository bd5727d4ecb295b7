"""COMP against brute force: what a column is worth, what the tuned mask is, and what becomes of a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evoprune.fitness.methods import GONE, Evidence, ModelEdit, configured
from evoprune.fitness.methods.comp import CompMethod, mask_equations, removal_errors, tuned_mask
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.removal_order import Problem
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from tests.models import random_windows, tiny_language_model

WINDOWS = random_windows(6, 24)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edit_of(language_model: LanguageModel, sparsity: float, method: CompMethod) -> ModelEdit:
    return method.edit(Evidence(language_model, find_units(language_model), WINDOWS, sparsity))


def products(inputs: Tensor, weight: Tensor, columns: list[int]) -> Tensor:
    """[tokens * out, columns]: what each column gives to each output."""
    return torch.stack([torch.outer(inputs[:, at], weight[:, at]).flatten() for at in columns], dim=1)


def test_a_column_is_worth_the_error_of_the_best_refit() -> None:
    """Brute force: solve for the other columns, and measure."""
    weight, inputs = drawn(5, 8), drawn(40, 8, seed=1) @ drawn(8, 8, seed=2)
    problem = Problem.of(weight, inputs.T @ inputs / 40)
    for columns in ([*range(8)], [1, 3, 4, 6]):
        errors = []
        hessian, dense = problem.hessian[columns][:, columns], weight[:, columns]
        for gone in range(len(columns)):
            kept = [at for at in range(len(columns)) if at != gone]
            refit = torch.zeros_like(dense)
            refit[:, kept] = torch.linalg.solve(hessian[kept][:, kept], (dense @ hessian)[:, kept].T).T
            errors.append(torch.trace((dense - refit) @ hessian @ (dense - refit).T))
        assert torch.allclose(removal_errors(problem, columns), torch.stack(errors), rtol=1e-8)


def test_the_mask_is_one_where_nothing_is_gone() -> None:
    inputs = drawn(30, 6)
    found = tuned_mask(mask_equations(drawn(4, 6, seed=1), inputs.T @ inputs), range(6), 1e-3)
    assert torch.allclose(found, torch.ones(6, dtype=torch.float64), atol=1e-12)


def test_the_mask_is_that_of_least_squares() -> None:
    weight, inputs = drawn(4, 6, seed=3), drawn(50, 6, seed=4) + 1
    kept = [0, 2, 5]
    expected = torch.linalg.lstsq(products(inputs, weight, kept), (inputs @ weight.T).flatten()[:, None]).solution[:, 0]
    normal = mask_equations(weight, inputs.T @ inputs / 50)
    assert torch.allclose(tuned_mask(normal, kept, 1e-12), expected, atol=1e-6)
    one = torch.ones(3, dtype=torch.float64)
    assert not torch.allclose(expected, one, atol=0.05)
    assert torch.allclose(tuned_mask(normal, kept, 1e6), one, atol=1e-4)


def test_of_two_equal_columns_one_goes_and_the_other_does_its_work() -> None:
    weight, inputs = drawn(6, 10, seed=5), drawn(200, 10, seed=6)
    weight[:, 7], inputs[:, 7] = weight[:, 2], inputs[:, 2]
    gram = inputs.T @ inputs / 200
    problem, columns = Problem.of(weight, gram), [*range(10)]
    first = int(removal_errors(problem, columns).argmin())
    assert first in (2, 7)
    columns.remove(first)
    assert columns[int(removal_errors(problem, columns).argmin())] not in (2, 7)
    tuned = tuned_mask(mask_equations(weight, gram), columns, 1e-3)
    assert tuned[columns.index(9 - first)] == pytest.approx(2, abs=0.01)
    change = inputs @ weight.T - (inputs[:, columns] * tuned) @ weight[:, columns].T
    assert change.square().sum() < 1e-4 * (inputs @ weight.T).square().sum()


def test_no_number_is_beyond_the_clip() -> None:
    normal = torch.tensor([[1e-6, 1.0], [1.0, 1e-6]], dtype=torch.float64)
    assert tuned_mask(normal, [0], 1e-12).tolist() == [10]


@pytest.mark.parametrize(("sparsity", "alpha", "blocks"), [(0.5, 0.5, 1), (0.5, 0.0, 0), (0.4, 1.0, 2)])
def test_the_budget_is_met_to_a_neuron(sparsity: float, alpha: float, blocks: int) -> None:
    language_model = tiny_language_model(num_hidden_layers=6)
    edit = edit_of(language_model, sparsity, CompMethod(alpha=alpha, bound=5))
    assert [shape == GONE for shape in edit.blocks].count(True) == blocks == len(edit.found["dropped"])
    assert all(block in (2, 3, 4) for block in edit.found["dropped"])
    # A KV group has 2 heads of 8 rows and columns and two rows of 8 for key and value; a neuron three vectors.
    left = sum(len(shape.groups) * (4 + 2) * 8 * 32 + len(shape.neurons) * 3 * 32 for shape in edit.blocks)
    whole = 6 * (2 * (4 + 2) * 8 * 32 + 48 * 3 * 32)
    assert sparsity * whole <= whole - left < sparsity * whole + 3 * 32
    kept = [len(shape.neurons) for shape in edit.blocks if shape != GONE]
    assert min(kept) > 0 and max(kept) - min(kept) <= 12  # all blocks lose about as much


@torch.no_grad()
def test_what_stays_is_multiplied_by_the_mask() -> None:
    """Of the first MLP, on what it reads behind the first attention as that is left; solved for on all tokens."""
    language_model = tiny_language_model(num_hidden_layers=2)
    edit = edit_of(language_model, 0.3, CompMethod(alpha=0, bound=5))
    block = language_model.model.get_submodule("model.layers.0")
    heads, down = block.get_submodule("self_attn.o_proj"), block.get_submodule("mlp.down_proj")
    if (left := edit.outputs.get("model.layers.0.self_attn.o_proj")) is not None:
        columns = [head * 8 + at for head in edit.blocks[0].heads for at in range(8)]
        heads.weight.zero_()
        heads.weight[:, columns] = left
    seen: list[Tensor] = []
    with down.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).double())):
        language_model.model(WINDOWS)
    inputs, weight, kept = torch.cat(seen), down.weight.double(), list(edit.blocks[0].neurons)
    # The ridge is rows of the system: sqrt(r) μ = sqrt(r).
    pull = 1e-3 * products(inputs, weight, [*range(48)]).square().sum(0).mean()
    system = torch.cat([products(inputs, weight, kept), pull.sqrt() * torch.eye(len(kept), dtype=torch.float64)])
    right = torch.cat([(inputs @ weight.T).flatten(), pull.sqrt().expand(len(kept))])
    expected = torch.linalg.lstsq(system, right[:, None]).solution[:, 0]
    found = edit.outputs["model.layers.0.mlp.down_proj"]
    assert len(kept) < 48
    assert torch.allclose(found, (weight[:, kept] * expected).float(), atol=1e-4)


@torch.no_grad()
def test_a_part_at_its_bound_leaves_the_rest_to_others() -> None:
    language_model = tiny_language_model(num_hidden_layers=4)
    free = edit_of(language_model, 0.25, CompMethod(alpha=0, bound=5))
    bound = edit_of(language_model, 0.25, CompMethod(alpha=0, bound=0.02))
    assert free.found["at_bound"] == [] != bound.found["at_bound"]
    assert len(bound.found["at_bound"]) < 8
    assert free.blocks != bound.blocks
    for name, output in bound.outputs.items():
        shape = bound.blocks[int(name.split(".")[2])]
        columns = list(shape.neurons) if "mlp" in name else [head * 8 + at for head in shape.heads for at in range(8)]
        dense = language_model.model.get_submodule(name).weight[:, columns]
        tuned = (output * dense).sum(0) / dense.square().sum(0)
        assert tuned.var(unbiased=False) <= 0.02 + 1e-5, name


def test_a_bound_that_leaves_nothing_to_remove() -> None:
    with pytest.raises(InvalidInput, match=r"comp finds no more to remove when 0% .* larger bound than 0,"):
        edit_of(tiny_language_model(), 0.3, CompMethod(alpha=0, bound=0))


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"alpha": 1.5}, r"alpha of comp 1.5 is outside \[0, 1\]"),
        ({"step": 2}, r"step of comp 2 is outside \[0, 1\]"),
        ({"ridge": 0}, "the bound of comp is 0 or more, and its ridge above 0"),
        ({"protect_first": 1, "alpha": 1}, "1 blocks cannot go where 0 of 2 are not protected"),
    ],
)
def test_what_cannot_be_is_refused(parameters: dict[str, float], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        edit_of(tiny_language_model(), 0.5, configured("comp", parameters))  # type: ignore[arg-type]
