"""Wanda's masks on whole models, bit for bit those of an implementation that shares no code with ours."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from evoprune.fitness.adapters import list_sites
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import prune_model
from evoprune.fitness.statistics import PassSettings, Statistics, collect_statistics
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.records import MaskRule
from tests import wanda
from tests.models import random_windows, tiny_language_model

MODELS: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 4},
    "llama with grouped queries": {},
    "gpt2 with Conv1D": {},
}
WINDOWS = random_windows(6, 24)


def _scaler_rows(language_model: LanguageModel) -> dict[str, Tensor]:
    """Site -> the accumulator of the reference, heard by hooks of its own."""
    means = {bound.site.name: wanda.RunningMean(bound.site.in_features) for bound in language_model.sites}
    handles = [
        bound.module.register_forward_hook(lambda module, args, _, mean=means[bound.site.name]: mean.add_batch(args[0]))
        for bound in language_model.sites
    ]
    for ids in WINDOWS:
        language_model.model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: mean.scaler_row for name, mean in means.items()}


Found = tuple[LanguageModel, dict[str, Tensor], dict[str, Statistics]]


@pytest.fixture(
    scope="module",
    params=[(name, dtype) for name in MODELS for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    ids=lambda param: f"{param[0]}, {str(param[1])[6:]}",
)
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """(model, the reference's accumulators, our statistics by mode)."""
    name, dtype = request.param
    language_model = tiny_language_model(name.partition(" ")[0], **MODELS[name])
    language_model.model.to(dtype)
    assert all(bool(bound.weight().all()) for bound in language_model.sites)
    modes: tuple[Literal["standard", "wanda_fp32"], ...] = ("standard", "wanda_fp32")
    folder = tmp_path_factory.mktemp("statistics")
    statistics = {
        mode: collect_statistics(
            language_model, WINDOWS, ["X_l2"], folder=folder / mode, settings=PassSettings(mode=mode, forward_batch=1)
        )
        for mode in modes
    }
    return language_model, _scaler_rows(language_model), statistics


def _expected(weight: Tensor, scaler_row: Tensor, rule: MaskRule) -> Tensor:
    if rule.pattern is None:
        assert rule.sparsity is not None
        return wanda.keep(weight, scaler_row, rule.sparsity)
    kept, width = rule.pattern
    return wanda.keep_pattern(weight, scaler_row, width - kept, width)


def _pruned(language_model: LanguageModel, rule: MaskRule, statistics: Statistics) -> dict[str, Tensor]:
    """Site -> what evoprune leaves of a copy of the model, [out, in] bool."""
    model = deepcopy(language_model.model)
    copy = replace(language_model, model=model, sites=tuple(list_sites(model)))
    prune_model(copy, CRITERIA["wanda"], rule, statistics=statistics)
    return {bound.site.name: bound.weight() != 0 for bound in copy.sites}


RULES = [MaskRule(0.5), MaskRule(0.6), MaskRule(0.7), MaskRule(pattern=(2, 4)), MaskRule(pattern=(4, 8))]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_masks_of_a_model_are_wandas(collected: Found, rule: MaskRule) -> None:
    """Symbolic pruning metrics, check 1: equal with the reference's accumulator, nearly so with float64 sums."""
    language_model, scaler_rows, statistics = collected
    expected = {}
    for bound in language_model.sites:
        stored = bound.module.get_parameter("weight")
        weight = stored.t() if bound.transposed else stored
        expected[bound.site.name] = _expected(weight, scaler_rows[bound.site.name], rule)
    repeated = _pruned(language_model, rule, statistics["wanda_fp32"])
    for site, keep in expected.items():
        assert torch.equal(repeated[site], keep), site
    summed = _pruned(language_model, rule, statistics["standard"])
    differing = sum(int((summed[site] != keep).sum()) for site, keep in expected.items())
    assert differing <= 1e-4 * sum(keep.numel() for keep in expected.values())
