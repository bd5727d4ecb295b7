"""Scores of units, against sums over the rows and columns of live modules, autograd, and refits by brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from evoprune.fitness.gram import damped
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.statistics import Statistics, collect_statistics
from evoprune.fitness.unit_criteria import UNIT_CRITERIA, UnitScores, score_units
from evoprune.fitness.unit_criteria.flap import bias_additions
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.shape import BlockShape
from tests.models import FAMILIES, random_windows, tiny_language_model

HEADS, GROUPS, HEAD = 4, 2, 8
WINDOWS = random_windows(3, 12)


def collected(language_model: LanguageModel, folder: Path, names: frozenset[str]) -> Statistics:
    return collect_statistics(language_model, WINDOWS, names, folder=folder)


def weights(language_model: LanguageModel, block: int = 1) -> dict[str, Tensor]:
    """[out, in] of a Llama, by the first letter of its matrix."""
    layer = language_model.model.get_submodule(f"model.layers.{block}")
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    return {name.rpartition(".")[2]: layer.get_parameter(f"{name}_proj.weight").detach() for name in names}


def inputs_of(language_model: LanguageModel, module: str) -> Tensor:
    """[tokens, in] inputs of a module over all windows."""
    seen: list[Tensor] = []
    handle = language_model.model.get_submodule(module).register_forward_hook(
        lambda _, args, __: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    language_model.model(input_ids=WINDOWS)
    handle.remove()
    return torch.cat(seen)


def by_hand(rows: dict[str, Tensor], columns: dict[str, Tensor]) -> UnitScores:
    """Sums over what goes with each unit, one unit at a time, from scores of rows and columns."""
    heads = torch.zeros(HEADS)
    for head in range(HEADS):
        own = slice(head * HEAD, (head + 1) * HEAD)
        heads[head] = rows["q"][own].sum() + columns["o"][own].sum()
    groups = torch.zeros(GROUPS)
    for group in range(GROUPS):
        own = slice(group * HEAD, (group + 1) * HEAD)
        groups[group] = rows["k"][own].sum() + rows["v"][own].sum() + heads[2 * group] + heads[2 * group + 1]
    return UnitScores(groups, heads, rows["gate"] + rows["up"] + columns["down"])


def assert_close(found: UnitScores, expected: UnitScores, rtol: float = 1e-4) -> None:
    for name in ("groups", "heads", "neurons"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("name", UNIT_CRITERIA)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_criterion_scores_every_family(name: str, family: str, tmp_path: Path) -> None:
    language_model = tiny_language_model(family)
    before = [bound.weight().clone() for bound in language_model.sites]
    criterion = UNIT_CRITERIA[name]
    evidence = collected(language_model, tmp_path / "set", criterion.needs) if criterion.needs else None
    for scores, block in zip(score_units(language_model, criterion, evidence), find_units(language_model), strict=True):
        assert [len(scores.groups), len(scores.heads), len(scores.neurons)] == [
            block.widths.groups,
            block.widths.heads,
            block.widths.neurons,
        ]
        assert scores.groups.dtype == torch.float32 and scores.neurons.std() > 0
    assert all(map(torch.equal, before, [bound.weight() for bound in language_model.sites]))


def test_magnitude_by_hand() -> None:
    language_model = tiny_language_model()
    squares = {name: weight.square() for name, weight in weights(language_model).items()}
    sums = by_hand(
        {name: square.sum(1) for name, square in squares.items()},
        {name: square.sum(0) for name, square in squares.items()},
    )
    expected = UnitScores(sums.groups.sqrt(), sums.heads.sqrt(), sums.neurons.sqrt())
    assert_close(score_units(language_model, UNIT_CRITERIA["magnitude"])[1], expected)


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_fused_matrices_are_read_like_single_ones(family: str) -> None:
    """Only what belongs to one unit is not zero: no other unit has any magnitude."""
    language_model = tiny_language_model(family)
    block = find_units(language_model)[0]
    each, neuron = block.widths.heads_per_group, 5
    with torch.no_grad():
        for part, kept, columns in (
            (block.attention, block.attention.rows((1,), range(each, 2 * each)), range(each * HEAD, 2 * each * HEAD)),
            (block.mlp, block.mlp.rows((neuron,)), (neuron,)),
        ):
            for bound, rows in zip(part.inputs, kept, strict=True):
                bound.weight()[[row for row in range(bound.site.out_features) if row not in rows]] = 0
            part.output.weight()[:, [at for at in range(part.output.site.in_features) if at not in columns]] = 0
    scores = score_units(language_model, UNIT_CRITERIA["magnitude"])[0]
    assert scores.groups.nonzero().flatten().tolist() == [1]
    assert scores.heads.nonzero().flatten().tolist() == list(range(each, 2 * each))
    assert scores.neurons.nonzero().flatten().tolist() == [neuron]
    whole = sum(float(bound.weight().square().sum()) for bound in (*block.attention.inputs, block.attention.output))
    assert float(scores.groups[1]) == pytest.approx(whole**0.5, rel=1e-5)


def test_wanda_sp_by_hand(tmp_path: Path) -> None:
    language_model = tiny_language_model()
    matrices = weights(language_model)
    found = score_units(language_model, UNIT_CRITERIA["wanda-sp"], collected(language_model, tmp_path / "s", {"X_l2"}))
    columns = {}
    for letter, module in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        inputs = inputs_of(language_model, f"model.layers.1.{module}")
        norms = (inputs.square().sum(0) / len(WINDOWS)).sqrt()
        columns[letter] = (matrices[letter].abs() * norms).sum(0)
    nothing = {name: torch.zeros(len(weight)) for name, weight in matrices.items()}
    expected = by_hand(nothing, columns)
    assert_close(found[1], expected)


def test_flap_by_hand(tmp_path: Path) -> None:
    language_model = tiny_language_model()
    matrices = weights(language_model)
    criterion = UNIT_CRITERIA["flap"]
    assert criterion.spread == "global"
    found = score_units(language_model, criterion, collected(language_model, tmp_path / "s", criterion.needs))[1]
    standard = {}
    for letter, module in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        variance = inputs_of(language_model, f"model.layers.1.{module}").double().var(0)
        score = variance * matrices[letter].double().norm(dim=0) ** 2
        score = score**2 if letter == "o" else score
        standard[letter] = ((score - score.mean()) / score.std()).float()
    heads = torch.stack([standard["o"][head * HEAD : (head + 1) * HEAD].mean() for head in range(HEADS)])
    groups = torch.stack([heads[:2].mean(), heads[2:].mean()])
    assert_close(found, UnitScores(groups, heads, standard["down"]), rtol=1e-3)


def test_a_bias_stands_in_for_the_mean_of_what_goes(tmp_path: Path) -> None:
    """With it, the mean output of each matrix over the text is that of the dense one, where it has a bias."""
    language_model = tiny_language_model("gpt2")
    block = find_units(language_model)[1]
    evidence = collected(language_model, tmp_path / "s", frozenset({"X_mean"}))
    shape = BlockShape((0, 2, 3), (0, 2, 3), tuple(range(7, 30)))
    found = bias_additions(block, shape, evidence)
    for bound, kept in (
        (block.attention.output, block.attention.columns(shape.heads)),
        (block.mlp.output, [*range(7, 30)]),
    ):
        inputs = inputs_of(language_model, bound.site.name)
        masked = torch.zeros_like(inputs)
        masked[:, kept] = inputs[:, kept]
        added = found[bound.site.name]
        assert added is not None
        torch.testing.assert_close(
            (masked @ bound.weight().T).mean(0) + added, (inputs @ bound.weight().T).mean(0), rtol=1e-4, atol=1e-5
        )
    assert found != bias_additions(block, BlockShape((), (), tuple(range(7, 30))), evidence)
    assert bias_additions(block, BlockShape((), (), ()), evidence) == dict.fromkeys(found)
    whole = bias_additions(block, block.widths.whole, evidence)
    assert all(added is not None and not added.any() for added in whole.values())


@pytest.mark.parametrize("order", ["", "-vector", "-second", "-mixed"])
def test_llm_pruner_against_autograd(order: str, tmp_path: Path) -> None:
    language_model = tiny_language_model()
    matrices = weights(language_model)
    names = {letter: f"model.layers.1.{'mlp' if len(letter) > 1 else 'self_attn'}.{letter}_proj" for letter in matrices}
    model = language_model.model
    gradients: dict[str, list[Tensor]] = {letter: [] for letter in matrices}
    for window in WINDOWS:
        for name in names.values():
            model.get_submodule(name).get_parameter("weight").requires_grad_(True).grad = None
        model(input_ids=window[None], labels=window[None]).loss.backward()
        for letter, name in names.items():
            gradients[letter].append(model.get_submodule(name).get_parameter("weight").grad.clone())
    model.requires_grad_(False)
    rows, columns = {}, {}
    for letter, weight in matrices.items():
        each = torch.stack(gradients[letter])
        first, fisher = weight * each.mean(0), each.square().mean(0)
        terms = {
            "": first,
            "-vector": first,
            "-second": weight * fisher * weight,
            "-mixed": first - weight * fisher * weight / 2,
        }[order]
        rows[letter] = terms.sum(1).abs() if order == "-vector" else terms.abs().sum(1)
        columns[letter] = terms.sum(0).abs() if order == "-vector" else terms.abs().sum(0)
    criterion = UNIT_CRITERIA[f"llm-pruner{order}"]
    found = score_units(language_model, criterion, collected(language_model, tmp_path / "s", criterion.needs))
    assert_close(found[1], by_hand(rows, columns), rtol=2e-3)


def test_comp_is_the_error_of_the_best_refit(tmp_path: Path) -> None:
    language_model = tiny_language_model()
    criterion = UNIT_CRITERIA["comp"]
    evidence = collected(language_model, tmp_path / "s", criterion.needs | {"H"})
    found = score_units(language_model, criterion, evidence)[1]
    errors = {}
    for letter, module in (("o", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        name = f"model.layers.1.{module}"
        weight = weights(language_model)[letter].double()
        hessian = damped(2 * evidence.tokens / evidence.sequences * evidence.tensor(name, "H").double())
        lost = []
        for column in range(weight.shape[1]):
            kept = [at for at in range(weight.shape[1]) if at != column]
            refit = torch.zeros_like(weight)
            refit[:, kept] = torch.linalg.solve(hessian[kept][:, kept], (weight @ hessian)[:, kept].T).T
            change = weight - refit
            lost.append(float((change @ hessian * change).sum()))
        errors[letter] = torch.tensor(lost)
    nothing = {name: torch.zeros(len(weight)) for name, weight in weights(language_model).items()}
    assert_close(found, by_hand(nothing, errors), rtol=1e-3)


def test_comp_gives_nothing_for_what_is_always_zero(tmp_path: Path) -> None:
    language_model = tiny_language_model("opt")
    block = find_units(language_model)[0]
    bias = block.mlp.inputs[0].bias()
    assert bias is not None
    bias[4] = -1e3  # its neuron never fires
    criterion = UNIT_CRITERIA["comp"]
    scores = score_units(language_model, criterion, collected(language_model, tmp_path / "s", criterion.needs))[0]
    assert scores.neurons[4] == 0 and int((scores.neurons == 0).sum()) == 1


def test_what_cannot_be_scored() -> None:
    language_model = tiny_language_model()
    with pytest.raises(EvopruneError, match="reads X_l2"):
        score_units(language_model, UNIT_CRITERIA["wanda-sp"])
    language_model.model.get_submodule("model.layers.1.mlp.down_proj").get_parameter("weight")[3, 4] = torch.inf
    with pytest.raises(InvalidInput, match=r"scores of neurons of model.layers.1 are not finite"):
        score_units(language_model, UNIT_CRITERIA["magnitude"])
