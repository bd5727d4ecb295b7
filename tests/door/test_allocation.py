"""`prune --allocation` and `list allocators`, and the same in Python: what is pruned, written and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import evoprune
from evoprune.fitness.allocators import ALLOCATORS
from evoprune.fitness.models import load_model
from evoprune.metrics.allocation_file import read_allocation, write_allocation
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, removed_count
from tests.door.conftest import Done, Run
from tests.models import save_tiny

SHORT = ("--calibration", "text.txt", "--calibration-sequences", 4, "--calibration-window", 32)


@pytest.fixture(autouse=True)
def text(place: Path) -> Path:
    """A text of bytes that takes no time to read."""
    path = place / "text.txt"
    path.write_text("".join(f"line {number} holds {number * number % 97} of something\n" for number in range(400)))
    return path


@pytest.fixture
def refused(run: Run, place: Path) -> Callable[..., str]:
    """Run `prune` on a model as it must be refused; its one line."""

    def call(*words: object) -> str:
        before = sorted(place.rglob("*"))
        done: Done = run("prune", *words, "--out", "out", *SHORT)
        assert (done.code, done.out) == (2, ""), done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert len(done.err) < 500
        assert sorted(place.rglob("*")) == before
        return done.err

    return call


def test_an_allocator_by_name(run: Run, tiny: Path, place: Path) -> None:
    words = ("--allocation", "owl", "--allocation-set", "spread=0.2", "--sparsity", 0.6)
    document = run("prune", tiny, "--out", "out", *words, *SHORT, "--json").json
    assert document["allocation"] == {
        "allocator": "owl",
        "parameters": {"spread": 0.2, "outlier": 5.0, "granularity": "block"},
        "sparsity": 0.6,
    }
    assert document["removed"] == removed_count(0.6, document["prunable"])
    assert len({layer["sparsity"] for layer in document["layers"]}) > 2
    recipe = json.loads((place / "out" / "evoprune.json").read_text())["recipe"]
    assert recipe["sparsity"] == 0.6
    assert recipe["group"] == "row"
    assert [site["name"] for site in recipe["allocation"]["sites"]] == [layer["name"] for layer in document["layers"]]
    card = (place / "out" / "README.md").read_text()
    assert '"allocator": "owl"' in card
    assert "q_proj" not in card
    assert "allocated by uniform" in run("prune", tiny, "--out", "even", "--allocation", "uniform", *SHORT).err
    # What the recipe holds can be given again, and prunes alike.
    (place / "again.json").write_text(json.dumps(recipe["allocation"]))
    again = run("prune", tiny, "--out", "again", "--allocation", "again.json", *SHORT, "--json").json
    assert again["layers"] == document["layers"]


@pytest.mark.parametrize("metric", ["magnitude", "wanda"])
def test_masks_are_those_of_each_sparsity_by_row(metric: str, run: Run, tiny: Path, place: Path) -> None:
    """Magnitude's own group is the whole matrix: an allocation goes by row whatever the criterion."""
    allocation = evoprune.allocate(str(tiny), "erk", 0.7)
    write_allocation(allocation, place / "a.json")
    assert run("prune", tiny, "--out", "out", "--metric", metric, "--allocation", "a.json", *SHORT).code == 0
    pruned = AutoModelForCausalLM.from_pretrained(place / "out")
    dense = load_model(str(tiny))
    statistics = evoprune.collect_statistics(
        dense, ["X_l2"], calibration="text.txt", calibration_sequences=4, calibration_window=32
    )
    for bound, own in zip(dense.sites, allocation.sites, strict=True):
        inputs = {"W": bound.weight(), **statistics.site_statistics(bound.site.name, ["X_l2"])}
        keep = mask(CRITERIA[metric].score(bound.site, inputs), MaskRule(own.sparsity))
        zeros = pruned.get_parameter(f"{bound.site.name}.weight") == 0
        assert torch.equal(~zeros, keep)
        assert set(zeros.sum(1).tolist()) == {removed_count(own.sparsity, bound.site.in_features)}


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt"])
def test_other_families(family: str, run: Run, place: Path) -> None:
    save_tiny(place / family, family)
    for name in ("das-size-fair", "block-influence"):
        done = run("prune", family, "--out", "out", "--allocation", name, "--sparsity", 0.5, *SHORT, "--json")
        assert done.code == 0
        step = min(layer["shape"][0] for layer in done.json["layers"])
        assert abs(done.json["removed"] - done.json["prunable"] // 2) < step


def test_evopress_text(run: Run, tiny: Path, place: Path, refused: Callable[..., str]) -> None:
    allocation = evoprune.allocate(str(tiny), "lamp", 0.6)
    write_allocation(allocation, place / "profile.txt")
    words = (tiny, "--allocation", "profile.txt")
    assert "holds neither its budget nor the weights in a level" in refused(*words)
    assert "holds neither its budget nor the weights in a level" in refused(*words, "--sparsity", 0.6)
    assert "it has step" in refused(*words, "--sparsity", 0.6, "--allocation-set", "spread=1")
    done = run("prune", *words, "--sparsity", 0.6, "--allocation-set", "step=1", "--out", "out", *SHORT, "--json")
    assert [layer["sparsity"] for layer in done.json["layers"]] == pytest.approx(
        [site.removed / site.weights for site in allocation.sites]
    )
    assert done.json["allocation"] == {"allocator": "evopress", "parameters": {"step": 1}, "sparsity": 0.6}


def test_evopress_depth_lines(run: Run, tiny: Path, place: Path, refused: Callable[..., str]) -> None:
    (place / "depth.txt").write_text("none\nattn\n")
    words = (tiny, "--allocation", "depth.txt")
    assert "no levels: leave out the step" in refused(*words, "--allocation-set", "step=1")
    done = run("prune", *words, "--out", "out", *SHORT, "--json")
    assert done.code == 0, done.err
    gone = {layer["name"]: layer["sparsity"] for layer in done.json["layers"] if layer["sparsity"]}
    assert gone == {f"model.layers.1.self_attn.{kind}_proj": 1.0 for kind in "qkvo"}
    (place / "depth.txt").write_text("none\nattn\nmlp\n")
    assert "3 depth lines, and this one has 2 blocks" in refused(*words)


def test_wrong_input(run: Run, tiny: Path, place: Path, refused: Callable[..., str]) -> None:
    write_allocation(evoprune.allocate(str(tiny), "er", 0.6), place / "a.json")
    assert run("prune", tiny, "--out", "fits", "--allocation", "a.json", "--sparsity", 0.6, *SHORT).code == 0
    ours = (tiny, "--allocation", "a.json")
    assert "budget is a sparsity of 0.6, not 0.5" in refused(*ours, "--sparsity", 0.5)
    assert "an allocation or a pattern, not both" in refused(*ours, "--pattern", "2:4")
    assert "an allocation or a pattern, not both" in refused(tiny, "--allocation", "owl", "--pattern", "2:4")
    assert "leave out the group 'global'" in refused(*ours, "--group", "global")
    assert "has its parameters in it" in refused(*ours, "--allocation-set", "power=2")
    assert "no allocator 'oww'; did you mean 'owl'" in refused(tiny, "--allocation", "oww")
    assert "no file 'nowhere.json'" in refused(tiny, "--allocation", "nowhere.json")
    assert "no file './nowhere'" in refused(tiny, "--allocation", "./nowhere")
    assert "has no parameter 'spraed'" in refused(tiny, "--allocation", "owl", "--allocation-set", "spraed=1")
    assert "is not KEY=VALUE" in refused(tiny, "--allocation", "owl", "--allocation-set", "spread")
    assert "need an allocation" in refused(tiny, "--allocation-set", "spread=1")
    assert "cannot be reached" in refused(tiny, "--allocation", "uniform", "--sparsity", 0.999)
    assert "no matrix is called 'model.layers.9.*'" in refused(
        tiny, "--allocation", "uniform+", "--allocation-set", "dense=model.layers.9.*"
    )
    (place / "noise.json").write_bytes(bytes(range(256)))
    assert "is no text file" in refused(tiny, "--allocation", "noise.json")
    document = json.loads((place / "a.json").read_text())
    document["sites"][3]["sparsity"] = 1.2
    (place / "high.json").write_text(json.dumps(document))
    assert "self_attn.o_proj is 1.2, outside [0, 1]: " in refused(tiny, "--allocation", "high.json")
    save_tiny(place / "gpt2", "gpt2")
    other = refused("gpt2", "--allocation", "a.json")
    assert "of another model, LlamaForCausalLM and not this GPT2LMHeadModel" in other
    assert "gives transformer.h.0.attn.c_attn no sparsity" in other
    save_tiny(place / "wide", intermediate_size=64)
    assert "mlp.gate_proj is [64, 32] here and [48, 32] there" in refused("wide", "--allocation", "a.json")


def test_the_list(run: Run) -> None:
    rows = {row["name"]: row for row in run("list", "allocators", "--json").json}
    assert set(rows) == set(ALLOCATORS)
    assert {
        "uniform", "uniform+", "er", "erk", "erk+", "lamp", "global-magnitude", "global-wanda", "owl", "alpha-pruning",
        "atp", "dsa", "das", "block-influence", "shortened-llama", "dp",
    } <= set(rows)  # fmt: skip
    assert rows["global-wanda"]["needs"] == ["X_l2"]
    assert rows["atp"]["needs"] == ["loss", "scores"]
    assert rows["owl"]["parameters"] == ["spread=0.08", "outlier=5.0", "granularity=block"]
    assert all(row["what"].endswith(".") for row in rows.values())


def test_python(tiny: Path, place: Path, text: Path) -> None:
    model = evoprune.load_model(str(tiny))
    allocation = evoprune.allocate(
        model, "atp", 0.5, parameters={"evaluations": 2}, calibration=str(text), calibration_sequences=4
    )
    assert isinstance(allocation, evoprune.Allocation)
    pruned = evoprune.prune(model, allocation=allocation, calibration=str(text), calibration_sequences=4)
    assert pruned.allocation == allocation
    path = write_allocation(allocation, place / "a.json")
    assert read_allocation(path) == allocation
    pruned = evoprune.prune(model, metric="magnitude", allocation=path)
    assert pruned.removed == allocation.removed == 15360 // 2
    assert evoprune.evaluate(model, data=str(text), tokens=256).sparsity == 0
    with pytest.raises(InvalidInput, match="change one or the other"):
        evoprune.prune(model, metric="magnitude", allocation=replace(allocation, sparsity=0.7))
    with pytest.raises(InvalidInput, match="outside"):
        evoprune.allocate(model, "owl", 1.0)
