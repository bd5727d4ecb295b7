"""`prune --method` and the same in Python: what is written, loaded by others, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import evoprune
from evoprune.fitness.methods import METHODS
from evoprune.fitness.models import load_model
from tests.door.conftest import Run
from tests.models import random_windows, save_tiny

TEXT = ("--calibration-sequences", 4, "--calibration-window", 32)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of four blocks."""
    return save_tiny(tmp_path_factory.mktemp("models") / "four", num_hidden_layers=4)


def test_laco_writes_a_plain_checkpoint(run: Run, four: Path, story: Path, place: Path) -> None:
    words = ("--method", "laco", "--sparsity", 0.5, "--method-set", "norms=merged", "--calibration", story, *TEXT)
    done = run("prune", four, *words, "--out", "out", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert (document["method"], document["form"], document["sparsity"]) == ("laco", "plain", 0.5)
    assert [merge["into"] for merge in document["found"]["merges"]]
    model = AutoModelForCausalLM.from_pretrained(place / "out")
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    assert sum(parameter.numel() for parameter in model.parameters()) == document["parameters"]
    record = json.loads((place / "out" / "evoprune.json").read_text())["recipe"]
    assert record["shape"]["weights"]["parameters"]["norms"] == "merged"
    assert record["found"] == document["found"]
    parameters = {"norms": "merged"}
    again = evoprune.prune_structure(
        str(four),
        "laco",
        sparsity=0.5,
        parameters=parameters,
        calibration=str(story),
        calibration_sequences=4,
        calibration_window=32,
    )
    assert torch.equal(model(random_windows()).logits, again.language_model.model(random_windows()).logits)


def test_what_people_read(run: Run, four: Path, story: Path, place: Path) -> None:
    done = run("prune", four, "--method", "shortgpt", "--calibration", story, *TEXT, "--out", "out")
    assert done.out == f"{place / 'out'}\n"
    assert "(25.00%); plain:" in done.err
    assert "try it: evoprune eval" in done.err
    assert len(load_model(str(place / "out")).blocks()) == 3


def test_methods_are_listed(run: Run) -> None:
    rows = {row["name"]: row for row in run("list", "methods", "--json").json}
    assert rows.keys() == set(METHODS)
    assert "threshold=auto" in rows["laco"]["parameters"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--metric", "wanda"), "--method says by itself what goes: leave out --metric"),
        (("--shape", "shape.json"), "leave out --shape"),
        (("--tokens", "amia"), "leave out --tokens"),
        (("--sparsity", 1.5), "sparsity 1.5 is not between 0 and 1"),
        (("--method-set", "mode"), "--method-set 'mode' is not KEY=VALUE"),
        (("--method-set", "threshold=2"), "threshold of laco 2 is outside [-1, 1]"),
        (("--sparsity", 0.1), "a sparsity of 0.1 is less than one of 4 blocks: give 0.25 or more"),
    ],
)
def test_what_is_refused(
    words: tuple[object, ...], told: str, refused: Callable[..., str], four: Path, story: Path
) -> None:
    text = () if told.endswith("--tokens") else ("--calibration", story, *TEXT)
    assert told in refused("prune", four, "--method", "laco", *text, "--out", "out", *words)


def test_names_and_models_that_do_not_fit(refused: Callable[..., str], four: Path, place: Path) -> None:
    assert "no method 'lacoo'; did you mean 'laco'?" in refused("prune", four, "--method", "lacoo", "--out", "out")
    told = refused("prune", four, "--method-set", "layers=3", "--out", "out")
    assert "--method-set is a parameter of a method: name one by --method" in told
    assert "--form padded goes with --shape, --method or --policy" in refused(
        "prune", four, "--form", "padded", "--out", "out"
    )
    olmo = save_tiny(place / "olmo", "olmo2")
    told = refused("prune", olmo, "--method", "laco", "--out", "out")
    assert "q_norm.weight [32] beside its matrices: it cannot be cut" in told
    bare = save_tiny(place / "bare", num_hidden_layers=0)
    assert "model.layers is empty" in refused("prune", bare, "--method", "laco", "--out", "out")


def test_comp_writes_what_is_evaluated(run: Run, four: Path, story: Path) -> None:
    words = ("--method", "comp", "--sparsity", 0.3, "--method-set", "bound=1", "--calibration", story, *TEXT)
    done = run("prune", four, *words, "--out", "out", "--json")
    assert done.code == 0, done.err
    # A neuron is three vectors of 32, of 4 blocks with 7,680 weights each.
    assert (done.json["method"], done.json["form"]) == ("comp", "compact")
    assert 0.3 * 4 * 7680 <= done.json["removed"] < 0.3 * 4 * 7680 + 96
    assert done.json["found"]["dropped"] == []
    words = ("--dense", four, "--data", story, "--window", 32, "--tokens", 128, "--json")
    assert run("eval", "out", *words).json["kl"] > 0
    masked = run("prune", four, *("--method", "comp", "--sparsity", 0.3, "--method-set", "bound=1"),
                 *("--calibration", story, *TEXT, "--form", "masked", "--out", "zeros"))  # fmt: skip
    assert masked.code == 0, masked.err
    tokens = random_windows()
    logits = [load_model(folder).model(tokens).logits for folder in ("out", "zeros")]
    assert torch.allclose(*logits, atol=1e-4)
