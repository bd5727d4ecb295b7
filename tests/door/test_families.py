"""Allocation searches on models of every family, from the command line to what `prune` makes of the winner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.door.conftest import Run
from tests.models import FAMILIES, save_tiny

pytestmark = pytest.mark.usefixtures("without_report")

QUICK = ("qwen3", "gpt2", "opt")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_the_winner_prunes_to_what_was_measured(family: str, run: Run, story: Path, levels: Path, place: Path) -> None:
    model = save_tiny(place / family, family)
    search = ("search", "allocation", model, "--config", levels, "--executor", "inline", "--run-dir", "run")
    done = run(*search, "--evaluations", 9, "--set", "searcher.seeds=[owl, shortened-llama]")
    assert done.code == 0, done.err
    best = json.loads((place / "run" / "result.json").read_text())["best"]
    calibration = ("--calibration", story, "--calibration-sequences", 4, "--calibration-window", 32)
    pruned = run("prune", model, "--allocation", "run/export/allocation.json", "--out", "out", *calibration, "--json")
    assert pruned.code == 0, pruned.err
    assert pruned.json["removed"] == best["removed"]
    measured = run("eval", "out", "--dense", model, "--data", story, "--window", 32, "--tokens", 4 * 32, "--json").json
    assert measured["loss"] == pytest.approx(best["heldout"]["loss"], rel=1e-6)
    assert measured["kl"] == pytest.approx(best["heldout"]["kl"], rel=1e-4)
