"""Ctrl-C on a real process: the state is saved, the command to go on is printed, and the history ends up the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evoprune.search.rundir import RunDirectory

EVALUATIONS = 60
PATIENCE = 600.0


def search(tiny: Path, small: Path, run_dir: str, *more: str) -> subprocess.Popen[str]:
    words = ["search", "metric", str(tiny), "--config", str(small), "--run-dir", run_dir, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "evoprune", *words, "--evaluations", str(EVALUATIONS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_births(run: Path, process: subprocess.Popen[str]) -> None:
    """Until the first commit, which comes after a few evaluations, or the end."""
    history = run / "history.jsonl"
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up and process.poll() is None:
        if history.exists() and history.stat().st_size:
            return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGINT, ("--executor", "inline")),
        (signal.SIGTERM, ("--executor", "inline")),
        pytest.param(signal.SIGINT, ("--workers", "2"), marks=pytest.mark.ray),
    ],
    ids=["SIGINT", "SIGTERM", "SIGINT with workers"],
)
def test_stopped_and_continued(number: int, more: tuple[str, ...], tiny: Path, small: Path, place: Path) -> None:
    process = search(tiny, small, "stopped", *more)
    wait_for_births(place / "stopped", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1].endswith("continue with `evoprune resume stopped`")
    stopped = RunDirectory(place / "stopped")
    assert stopped.state == "interrupted"
    assert 0 < len(list(stopped.history())) < EVALUATIONS

    command = [sys.executable, "-m", "evoprune", "resume", "stopped", "--executor", "inline"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    whole = search(tiny, small, "whole", "--executor", "inline")
    whole.communicate(timeout=PATIENCE)
    assert (place / "stopped" / "history.jsonl").read_bytes() == (place / "whole" / "history.jsonl").read_bytes()
