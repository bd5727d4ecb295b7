"""Signals to real processes: every command ends in one line and exit code 130, and leaves nothing half-written.

Of a search the state is saved, the command to go on is printed, and the history ends up the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evoprune.search.rundir import RunDirectory
from evoprune.search.signals import STOPPED
from tests.door.conftest import tree

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


# A process that says when it has got to a certain place, and stays there.
AT = """
import os, sys, time
def reached(*_, **__):
    os.write(1, b"here\\n")  # past what leads stdout elsewhere
    time.sleep(600)
{patch}
sys.argv[1:] = {words!r}
from evoprune.__main__ import main
sys.exit(main())
"""
IMPORTS = "from importlib.abc import MetaPathFinder\n" + (
    "class Finder(MetaPathFinder):\n"
    "    def find_spec(self, name, path, target=None):\n"
    "        if name == 'typer': reached()\n"
    "sys.meta_path.insert(0, Finder())"
)
READS = "import evoprune.api; evoprune.api.load_metric = evoprune.api.loaded = reached"
COLLECTS = "import evoprune.fitness.statistics_store as store; store._save = reached"
WRITES = "import evoprune.fitness.checkpoint as checkpoint; checkpoint._check_reload = reached"
# What becomes an error of something else on its way.
FAILS = """
import evoprune.api
def failing(*_, **__):
    try:
        reached()
    except KeyboardInterrupt:
        raise RuntimeError("odd") from None
evoprune.api.loaded = failing
"""


@pytest.mark.parametrize(
    ("number", "words", "patch"),
    [
        (signal.SIGINT, ["list", "criteria"], IMPORTS),
        (signal.SIGTERM, ["eval"], READS),
        (signal.SIGINT, ["eval"], FAILS),
        (signal.SIGINT, ["stats", "--statistics", "X_l2", "--calibration-window", "32"], COLLECTS),
        (signal.SIGTERM, ["prune", "--metric", "magnitude", "--out", "out"], WRITES),
    ],
    ids=["imports", "eval", "an error in its place", "stats", "prune"],
)
def test_a_command_ends_at_once(
    number: signal.Signals, words: list[str], patch: str, tiny: Path, story: Path, place: Path, tmp_path: Path
) -> None:
    command, *options = words
    if command != "list":
        options.insert(0, str(tiny))
    if command == "stats":
        options += ["--calibration", str(story)]
    process = subprocess.Popen(
        [sys.executable, "-c", AT.format(patch=patch, words=[command, *options])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "EVOPRUNE_CACHE": str(tmp_path / "cache")},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n", process.communicate()
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, f"interrupted: {STOPPED}\n")
    assert tree(place) == set()
    assert not [path for path in tree(tmp_path / "cache") if path.split("/")[-1].startswith(".")]
