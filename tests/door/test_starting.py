"""Workers that cannot start: a search says why, soon, and does not start them again and again."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path

import pytest

from evoprune.search.metric_run import MetricRun
from evoprune.search.rundir import RunDirectory
from tests.door.conftest import Run

BROKEN = """
class Worker:
    def __init__(self, context):
        raise RuntimeError("the driver of this device is too old")

build = Worker
"""
LONGEST = 30.0  # seconds from Ray's start to the end of the command


@pytest.mark.ray
def test_a_worker_that_cannot_be_made_ends_the_search(
    run: Run, tiny: Path, small: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine list 5: exit code 3, the worker's traceback, within 30 s, and each worker was tried once."""
    (tmp_path / "broken_worker.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(MetricRun, "worker_factory", "broken_worker:build")
    words = ("search", "metric", tiny, "--config", small, "--workers", 2, "--run-dir", "broken")
    done = run("--debug", *words)
    ended = time.time()
    assert done.code == 3
    last = done.err.splitlines()[-1]
    reason = "RuntimeError: the driver of this device is too old"
    assert last.startswith(f"error: no worker can start: {reason}; continue with `evoprune resume ")
    assert 'broken_worker.py", line 4, in __init__' in done.err  # the worker's traceback, because of --debug
    directory = RunDirectory(place / "broken")
    assert directory.state == "failed"
    events = list(directory.read_events())
    refused = [event for event in events if event["event"] == "worker_refused"]
    assert len(refused) == 2
    assert all(event["error"].endswith(reason) and "in __init__" in event["error"] for event in refused)
    (started,) = (event["t"] for event in events if event["event"] == "ray_started")
    assert ended - datetime.fromisoformat(started).timestamp() < LONGEST


@pytest.mark.ray
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus-per-worker", 1.5), "--gpus-per-worker is 1.5; it must be below 1 or a whole number"),
        (("--workers", 2, "--gpus-per-worker", 1024), "2 workers with 1024 GPUs each do not fit on the"),
    ],
)
def test_sizes_that_cannot_be_had_leave_no_run(
    words: tuple[object, ...], said: str, run: Run, tiny: Path, small: Path, place: Path
) -> None:
    """The second is found only when Ray is up and has counted."""
    done = run("search", "metric", tiny, "--config", small, "--run-dir", "sizes", *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith(f"error: {said}")
    assert not (place / "sizes").exists()


def test_auto_without_a_cluster_says_what_to_do(
    run: Run, tiny: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = pytest.importorskip("ray._private.services")

    def nobody(address: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(services, "canonicalize_bootstrap_address", nobody)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = run("search", "metric", tiny, "--config", small, "--address", "auto", "--run-dir", "nowhere")
    assert done.code == 3
    reason = "no Ray cluster runs on this machine: `ray start` here first, or give its --address HOST:PORT"
    assert done.err.splitlines()[-1].startswith(f"error: {reason}")
