"""Replay against whole forward passes of a model that is pruned by hand, one block after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evoprune.fitness.adapters import rebind
from evoprune.fitness.allocating import allocate_model
from evoprune.fitness.allocators import ALLOCATORS
from evoprune.fitness.compressors import COMPRESSORS, AtRunTime, Goal, Wrapping, compress, compressor_of
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import PrunedLayer, mask_rule, prune_model
from evoprune.fitness.replay import Replay, dense_names, replayed
from evoprune.fitness.statistics import collect_statistics
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule
from tests.models import FAMILIES, random_windows, tiny_language_model

WINDOWS = random_windows(24, 32)
CHANGING = sorted(name for name in COMPRESSORS if not isinstance(COMPRESSORS[name], AtRunTime))


def copied(language_model: LanguageModel) -> LanguageModel:
    model = deepcopy(language_model.model)
    return replace(language_model, model=model, sites=rebind(language_model.sites, model))


@contextmanager
def heard(language_model: LanguageModel) -> Iterator[dict[str, Tensor]]:
    """Inputs of every site, [tokens, in] float64, in one whole forward pass over the windows."""
    found: dict[str, Tensor] = {}
    handles = []
    for bound in language_model.sites:

        def hear(module: object, args: tuple[Tensor, ...], name: str = bound.site.name) -> None:
            found[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        handles.append(bound.module.register_forward_pre_hook(hear))
    language_model.model(WINDOWS)
    yield found
    for handle in handles:
        handle.remove()


@torch.no_grad()
def by_hand(
    language_model: LanguageModel, rule: MaskRule, compressor: str
) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
    """Weights after Wanda and a compressor, and both relative output errors: of dense inputs, and of inputs there."""
    dense = copied(language_model)
    with heard(dense) as inputs:
        of_dense = dict(inputs)
    errors = {}
    for block in range(language_model.sites[-1].site.n_blocks):
        with heard(language_model) as inputs:
            here = dict(inputs)
        for bound in [bound for bound in language_model.sites if bound.site.block == block]:
            rows, before = here[bound.site.name], bound.weight().double()
            goal = Goal.of_mask(mask((before.abs() * rows.norm(dim=0)).float(), rule), rule.pattern)
            given = {"H": (rows.T @ rows / len(rows)).float()}
            bound.weight().copy_(compress(compressor, bound.weight(), goal, given).weight)
            change = before - bound.weight()
            lost = []
            for x in (of_dense[bound.site.name], rows):
                gram = x.T @ x
                if "H" not in COMPRESSORS[compressor].needs:  # without it inputs are taken to be uncorrelated
                    gram = gram.diagonal().diag()
                lost.append((((change @ gram) * change).sum() / ((before @ gram) * before).sum()).item())
            errors[bound.site.name] = (lost[0], lost[1])
    return {bound.site.name: bound.weight() for bound in language_model.sites}, errors


def check(language_model: LanguageModel, rule: MaskRule, compressor: str) -> tuple[PrunedLayer, ...]:
    expected, errors = by_hand(copied(language_model), rule, compressor)
    layers = replayed(language_model, CRITERIA["wanda"], rule, WINDOWS, compressor=compressor)
    for bound, layer in zip(language_model.sites, layers, strict=True):
        torch.testing.assert_close(bound.weight(), expected[bound.site.name], rtol=2e-3, atol=2e-4)
        assert (layer.error, layer.path_error) == pytest.approx(errors[layer.name], rel=2e-3, abs=1e-6)
    return layers


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_sees_what_its_pruned_blocks_hand_on(family: str) -> None:
    language_model = tiny_language_model(family)
    layers = check(language_model, MaskRule(0.5), "mask")
    first = [layer for bound, layer in zip(language_model.sites, layers, strict=True) if bound.site.block == 0]
    assert all(layer.error == layer.path_error for layer in first)
    assert any(layer.error != layer.path_error for layer in layers[len(first) :])


@pytest.mark.parametrize(("compressor", "rule"), [("refit", MaskRule(0.5)), ("sparsegpt", MaskRule(pattern=(2, 4)))])
def test_compressors_solve_for_what_they_are_given(compressor: str, rule: MaskRule) -> None:
    check(tiny_language_model(), rule, compressor)


@pytest.mark.parametrize("compressor", CHANGING)
def test_every_compressor_replays(compressor: str) -> None:
    language_model = tiny_language_model()
    compressor = "armor:rounds=2" if compressor == "armor" else compressor
    wraps = isinstance(compressor_of(compressor), Wrapping)
    rule = mask_rule(CRITERIA["wanda"], 0.5, None, None, compressor)
    layers = replayed(language_model, CRITERIA["wanda"], rule, WINDOWS, compressor=compressor, modules=wraps)
    assert [layer.name for layer in layers] == [bound.site.name for bound in language_model.sites]
    assert all(0 < (layer.path_error or 0) < 1 for layer in layers)


def test_gradients_stay_those_of_the_dense_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    criterion = Metric.from_text("mul(abs(W),mul(X_l2,G_l2))")
    language_model = tiny_language_model()
    folder = tmp_path_factory.mktemp("statistics") / "set"
    names = dense_names(criterion.needs)
    assert names == {"G_l2"}
    statistics = collect_statistics(language_model, WINDOWS, names, folder=folder)
    dense = copied(language_model)
    replayed(language_model, criterion, MaskRule(0.5), WINDOWS, statistics=statistics)
    bound = language_model.sites[-1]
    # In the last matrix of the last block, with inputs as they are once all blocks before it are pruned.
    behind = copied(dense)
    for before, after in zip(behind.sites, language_model.sites, strict=True):
        if before.site.block < bound.site.block:
            before.weight().copy_(after.weight())
    with heard(behind) as inputs:
        norms = inputs[bound.site.name].norm(dim=0)
    gradients = statistics.tensor(bound.site.name, "G_l2")
    scores = dense.sites[-1].weight().abs() * gradients * norms
    assert torch.equal(bound.weight() != 0, mask(scores.float(), MaskRule(0.5)))


def test_an_allocation_says_what_each_matrix_loses() -> None:
    language_model = tiny_language_model()
    found = allocate_model(language_model, "erk", ALLOCATORS["erk"], 0.5, criterion=CRITERIA["wanda"])
    layers = replayed(language_model, CRITERIA["wanda"], MaskRule(0.5), WINDOWS, compressor="refit", allocation=found)
    assert [layer.removed for layer in layers] == [site.removed for site in found.sites]
    assert len({layer.sparsity for layer in layers}) > 1


def test_without_statistics_the_mask_is_that_of_the_dense_model() -> None:
    language_model = tiny_language_model()
    dense = copied(language_model)
    prune_model(dense, CRITERIA["magnitude"], MaskRule(0.5))
    layers = replayed(language_model, CRITERIA["magnitude"], MaskRule(0.5), WINDOWS)
    for bound, other in zip(language_model.sites, dense.sites, strict=True):
        assert torch.equal(bound.weight(), other.weight())
    assert all(layer.path_error is not None for layer in layers)


def test_what_cannot_be_replayed_is_refused() -> None:
    language_model = tiny_language_model()
    with pytest.raises(InvalidInput, match="group global"):
        replayed(language_model, CRITERIA["wanda"], MaskRule(0.5, None, "global"), WINDOWS)
    with pytest.raises(InvalidInput, match="block to block by itself"):
        replayed(language_model, CRITERIA["wanda"], MaskRule(0.5), WINDOWS, compressor="scap")
    with pytest.raises(InvalidInput, match="G_l2 is of the dense model"):
        Replay(language_model, WINDOWS, ["G_l2"])
