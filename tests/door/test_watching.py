"""Watching a run: `show --follow`, the dashboard, the note and the artifacts that it shows, budgets in minutes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import optuna
import pytest

import evoprune
from evoprune.search.engine.trial_record import TrialRecord
from evoprune.search.publishing import rebuild_board
from evoprune.search.rundir import RunDirectory
from evoprune.search.trials_metric import MetricTrials
from tests.door.conftest import Run

PATIENCE = 300.0


def study(folder: Path) -> optuna.Study:
    """The main study of a run, as anybody can open it."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log")))
    return optuna.load_study(study_name=RunDirectory(folder).run_id, storage=storage)


@contextmanager
def process(*words: object) -> Iterator[subprocess.Popen[str]]:
    """A command of its own, killed at the end."""
    command = [sys.executable, "-m", "evoprune", *map(str, words)]

    def interruptible() -> None:
        # Tests that a shell started in the background ignore SIGINT, and their children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    ) as running:
        try:
            yield running
        finally:
            running.kill()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a dashboard on a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with process("dashboard", folder, "--port", port):
        address = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            try:
                fetch(f"{address}/api/meta")
                break
            except OSError:
                time.sleep(0.1)
        yield address


def fetch(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.read()


def wait_until(condition: Any) -> None:
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def test_the_board_of_a_finished_run(finished: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    found = study(finished)
    result = json.loads((finished / "result.json").read_text())
    assert len(found.trials) == result["evaluations"] == found.user_attrs["evaluations"]
    history = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    birth = {line["birth"]: line for line in history}
    for trial in found.trials:
        parents = [other for other in found.trials if other.user_attrs["birth"] in trial.user_attrs["parents"]]
        known = [other.user_attrs["generation"] for other in parents]
        assert trial.user_attrs["generation"] == (max(known) + 1 if known else 0)
        assert trial.user_attrs["expression"] == birth[trial.user_attrs["birth"]]["expression"]
        assert trial.datetime_start <= trial.datetime_complete
    note = dashboard.get_note(found)
    assert result["best"]["latex"] in note and f"```python\n{result['best']['expression']}\n```" in note
    assert all(f"| {name} |" in note for name in ("dense", "wanda", "magnitude", "**evolved winner**"))
    assert "| held-out text | perplexity | loss | KL | minus winner's |" in note
    listed = {artifact.filename: artifact.artifact_id for artifact in optuna.artifacts.get_all_artifact_meta(found)}
    assert {"metric.py", "metric.json", "metric.tex", "report.html", "formula.svg", "convergence.svg"} <= set(listed)
    assert f"(/artifacts/{found._study_id}/{listed['formula.svg']})" in note
    assert (finished / "artifacts" / listed["metric.py"]).read_bytes() == (finished / "export/metric.py").read_bytes()


def test_the_dashboard_command(run: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    asked: list[Any] = []

    def run_server(storage: str, host: str, port: int, artifact_store: Any) -> None:
        asked.append((storage, host, port))

    monkeypatch.setattr(dashboard, "run_server", run_server)
    done = run("dashboard", folder)
    assert (done.code, done.out) == (0, "")
    assert "http://127.0.0.1:8080/dashboard" in done.err
    assert asked == [(str(folder / "optuna.log"), "127.0.0.1", 8080)]

    before, note = study(folder).trials, dashboard.get_note(study(folder))
    (folder / "optuna.log").unlink()
    assert "--rebuild writes it" in run("dashboard", folder).err
    assert run("dashboard", folder, "--rebuild", "--port", 9000).code == 0
    for old, new in zip(before, study(folder).trials, strict=True):
        for name in ("number", "state", "values", "params", "user_attrs", "intermediate_values"):
            assert getattr(old, name) == getattr(new, name)
        if old.intermediate_values:  # by which the evaluation log knows it
            assert (old.datetime_start, old.datetime_complete) == (new.datetime_start, new.datetime_complete)
    assert len(dashboard.get_note(study(folder))) == len(note)

    database = f"sqlite:///{tmp_path / 'board.db'}"
    assert run("dashboard", folder, "--rebuild", "--storage", database).code == 0
    assert asked[-1] == (database, "127.0.0.1", 8080)
    stored = optuna.load_study(study_name=RunDirectory(folder).run_id, storage=database)
    assert [trial.user_attrs for trial in stored.trials] == [trial.user_attrs for trial in before]

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "optuna_dashboard", None)
        absent = run("dashboard", folder)
    assert absent.code == 2
    assert absent.err == "error: the dashboard is not installed: pip install 'evoprune[dashboard]'\n"


def test_the_dashboard_gives_constraints_notes_and_artifacts(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine list 12, over HTTP; a run's own board, but that its first candidates are said to exceed limits."""
    dashboard = pytest.importorskip("optuna_dashboard")
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    limits = [(0.5, -1.0), (0.0, -0.25)]
    records = MetricTrials.records

    def limited(*arguments: Any) -> Iterator[TrialRecord]:
        for record, constraints in itertools.zip_longest(records(*arguments), limits, fillvalue=()):
            yield dataclasses.replace(record, constraints=constraints)

    monkeypatch.setattr(MetricTrials, "records", limited)
    rebuild_board(RunDirectory(folder), None)
    with served(folder) as address:
        (main, _) = json.loads(fetch(f"{address}/api/studies"))["study_summaries"]
        shown = json.loads(fetch(f"{address}/api/studies/{main['study_id']}"))
        constraints = [tuple(trial["constraints"]) for trial in shown["trials"]]
        assert constraints == limits + [()] * (len(study(finished).trials) - len(limits))
        assert shown["note"]["body"] == dashboard.get_note(study(folder)) != ""
        listed = {artifact["filename"]: artifact["artifact_id"] for artifact in shown["artifacts"]}
        for name in ("metric.py", "report.html"):
            given = fetch(f"{address}/artifacts/{main['study_id']}/{listed[name]}")
            assert given == next(folder.rglob(name)).read_bytes()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_the_dashboard_opens_to_others_only_when_told_so(
    host: str, run: Run, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    asked: list[str] = []
    monkeypatch.setattr(dashboard, "run_server", lambda storage, host, port, artifact_store: asked.append(host))
    refused = run("dashboard", finished, "--host", host)
    assert (refused.code, asked) == (2, [])
    assert "deletes the study" in refused.err and "--insecure" in refused.err and refused.err.count("\n") == 1
    allowed = run("dashboard", finished, "--host", host, "--insecure")
    assert (allowed.code, asked) == (0, [host])
    assert "warning: everyone who reaches" in allowed.err
    assert run("dashboard", finished, "--host", "localhost").code == 0


def test_following_a_run_that_is_over_ends_at_once(run: Run, finished: Path) -> None:
    done = run("show", finished, "--follow", "--json")
    assert done.code == 0
    assert "24 of 24 evaluations" in done.err and "best" in done.err
    assert done.json["state"] == "finished"


def test_whoever_stops_following_leaves_the_run_alone(
    run: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(range(2))

    def enough(seconds: float) -> None:
        if next(moments):
            raise KeyboardInterrupt
        driver.events("warning", "worker_refused", worker=3, error="its evoprune is another")
        driver.events("info", "no_gpu", text="no GPU yet")

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    with RunDirectory(folder) as driver:
        driver.lock()
        monkeypatch.setattr("evoprune.following.time.sleep", enough)
        done = run("show", folder, "--follow")
        assert done.code == 130
        assert "a worker was refused: its evoprune is another\nno GPU yet\n" in done.err
        assert done.err.splitlines()[-1] == f"interrupted: no longer following {driver.run_id}, which goes on"
        assert driver.state == "running"


@pytest.mark.slow
def test_a_live_search_is_seen_from_outside(tiny: Path, small: Path, place: Path) -> None:
    """Driver, followers and dashboard are processes of their own; the dashboard is asked over HTTP, as by a browser."""
    pytest.importorskip("optuna_dashboard")
    words = ("search", "metric", tiny, "--config", small, "--executor", "inline", "--run-dir", "live")
    with process(*words, "--set", "evaluations=null", "--minutes", "60") as search:  # it ends when all have looked
        live = place / "live"
        wait_until(lambda: (live / "history.jsonl").exists() and (live / "history.jsonl").stat().st_size)
        with process("show", live, "--follow") as leaver, process("show", live, "--follow") as follower:
            with served(live) as address:
                (main, front) = json.loads(fetch(f"{address}/api/studies"))["study_summaries"]
                assert front["study_name"] == f"{main['study_name']}/front"

                def detail() -> Any:
                    return json.loads(fetch(f"{address}/api/studies/{main['study_id']}"))

                wait_until(lambda: "Searching: the best so far" in detail()["note"]["body"])
                trials = len(detail()["trials"])
                wait_until(lambda: len(detail()["trials"]) > trials)
                trial = detail()["trials"][0]
                assert {"expression", "generation", "operator"} <= {entry["key"] for entry in trial["user_attrs"]}
                assert len(trial["intermediate_values"]) == 3
            leaver.send_signal(signal.SIGINT)
            assert leaver.wait(PATIENCE) == 130
            assert search.poll() is None
            search.send_signal(signal.SIGTERM)
            assert search.wait(PATIENCE) == 130
            told = follower.communicate(timeout=PATIENCE)[1]
            assert follower.returncode == 0
    assert "searching" in told and "\ninterrupted\n" in told and told.rstrip().endswith("deaths 0")
    assert " evaluations " in told and "  best " in told


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_shows_the_winner(finished: Path, tmp_path: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    with served(finished) as address:
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --virtual-time-budget=15000 --dump-dom"
        )
        command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        pages = {
            name: subprocess.run(
                [*command, f"{address}/dashboard/studies/0/{name}"], capture_output=True, text=True, timeout=PATIENCE
            ).stdout
            for name in ("note", "trials")
        }
    assert "Winner" in pages["note"] and f"{result['dense']['heldout']['perplexity']:,.2f}" in pages["note"]
    assert "/artifacts/0/" in pages["note"]  # pictures
    assert "Intermediate Values" in pages["trials"] and "generation" in pages["trials"]


@pytest.mark.slow
def test_a_database_that_never_answers_costs_the_board_only(
    run: Run, tiny: Path, small: Path, place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setattr("evoprune.sessions.check_storage", lambda url, reach=True: None)
    url = "postgresql+psycopg://me:hunter2@127.0.0.1:1/board"
    monkeypatch.setattr(sys, "argv", ["evoprune", "search", "metric", "--storage", url])
    words = ("search", "metric", tiny, "--config", small, "--executor", "inline", "--seed", 1, "--run-dir", "away")
    done = run(*words, "--storage", url)
    assert done.code == 0
    assert (place / "away" / "history.jsonl").read_bytes() == (finished / "history.jsonl").read_bytes()
    assert "the search goes on" in done.err and "dashboard RUN --rebuild" in done.err
    assert "hunter2" not in done.err + done.out
    for path in (place / "away").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    asked = run("dashboard", "away")
    assert asked.code == 2 and "give --storage with the password" in asked.err


@pytest.mark.parametrize(
    ("words", "evaluations", "minutes"),
    [
        ((), 250, None),
        (("--minutes", 5), None, 5.0),
        (("--evaluations", 30), 30, None),
        (("--evaluations", 30, "--minutes", 5), 30, 5.0),
        (("--set", "minutes=5"), None, 5.0),
    ],
)
def test_budgets(words: tuple[Any, ...], evaluations: int | None, minutes: float | None, run: Run) -> None:
    document = run("search", "metric", "--dry-run", "--json", *words).json
    assert (document["evaluations"], document["minutes"]) == (evaluations, minutes)


def test_a_search_without_an_end_is_refused(run: Run) -> None:
    done = run("search", "metric", "--dry-run", "--set", "evaluations=null")
    assert done.code == 2 and "give --evaluations, --minutes or both" in done.err


@pytest.mark.parametrize(("spent", "evaluations"), [(59.5, 500), (0.0, 30)])
def test_a_resumed_search_has_the_minutes_that_are_left(
    spent: float, evaluations: int, run: Run, tiny: Path, small: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both budgets: the evaluations end it, unless the minutes are nearly gone from an earlier session."""
    monkeypatch.setattr("evoprune.sessions.write_report", lambda run: None)
    done = run("search", "metric", tiny, "--config", small, "--executor", "inline", "--dry-run", "--minutes", 1)
    (place / "config.yaml").write_text(done.out.replace("evaluations: 24", f"evaluations: {evaluations}"))
    config = evoprune.configuration.metric_config({}, files=[place / "config.yaml"])
    made = RunDirectory.create("metric", config.model_dump(mode="json"), {}, run_dir=place / "early")
    made.close()
    began = datetime.now(timezone.utc) - timedelta(hours=1)
    ended = began + timedelta(seconds=spent)
    with (made.path / "events.jsonl").open("w") as file:
        for moment, event in [(began, "started"), (began, "phase"), (ended, "interrupted")]:
            line = {"t": moment.isoformat(), "level": "info", "event": event, "phase": "searching"}
            file.write(json.dumps(line) + "\n")
    assert made.phase_seconds("searching") == pytest.approx(spent)
    done = run("resume", "early", "--executor", "inline", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert document["evaluations"] >= 1
    assert (document["evaluations"] == evaluations) is (spent == 0)
