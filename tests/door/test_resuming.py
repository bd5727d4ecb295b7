"""The command that continues a run, and the board that it continues."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import optuna
import pytest

from evoprune.search.rundir import RunDirectory
from evoprune.search.worker_session import Resources
from evoprune.summaries import resume_command
from tests.door.conftest import Done, Run

SECRET = "postgresql+psycopg://me:hunter2@host/board"
SHOWN = "postgresql+psycopg://me:***@host/board"


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (Resources(), ""),
        (Resources(workers=2, gpus_per_worker=0.0), ""),
        (Resources("inline", address="head:6379"), ""),
        (Resources(address="auto"), " --address auto"),
        (
            Resources(workers=2, gpus_per_worker=0.5, address="ray://h:1", insecure_cluster=True),
            " --address ray://h:1 --workers 2 --gpus-per-worker 0.5 --insecure-cluster",
        ),
        (Resources(storage="sqlite:////data/board.db"), " --storage sqlite:////data/board.db"),
        (Resources(address="auto", storage=SECRET), f" --address auto --storage '{SHOWN}'"),
    ],
)
def test_the_command_to_go_on_says_where(resources: Resources, words: str) -> None:
    assert resume_command(Path("a run"), resources) == f"evoprune resume 'a run'{words}"


@pytest.fixture
def stopped(run: Run, tiny: Path, small: Path, without_report: None, monkeypatch: pytest.MonkeyPatch) -> Done:
    """A search with a database in the working folder, stopped while it searched."""
    polls = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr("evoprune.search.session.stop_on_signals", lambda: nullcontext(lambda: next(polls) > 12))
        words = ("--executor", "inline", "--seed", 1, "--run-dir", "run", "--storage", "sqlite:///board.db")
        done: Done = run("search", "metric", tiny, "--config", small, *words)
    assert done.code == 130
    return done


def test_a_board_in_a_file_is_found_from_another_folder(
    run: Run, stopped: Done, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{place / 'board.db'}"
    assert stopped.err.splitlines()[-1].endswith(f"continue with `evoprune resume run --storage {url}`")
    monkeypatch.chdir(tmp_path)
    assert run("resume", place / "run", "--executor", "inline").code == 0
    assert not (tmp_path / "board.db").exists()
    directory = RunDirectory(place / "run")
    assert directory.storage == url
    study = optuna.load_study(study_name=directory.run_id, storage=url)
    assert len(study.trials) == directory.config["evaluations"]


def test_a_board_whose_password_is_not_known_is_missed_aloud(
    run: Run, stopped: Done, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run whose database took a password: the run folder does not have it."""
    directory = RunDirectory(place / "run")
    with directory:
        directory.lock()
        directory.events("info", "board", storage=SHOWN)
    done = run("resume", "run", "--executor", "inline")
    assert done.code == 0
    line = f"the board was in {SHOWN}; give --storage with the password to go on there"
    assert line in done.err
    assert line in [event.get("text") for event in directory.read_events() if event["event"] == "board_trouble"]
    assert (place / "run" / "optuna.log").exists()
