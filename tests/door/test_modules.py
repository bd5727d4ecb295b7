"""Compressors whose result is more than weights, from the command line: written, loaded again, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import evoprune
from evoprune.fitness.activations import threshold_of
from evoprune.fitness.factored import FactoredLinear
from evoprune.fitness.modular import modules_of
from tests.door.conftest import Run

EVAL = ("--tokens", 512, "--window", 32, "--json")
SHORT = ("--calibration-sequences", 4)


ARMOR = ("--compressor", "armor:rounds=2")


def test_wrappers_are_written_and_loaded(run: Run, tiny: Path, small: Path, place: Path) -> None:
    pruned = run("prune", tiny, "--out", "out", "--pattern", "2:4", *ARMOR, "--json", *SHORT)
    assert (pruned.code, pruned.json["compressor"], pruned.json["criterion"]) == (0, "armor:rounds=2", None)
    assert pruned.json["sparsity"] == 0.5
    record = json.loads((place / "out" / "evoprune.json").read_text())
    assert (record["recipe"]["form"], record["recipe"]["pattern"]) == ("modules", "2:4")
    loaded = evoprune.load_model(str(place / "out"))
    assert all(isinstance(bound.module, FactoredLinear) for bound in loaded.sites)
    for bound in loaded.sites:
        assert ((bound.weight().view(-1, 4) != 0).sum(1) == 2).all()
    evaluated = run("eval", "out", "--dense", tiny, *EVAL).json
    assert evaluated["sparsity"] == 0.5

    plain = run("prune", tiny, "--out", "plain", "--pattern", "2:4", *ARMOR, "--form", "plain", *SHORT)
    assert (
        "armor:rounds=2 is multiplied out: these weights are dense, and no kernel for sparse ones makes use of them"
        in plain.err
    )
    assert "removed 0 of 15,360 prunable weights (0.00%) by armor:rounds=2 at 2:4" in plain.err
    # Plain transformers loads the product, which says the same.
    product = AutoModelForCausalLM.from_pretrained(place / "plain")
    ids = torch.arange(1, 33)[None]
    torch.testing.assert_close(product(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-4)

    # It is a model like others, but for pruning; thresholds come on top of its wrappers.
    for words in (["prune", "out", "--out", "a"], ["prune", "out", "--out", "a", "--method", "shortgpt"]):
        assert "has wrappers around its sparse core: prune the model that it was made of" in run(*words).err
    search = run("search", "metric", "out", "--config", small, "--executor", "inline")
    assert (search.code, "has wrappers around its sparse core" in search.err) == (2, True)
    assert run("prune", "out", "--out", "both", "--compressor", "scap", *SHORT).code == 0
    both = modules_of(evoprune.load_model(str(place / "both")).model)
    assert (len(both["factored"]), len(both["thresholds"])) == (14, 6)


def test_thresholds_are_written_and_loaded(run: Run, tiny: Path, place: Path) -> None:
    masked = run("prune", tiny, "--out", "masked", "--sparsity", 0.5, "--json", *SHORT).json
    pruned = run("prune", "masked", "--out", "out", "--sparsity", 0.3, "--compressor", "scap", "--json", *SHORT)
    assert pruned.code == 0
    document = pruned.json
    # The weights are those of the mask.
    assert (document["removed"], document["sparsity"]) == (masked["removed"], masked["sparsity"])
    assert [row["name"] for row in document["thresholds"]] == [layer["name"] for layer in document["layers"]]
    assert all(abs(row["sparsity"] - 0.3) < 0.01 for row in document["thresholds"])
    recipe = json.loads((place / "out" / "evoprune.json").read_text())["recipe"]
    assert (recipe["thresholds"]["sparsity"], recipe["thresholds"]["side"]) == (0.3, "A")
    loaded = evoprune.load_model(str(place / "out"))
    for bound, row in zip(loaded.sites, document["thresholds"], strict=True):
        found = threshold_of(bound.module)
        assert found is not None
        assert (found.mode, found.threshold) == (row["mode"], row["threshold"])
    assert run("eval", "out", "--dense", "masked", *EVAL).json["kl"] > 1e-6
    said = run("prune", tiny, "--out", "out", "--compressor", "scap", *SHORT).err
    assert "inputs let go" in said
    assert "of the weights are not needed for a token" in said


def test_what_is_refused(refused: Callable[..., str], tiny: Path) -> None:
    def said(*words: object) -> str:
        return refused("prune", tiny, "--out", "out", "--compressor", *words)

    assert "whole blocks of 16 × 16, not 2:4: give a sparsity" in said("block", "--pattern", "2:4")
    assert "tries every support of 16 columns" in said("armor", "--pattern", "8:16")
    assert "lets single inputs go, not 2:4" in said("scap", "--pattern", "2:4")
    assert "is in no weight: leave out --form plain" in said("scap", "--form", "plain")
    assert "leaves nothing to recover by 'spp'" in said("scap", "--recovery", "spp")
    assert "shares by kind of matrix: leave out allocation and budget" in said("scap", "--allocation", "uniform")
    assert "trains no block-diagonal matrices around a core" in said("armor", "--recovery", "spp")
    assert "makes no modules of its own: leave out --form modules" in said("sparsegpt", "--form", "modules")
    assert "wrappers in blocks of 12 do not fit 32 × 32" in said("armor:block=12", "--pattern", "2:4")


@pytest.mark.parametrize("name", ["armor", "block", "scap"])
def test_they_are_listed(name: str, run: Run) -> None:
    assert name in [row["name"] for row in run("list", "compressors", "--json").json]
