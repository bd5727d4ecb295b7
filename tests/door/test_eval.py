"""`eval` beyond perplexity: samples, and tasks."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.door.conftest import Run
from tests.tasks import save_tasks

EVAL = ("--data", "story.txt", "--window", 16, "--tokens", 64)


@pytest.fixture(autouse=True)
def text(place: Path, story: Path) -> None:
    (place / "story.txt").symlink_to(story)


def test_samples_stand_side_by_side(run: Run, tiny: Path, story: Path) -> None:
    given = ("eval", tiny, *EVAL, "--samples", 2, "--sample-tokens", 3)
    alone = run(*given, "--json")
    assert alone.code == 0
    assert [list(sample) for sample in alone.json["samples"]] == [["prompt", "continuation", "dense"]] * 2
    assert all(s["prompt"] in story.read_text() and s["dense"] is None for s in alone.json["samples"])
    beside = run(*given, "--dense", tiny, "--json").json
    assert [sample["dense"] for sample in beside["samples"]] == [s["continuation"] for s in alone.json["samples"]]
    assert beside["kl"] == pytest.approx(0, abs=1e-6)
    shown = run(*given, "--dense", tiny).out
    assert "prompt" in shown and "dense" in shown and "continuation" in shown
    assert "samples" not in run("eval", tiny, *EVAL, "--json").json


def test_tasks_are_refused_in_one_line(
    refused: Callable[..., str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tasks(tmp_path / "tasks")
    monkeypatch.setattr("evoprune.fitness.tasks.find_spec", lambda name: None)
    said = "tasks need lm-eval: pip install 'evoprune[tasks]'"
    assert said in refused("eval", tiny, "--tasks", "birds", "--tasks-path", folder)
    assert "no folder of tasks" in refused("eval", tiny, "--tasks", "birds", "--tasks-path", "nowhere")
    assert "limit 0 is too small" in refused("eval", tiny, "--tasks", "birds", "--limit", 0)
    with (folder / "birds.yaml").open("a") as stream:
        stream.write("process_docs: !function helpers.some\n")
    assert "--trust-remote-code" in refused("eval", tiny, "--tasks", "birds", "--tasks-path", folder)
    assert "samples need as many windows" in refused("eval", tiny, *EVAL, "--samples", 99)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_tasks_stand_beside_perplexity(run: Run, tiny: Path, tmp_path: Path) -> None:
    given = ("eval", tiny, *EVAL, "--tasks", "birds", "--tasks-path", save_tasks(tmp_path / "tasks"), "--limit", 4)
    done = run(*given, "--dense", tiny, "--json")
    assert done.code == 0, done.err
    assert list(done.json["tasks"]["birds"]) == ["acc"]
    assert list(done.json["tasks"]["birds"]["acc"]) == ["value", "stderr"]
    assert done.json["dense_tasks"] == done.json["tasks"]
    assert done.json["perplexity"] > 1
    assert done.err == ""
    shown = run(*given, "--dense", tiny).out
    assert "birds" in shown and "±" in shown and "dense" in shown
