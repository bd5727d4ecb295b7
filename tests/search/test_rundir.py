"""A run's folder: made whole or not at all, found by name, driven by one process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.events import EventLog
from evoprune.search.engine.executor import Outcome
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.engine.lock import RunLock
from evoprune.search.rundir import RunDirectory, list_runs


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVOPRUNE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def make(**options: Path) -> RunDirectory:
    return RunDirectory.create("metric", {"seed": 3, "sparsity": 0.6, "lr": 1e-5}, {"torch": "2.13"}, **options)


def test_a_new_run_says_what_it_is_before_anything_heavy(runs: Path) -> None:
    run = make()
    assert run.path.parent == runs
    assert re.fullmatch(r"\d{8}-\d{6}-metric-[0-9a-f]{4}", run.run_id)
    assert run.path.name == run.run_id
    assert run.identity["torch"] == "2.13"
    assert (run.config, run.kind, run.state) == ({"seed": 3, "sparsity": 0.6, "lr": 1e-5}, "metric", "running")
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "run.json", "run.lock", "events.jsonl"}


def test_a_folder_of_ones_choice_must_be_new_or_empty(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    run = make(run_dir=tmp_path / "mine")
    assert run.path == tmp_path / "mine"
    with pytest.raises(InvalidInput, match=r"is not empty.*evoprune resume"):
        make(run_dir=tmp_path / "mine")
    assert RunDirectory.open(tmp_path / "mine").run_id == run.run_id


def test_runs_are_found_by_folder_id_and_latest(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no run in"):
        RunDirectory.open()
    first, second = make(), make()
    assert RunDirectory.open().run_id == second.run_id
    assert RunDirectory.open(first.run_id).path == first.path
    assert RunDirectory.open(str(first.path)).run_id == first.run_id
    (runs / "notes").mkdir()
    (runs / "stray.txt").write_text("")
    assert [run.run_id for run in list_runs()] == [first.run_id, second.run_id]
    assert list_runs(tmp_path / "absent") == []


@pytest.mark.parametrize("name", ["", "..", "absent", "/nowhere/at/all", "folder", "damaged", "file"])
def test_what_is_not_a_run_is_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text('{"run": "x"}')
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=r"no run|not a run folder") as caught:
        RunDirectory.open(name)
    assert "\n" not in str(caught.value)


def test_a_run_ends_as_it_ended(tmp_path: Path) -> None:
    finished, interrupted, failed = make(), make(), make()
    finished.write_result({"best": {"fitness": 0.5}})
    with pytest.raises(FileExistsError):
        finished.write_result({})
    failed.events("error", "failed", text="no worker can start")
    assert finished.state == "running"
    for run in (finished, interrupted, failed):
        run.close()
    assert [run.state for run in list_runs()] == ["finished", "interrupted", "failed"]
    assert (RunDirectory.open(finished.path).result or {})["best"] == {"fitness": 0.5}
    failed.lock()
    failed.events("info", "resumed")
    failed.close()
    assert failed.state == "interrupted"


DRIVER = """
import sys, time
from evoprune.metrics.errors import InvalidInput
from evoprune.search.rundir import RunDirectory
run = RunDirectory.open(sys.argv[1])
try:
    run.lock()
except InvalidInput as problem:
    print(problem)
    sys.exit(problem.exit_code)
print("driving", flush=True)
time.sleep(60)
"""


def test_a_run_has_one_driver_and_a_killed_one_leaves_no_lock() -> None:
    run = make()
    command = [sys.executable, "-c", DRIVER, str(run.path)]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"is locked: process {os.getpid()} is running it" in second.stdout
    run.close()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "driving\n"
        assert run.state == "running"
        with pytest.raises(InvalidInput, match=f"locked: process {driver.pid}"):
            run.lock()
        driver.send_signal(signal.SIGKILL)
    assert run.state == "interrupted"
    run.lock()
    assert run.state == "running"


def test_asking_for_the_state_never_keeps_a_driver_out() -> None:
    run = make()
    run.close()
    reader = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom evoprune.search.rundir import RunDirectory\n"
         "run = RunDirectory.open(sys.argv[1])\nprint(flush=True)\nwhile True: run.state", str(run.path)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert reader.stdout is not None
        reader.stdout.readline()
        for _ in range(10):
            run.lock()
            run.close()
    finally:
        reader.kill()
        reader.communicate()


def test_identity_grows_but_does_not_change() -> None:
    run = make()
    run.add_identity(model="abc", shape=(1, 2))
    run.add_identity(model="abc", shape=(1, 2))
    assert RunDirectory.open(run.path).identity["shape"] == [1, 2]
    with pytest.raises(InvalidInput, match=r"made with another model.*--fork"):
        RunDirectory.open(run.path).add_identity(model="xyz")


def test_commits_and_restores() -> None:
    run = make()
    assert run.restore() is None
    run.commit(['{"birth":0}', '{"birth":1}'], {"applied": 2})
    run.close()
    again = RunDirectory.open(run.path)
    assert again.peek() == {"applied": 2}
    assert [birth["birth"] for birth in again.history()] == [0, 1]
    again.lock()
    assert again.restore() == {"applied": 2}


def test_events_are_notes_with_a_time() -> None:
    run = make()
    run.events("warning", "worker_lost", worker=1, text="ä\nb", path=Path("x"))
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(b'{"t": "torn')
    run.events("info", "resumed")
    events = list(run.read_events())
    assert [event["event"] for event in events] == ["started", "worker_lost", "resumed"]
    assert events[1]["text"] == "ä\nb"
    assert len((run.path / "events.jsonl").read_text().splitlines()) == 4


def test_seconds_are_those_at_work() -> None:
    run = make()
    time.sleep(0.05)
    assert 0.05 <= run.seconds < 5
    lines = [
        {"t": "2025-01-01T00:00:00.000+00:00", "level": "info", "event": "started"},
        {"t": "2025-01-01T00:00:10.000+00:00", "level": "info", "event": "interrupted"},
        {"t": "2025-01-02T00:00:00.000+00:00", "level": "info", "event": "resumed"},
        {"t": "2025-01-02T00:00:05.500+00:00", "level": "info", "event": "finished"},
    ]
    (run.path / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run.close()
    assert run.seconds == 15.5


def test_a_disk_that_takes_nothing_leaves_nothing(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InvalidInput, match=r"cannot write.*no space left on device"):
            make()
        with pytest.raises(InvalidInput, match="cannot write"):
            make(run_dir=tmp_path / "mine")
    assert not runs.exists()
    assert list((tmp_path / "mine").iterdir()) == []
    with pytest.raises(InvalidInput, match="cannot write"):
        make(run_dir=Path("/proc/no/run/here"))


def test_nothing_in_a_run_folder_is_a_pickle() -> None:
    run = make()
    log = EvaluationLog(run.path / "evaluations.wal")
    log.append("k", Outcome("k", "ok", {"fitness": 1.0}))
    run.commit(['{"birth":0}'], {"applied": 1})
    run.write_result({"best": {}})
    for path in run.path.iterdir():
        path.read_bytes().decode("utf-8")  # text; pickles of protocol 2 and later start with 0x80


def at(seconds: float, event: str, **fields: object) -> str:
    moment = datetime.fromtimestamp(1.8e9 + seconds, timezone.utc).isoformat()
    return json.dumps({"t": moment, "level": "info", "event": event, **fields}) + "\n"


def test_a_phase_takes_the_time_of_all_sessions(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    lines = [
        at(0, "started"),
        at(5, "phase", phase="starting workers"),
        at(10, "phase", phase="searching"),
        at(40, "progress", phase="searching"),  # and then it was killed
        at(1000, "resumed"),
        at(1010, "phase", phase="searching"),
        at(1030, "interrupted"),
        at(2000, "resumed"),
        at(2010, "phase", phase="searching"),
        at(2011, "phase", phase="measuring on held-out text"),
        at(2100, "finished"),
    ]
    (tmp_path / "events.jsonl").write_text("".join(lines))
    assert log.phase_seconds("searching") == 30 + 20 + 1
    assert log.phase_seconds("starting workers") == 5
    assert log.phase_seconds("measuring on held-out text") == 89
    assert log.seconds(until=0) == 40 + 30 + 100


def test_new_events_are_read_from_where_the_last_reader_was(tmp_path: Path) -> None:
    log, path = EventLog(tmp_path / "events.jsonl"), tmp_path / "events.jsonl"
    assert log.tail(0) == ([], 0)
    path.write_text(at(0, "started") + "not JSON\n" + at(1, "phase", phase="searching") + '{"t": "2026')
    events, position = log.tail(0)
    assert [event["event"] for event in events] == ["started", "phase"]
    assert log.tail(position) == ([], position)
    path.write_text(path.read_text() + '-01-01T00:00:00+00:00", "level": "info", "event": "finished"}\n')
    assert [event["event"] for event in log.tail(position)[0]] == ["finished"]


def test_a_driver_on_another_machine_is_seen_by_its_beat(tmp_path: Path) -> None:
    """Where the shared file system hides its lock."""
    lock = RunLock(tmp_path / "run.lock")
    assert not lock.is_held()
    (tmp_path / "run.lock").write_text("123 another-machine\n")
    assert lock.is_held()
    old = time.time() - 1000
    os.utime(tmp_path / "run.lock", (old, old))
    assert not lock.is_held()
    lock.acquire()
    assert (tmp_path / "run.lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"
    os.utime(tmp_path / "run.lock", (old, old))
    lock.beat()
    assert (tmp_path / "run.lock").stat().st_mtime > old
    lock.release()
    assert (tmp_path / "run.lock").read_text() == ""
