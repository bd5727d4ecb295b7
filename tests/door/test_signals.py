"""Ctrl-C on a real process: the state is saved, the command to go on is printed, and the history ends up the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evoprune.search.rundir import RunDirectory

EVALUATIONS = 60
PATIENCE = 600.0


def search(tiny: Path, small: Path, run_dir: Path | str, *more: str) -> subprocess.Popen[str]:
    words = ["search", "metric", str(tiny), "--config", str(small), "--run-dir", str(run_dir), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "evoprune", *words, "--evaluations", str(EVALUATIONS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_worker_niceness": "0"},  # a busy machine would let workers starve
        start_new_session=True,  # so that a test can signal all of it, as a terminal does
    )


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """The history of a search that nobody stopped, once a test has made it."""
    return {}


def undisturbed(whole: dict[str, bytes], tiny: Path, small: Path, place: Path) -> bytes:
    if "history" not in whole:
        search(tiny, small, place / "whole", "--executor", "inline").communicate(timeout=PATIENCE)
        whole["history"] = (place / "whole" / "history.jsonl").read_bytes()
    return whole["history"]


def wait_for_births(run: Path, process: subprocess.Popen[str]) -> None:
    """Until the first commit, which comes after a few evaluations, or the end."""
    state = run / "state.json"
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up and process.poll() is None:
        if state.exists():
            return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "whom", "more"),
    [
        ((signal.SIGINT,), "driver", ("--executor", "inline")),
        ((signal.SIGTERM,), "driver", ("--executor", "inline")),
        ((signal.SIGINT, signal.SIGTERM), "driver", ("--executor", "inline")),
        pytest.param((signal.SIGTERM,), "driver", ("--workers", "2"), marks=pytest.mark.ray),
        pytest.param((signal.SIGINT,), "all", ("--workers", "2"), marks=pytest.mark.ray),
        pytest.param((signal.SIGINT, signal.SIGTERM), "driver", ("--workers", "2"), marks=pytest.mark.ray),
    ],
    ids=["SIGINT", "SIGTERM", "twice", "SIGTERM with workers", "Ctrl-C with workers", "twice with workers"],
)
def test_stopped_and_continued(
    numbers: tuple[int, ...],
    whom: str,
    more: tuple[str, ...],
    tiny: Path,
    small: Path,
    place: Path,
    whole: dict[str, bytes],
) -> None:
    process = search(tiny, small, "stopped", *more)
    wait_for_births(place / "stopped", process)
    for number in numbers:  # the second insists, and nothing is waited for any more
        os.killpg(process.pid, number) if whom == "all" else process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1].endswith("continue with `evoprune resume stopped`")
    stopped = RunDirectory(place / "stopped")
    assert stopped.state == "interrupted"
    assert 0 < len(list(stopped.history())) < EVALUATIONS

    command = [sys.executable, "-m", "evoprune", "resume", "stopped", "--executor", "inline"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    assert (place / "stopped" / "history.jsonl").read_bytes() == undisturbed(whole, tiny, small, place)
