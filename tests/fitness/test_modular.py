"""The modular form: wrappers and thresholds come back from the folder as they were; what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from evoprune.fitness.activations import Threshold, set_thresholds, threshold_of
from evoprune.fitness.adapters import list_sites
from evoprune.fitness.checkpoint import write_checkpoint
from evoprune.fitness.compressors import Goal
from evoprune.fitness.factored import FactoredLinear, Factors
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.modular import modules_of
from evoprune.fitness.pruning import reach
from evoprune.fitness.surgery import put_module
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule
from tests.models import random_windows, tiny_language_model

WINDOWS = random_windows(2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(modular(), tmp_path_factory.mktemp("modular") / "out", recipe={}, report={})


def modular(family: str = "llama") -> LanguageModel:
    """The first block's layers have wrappers around 2:4 cores, the second's thresholds, one layer both."""
    language_model = tiny_language_model(family)
    model = language_model.model
    layers = []
    for at, bound in enumerate(language_model.sites):
        if bound.site.block == 0:
            core = bound.weight() * mask(bound.weight().abs(), MaskRule(None, (2, 4)))
            left, right = (torch.eye(8) + torch.rand(n // 8, 8, 8) / 9 for n in bound.weight().shape)
            put_module(model, bound.site.name, FactoredLinear.of(bound, Factors(core, left, right)))
        if bound.site.block == 1 or at == 0:
            layers.append((model.get_submodule(bound.site.name), Threshold(0.01 * at - 0.03, 0.1 + at / 7)))
    set_thresholds(layers)
    return replace(language_model, sites=tuple(list_sites(model)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_gives_the_modules_back(family: str, tmp_path: Path) -> None:
    language_model = modular(family)
    before = language_model.model(input_ids=WINDOWS).logits
    folder = write_checkpoint(language_model, tmp_path / "out", recipe={}, report={})
    assert sorted(path.suffix for path in folder.iterdir() if path.name != "README.md") == [".json"] * 5 + [
        ".safetensors"
    ]
    loaded = load_model(str(folder))
    assert modules_of(loaded.model) == modules_of(language_model.model)
    assert torch.equal(loaded.model(input_ids=WINDOWS).logits, before)
    assert type(loaded.model) is type(language_model.model)
    for bound in loaded.sites:
        assert isinstance(bound.module, FactoredLinear) == (bound.site.block == 0)
        assert (bound.weight() == 0).float().mean() == (0.5 if bound.site.block == 0 else 0)
    card = (folder / "README.md").read_text()
    assert "evoprune.load_model" in card and "from_pretrained" not in card
    # To another program this is no model of the family without its wrappers, but none at all.
    with pytest.raises(ValueError, match="evoprune_modular"):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda facts: facts["factored"].update({"model.layers.9.mlp.up_proj": [8, 8]}), "no linear layer 'model.lay"),
        (lambda facts: facts["factored"].update({"model.norm": [8, 8]}), "no linear layer 'model.norm'"),
        (lambda facts: facts["factored"].update({"model.layers.0.mlp.up_proj": [7, 8]}), "which blocks of"),
        (lambda facts: facts["factored"].update({"model.layers.0.mlp.up_proj": "os.system"}), "which blocks of"),
        (lambda facts: facts["factored"].pop("model.layers.0.mlp.up_proj"), "2 tensors that its"),
        (lambda facts: facts.update(factored=[1]), "does not name layers one by one"),
        (lambda facts: facts["thresholds"].update({"model.layers.1.mlp.up_proj": {"mode": "0"}}), "not a mode and a"),
        (lambda facts: facts["thresholds"].update({"": {"mode": 0, "threshold": 1}}), "no linear layer ''"),
        (lambda facts: facts.update(family="nonsense"), "knows no model family"),
    ],
)
def test_a_config_that_was_tampered_with(change: Any, said: str, written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "out"))
    facts = json.loads((folder / "config.json").read_text())
    change(facts)
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(InvalidInput, match=said):
        load_model(str(folder))


def test_a_core_is_not_pruned_as_if_it_were_all_of_its_matrix() -> None:
    language_model = modular()
    goals = ((bound, Goal.of_mask(bound.weight() > 0)) for bound in language_model.sites)
    with pytest.raises(InvalidInput, match="q_proj has wrappers around its sparse core"):
        reach(language_model, goals)


def test_a_hook_is_what_the_paper_says() -> None:
    """y = W ((x - mode) where it is kept) + W mode + bias; nothing changes at a threshold of 0."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(8, 5).requires_grad_(False)
    inputs = torch.randn(3, 7, 8, generator=generator)
    inputs[0, 0] = 0.25
    before = layer(inputs)
    set_thresholds([(layer, Threshold(0.25, 0.0))])
    assert torch.equal(layer(inputs), before)
    set_thresholds([(layer, Threshold(0.25, 0.5))])
    centred = inputs - 0.25
    kept = centred.masked_fill(centred.abs() <= 0.5, 0)
    expected = kept @ layer.weight.T + (0.25 * layer.weight.sum(1) + layer.bias)
    torch.testing.assert_close(layer(inputs), expected)
    assert threshold_of(layer) == Threshold(0.25, 0.5)
    assert len(layer._forward_pre_hooks) == 1
