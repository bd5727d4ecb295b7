"""The modifier against masks made here, and inside llm-compressor where that is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from evoprune.fitness.integrations.llmcompressor import HeardPruning, _modifier_class, metric_modifier
from evoprune.fitness.pruning import mask_rule, prune_model
from evoprune.fitness.statistics import collect_statistics
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import MetricExport
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.exported import load_metric
from tests.models import random_windows, save_tiny, tiny_language_model, tiny_tokenizer

WINDOWS = random_windows(6)
CASES = {
    "wanda": {"metric": "wanda", "sparsity": 0.5},
    "one of four": {"metric": "wanda", "pattern": "1:4"},
    "expression": {"metric": "add(mul(abs(W),X_l1),mul(depth,Hinv))", "sparsity": 0.6},
    "layer": {"metric": "ria", "sparsity": 0.3, "group": "layer"},
}


def rule_of(case: dict[str, Any]) -> tuple[Any, Any]:
    criterion = load_metric(case["metric"])
    return criterion, mask_rule(criterion, case.get("sparsity"), case.get("pattern"), case.get("group"))


def masked_here(case: dict[str, Any], family: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that `evoprune prune` leaves, by layer, stored as the layers store them."""
    language_model = tiny_language_model(family)
    criterion, rule = rule_of(case)
    statistics = collect_statistics(language_model, WINDOWS, criterion.needs, folder=folder)
    prune_model(language_model, criterion, rule, statistics=statistics)
    return {bound.site.name: bound.module.get_parameter("weight") for bound in language_model.sites}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_heard_gives_the_masks_of_a_pruned_model(case: dict[str, Any], family: str, tmp_path: Path) -> None:
    expected = masked_here(case, family, tmp_path / "set")
    language_model = tiny_language_model(family)
    pruning = HeardPruning(*rule_of(case))
    hooks = [
        bound.module.register_forward_hook(lambda _, args, __, bound=bound: pruning.hear(bound, args[0]))
        for bound in language_model.sites
    ]
    for windows in WINDOWS.split(2):
        language_model.model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    for bound in language_model.sites:
        assert torch.equal(pruning.pruned(bound), expected[bound.site.name]), bound.site.name
    with pytest.raises(EvopruneError, match="was not run: the calibration of llm-compressor never reached it"):
        pruning.pruned(language_model.sites[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HeardPruning(CRITERIA["gblm"], mask_rule(CRITERIA["gblm"], 0.5, None, None)), "reads G_l2, which"),
        (
            lambda: HeardPruning(
                Metric.from_text("abs(W)", "global"), mask_rule(CRITERIA["wanda"], 0.5, None, "global")
            ),
            "llm-compressor prunes layer by layer",
        ),
    ],
)
def test_what_it_cannot_know_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        make()


def test_without_llm_compressor_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _modifier_class.cache_clear()
    monkeypatch.setitem(sys.modules, "llmcompressor.modifiers", None)
    with pytest.raises(InvalidInput, match=r"^modifiers need llm-compressor: pip install 'evoprune\[llmcompressor\]'"):
        metric_modifier("wanda")


@pytest.fixture
def oneshot(tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """Run a recipe of llm-compressor on the tiny model; returns all of its weights."""
    llmcompressor = pytest.importorskip("llmcompressor")
    datasets = pytest.importorskip("datasets")
    _modifier_class.cache_clear()

    def run(recipe: Any, **options: Any) -> dict[str, torch.Tensor]:
        folder = save_tiny(tmp_path / "dense")
        model = AutoModelForCausalLM.from_pretrained(folder)
        text = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in WINDOWS.tolist()]
        llmcompressor.oneshot(
            model=model,
            processor=tiny_tokenizer(),
            dataset=datasets.Dataset.from_list(text),
            recipe=recipe,
            shuffle_calibration_samples=False,
            num_calibration_samples=len(WINDOWS),
            **options,
        )
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    return run


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_oneshot_gives_the_masks_of_a_pruned_model(
    case: dict[str, Any], oneshot: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    found = oneshot(metric_modifier(**case), pipeline="basic")
    expected = masked_here(case, "llama", tmp_path / "set")
    dense = dict(tiny_language_model().model.named_parameters())
    for name, value in found.items():
        layer = name.removesuffix(".weight")
        assert torch.equal(value, expected.get(layer, dense[name])), name


def test_an_exported_metric_prunes_layer_after_layer_as_their_own_wanda_does(
    oneshot: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """In the sequential pipeline, where inputs come from layers that are pruned already."""
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    MetricExport(Metric.from_text("mul(abs(W),X_l2)")).write(tmp_path / "metric.json")
    modifier = metric_modifier(str(tmp_path / "metric.json"), sparsity=0.5)
    assert modifier.metric == "mul(abs(W),X_l2)"
    ours = oneshot(modifier)
    theirs = oneshot(WandaPruningModifier(sparsity=0.5, ignore=["re:.*lm_head"]))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def test_weights_alone_need_no_text(oneshot: Callable[..., dict[str, torch.Tensor]], tmp_path: Path) -> None:
    modifier = metric_modifier("magnitude", pattern="2:4")
    assert not modifier.requires_calibration_data
    found = oneshot(modifier, pipeline="datafree", output_dir=str(tmp_path / "out"))
    (stage,) = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()).values()
    said = stage["default_modifiers"]["MetricPruningModifier"]
    assert (said["metric"], said["pattern"], said["within"]) == ("magnitude", "2:4", "row")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, found["model.layers.0.mlp.up_proj.weight"])
    assert "sparsity_config" not in again.config.to_dict()
    zeros = [int((found[f"{bound.site.name}.weight"] == 0).sum()) for bound in tiny_language_model().sites]
    assert zeros == [bound.site.weights // 2 for bound in tiny_language_model().sites]
