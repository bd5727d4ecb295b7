"""A metric search none of whose candidates has a fitness."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from evoprune.search.metric_run import MetricRun
from tests.door.conftest import Run

ROOT = Path(__file__).parents[2]
EVALUATIONS = 80  # enough for every point of the first tuner, and for children of nobody


@pytest.fixture
def hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no worker finds a fitness."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(MetricRun, "worker_factory", "tests.search.hopeless:build")


def search(run: Run, model: Path, config: Path, name: str, *words: object) -> bytes:
    """The history of a search that has to fail."""
    done = run("search", "metric", model, "--config", config, "--run-dir", name, "--evaluations", EVALUATIONS, *words)
    assert (done.code, done.out) == (2, "")
    last = done.err.splitlines()[-1]
    assert last == "error: no candidate could be evaluated; `evoprune show` counts the reasons"
    return Path(name, "history.jsonl").read_bytes()


def test_it_ends_with_a_line_and_the_reasons(hopeless: None, run: Run, tiny: Path, small: Path, place: Path) -> None:
    history = search(run, tiny, small, "run", "--executor", "inline")
    measured = [line for line in map(json.loads, history.splitlines()) if "same_as" not in line]
    assert len(measured) == EVALUATIONS
    assert {line["reason"] for line in measured} == {"NONFINITE"}
    shown = run("show", "run", "--json").json
    assert (shown["state"], shown["best"], shown["evaluations"]) == ("failed", None, EVALUATIONS)
    assert run("resume", "run", "--executor", "inline").code == 2
    assert (place / "run" / "history.jsonl").read_bytes() == history


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_it_ends_alike(hopeless: None, run: Run, tiny: Path, small: Path) -> None:
    inline = search(run, tiny, small, "inline", "--executor", "inline")
    assert search(run, tiny, small, "ray", "--workers", 2) == inline
