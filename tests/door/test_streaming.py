"""`--memory`: the same checkpoint and the same loss as without, from the command line and in Python."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import evoprune
from evoprune.metrics.errors import Interrupted, InvalidInput
from tests.door.conftest import Run

SHORT = ("--calibration-sequences", 4, "--calibration-window", 32)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_the_same_checkpoint_and_the_same_loss(run: Run, tiny: Path, story: Path, place: Path) -> None:
    words = ("prune", tiny, "--calibration", story, *SHORT, "--compressor", "refit", "--accumulation", "path", "--json")
    whole = run(*words, "--out", "whole").json
    done = run(*words, "--out", "out", "--memory", "1GiB")
    assert done.code == 0, done.err
    assert done.json == whole | {"out": str(place / "out")}
    found, expected = weights(place / "out"), weights(place / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for name in ("recipe.yaml", "evoprune.json", "config.json"):
        assert (place / "out" / name).read_bytes() == (place / "whole" / name).read_bytes()
    reports = [json.loads((place / folder / "sparsity_report.json").read_text()) for folder in ("out", "whole")]
    for row in (*reports[0]["layers"], *reports[1]["layers"]):
        assert row.pop("seconds") > 0 and row["path_error"] > 0
        del row["peak_bytes"]
    assert reports[0] == reports[1] and reports[0]["accumulation"] == "path"
    assert "`sparsity_report.json`" in (place / "out" / "README.md").read_text()
    # Its recipe makes it again with the whole model in memory.
    assert run("prune", tiny, "--recipe", "out", "--calibration", story, "--out", "again").code == 0
    assert all(torch.equal(value, expected[name]) for name, value in weights(place / "again").items())

    words = ("eval", "out", "--dense", tiny, "--data", story, "--window", 32, "--tokens", 640, "--json")
    assert run(*words).json == run(*words, "--memory", "500MB").json


def test_an_allocation_from_a_file(run: Run, tiny: Path, story: Path, place: Path) -> None:
    found = evoprune.allocate(str(tiny), "erk", 0.5)
    done = evoprune.prune_streamed(
        str(tiny), memory=1 << 30, out=place / "out", allocation=found, calibration=str(story),
        calibration_sequences=4, calibration_window=32,
    )  # fmt: skip
    assert [layer.removed for layer in done.layers] == [site.removed for site in found.sites]
    assert (done.continued, done.discarded) == (0, False)


def test_bits_from_a_file_beside_a_pattern(tiny: Path, story: Path, place: Path) -> None:
    text: dict[str, Any] = {"calibration": str(story), "calibration_sequences": 4, "calibration_window": 32}
    given: dict[str, Any] = {"pattern": "2:4", "compressor": "sparsegpt", **text}
    found = evoprune.allocate(str(tiny), "dp", bits=3.5, **given)
    whole = evoprune.prune(str(tiny), allocation=found, out="whole", **given)
    done = evoprune.prune_streamed(str(tiny), memory=1 << 30, allocation=found, out="out", **given)
    assert done.layers == whole.layers
    assert {layer.bits for layer in done.layers} == {site.bits for site in found.sites} != {None}
    kept, expected = weights(place / "out"), weights(place / "whole")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    rows = json.loads((place / "out" / "sparsity_report.json").read_text())["layers"]
    assert [(row["pattern"], row["bits"]) for row in rows] == [("2:4", site.bits) for site in found.sites]


def test_an_interrupted_command_goes_on(run: Run, tiny: Path, story: Path, place: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("pruning blocks", 1):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"stays in .*\.out\.streaming, and the same command goes on"):
        evoprune.prune_streamed(
            str(tiny), memory=1 << 30, out="out", calibration=str(story), calibration_sequences=4,
            calibration_window=32, progress=stop,
        )  # fmt: skip
    words = ("prune", tiny, "--calibration", story, *SHORT, "--memory", "1GiB")
    assert "went on where an interrupted run had stopped: 1 block was written" in run(*words, "--out", "out").err
    assert [path.name for path in place.iterdir()] == ["out"]
    assert "went on" not in run(*words, "--out", "out", "--sparsity", 0.6).err


def test_what_needs_the_whole_model(refused: Callable[..., str], tiny: Path) -> None:
    prune = ("prune", tiny, "--out", "out", "--memory", "1GiB")
    assert "is no size" in refused("prune", tiny, "--out", "out", "--memory", "much")
    assert "an allocator looks at the whole model" in refused(*prune, "--allocation", "owl")
    assert "bits are shared out over the whole model" in refused(*prune, "--compressor", "obq", "--bits", 4)
    assert "a recovery trains the whole model" in refused(*prune, "--recovery", "full")
    assert "G_l2 is a gradient" in refused(*prune, "--metric", "mul(abs(W),G_l2)")
    assert "leave out --memory" in refused(*prune, "--compressor", "scap", "--form", "plain")
    assert "give --form plain" in refused(*prune, "--compressor", "armor", "--pattern", "2:4")
    assert "leave out --memory" in refused(*prune, "--components", "language_model")
    assert "leave out --memory" in refused(*prune, "--method", "shortgpt")
    assert "tasks and samples need the whole model" in refused("eval", tiny, "--memory", "1GiB", "--samples", 2)
    with pytest.raises(InvalidInput, match="a loaded model is in memory"):
        evoprune.evaluate(evoprune.load_model(str(tiny)), memory="1GiB")


def test_too_little_memory(refused: Callable[..., str], tiny: Path, story: Path) -> None:
    said = refused("prune", tiny, "--out", "out", "--memory", "1MB", "--calibration", story, *SHORT)
    assert "are too little to stream this: give --memory" in said
    said = refused("eval", tiny, "--memory", "1MB", "--data", story, "--window", 32)
    assert "are too little to stream this: give --memory" in said


@pytest.mark.slow
def test_a_quarter_of_the_weights_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, of whose private memory what it held after its imports is subtracted."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    pruning, evaluating = (figure.value for figure in importlib.import_module("streaming_memory").measure())
    assert 0.2 < pruning < 1
    assert 0.1 < evaluating < 1
