"""The board says what the history says, and never stands in the way."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine import board as board_module
from evoprune.search.engine.background import Background
from evoprune.search.engine.board import Board
from evoprune.search.engine.board_storage import absolute_storage, check_storage, repair_journal, without_password
from evoprune.search.engine.board_studies import Studies
from evoprune.search.engine.executor import Outcome
from evoprune.search.engine.trial_record import Range, TrialRecord, fits
from evoprune.search.trials_metric import MetricTrials

NAME = "20260101-000000-metric-abcd"
RANGES: dict[str, Range] = {"height": (0, 12), "exponent": (-4.0, 3.0), "gradient": [False, True]}


def record(number: int) -> TrialRecord:
    """A deterministic mixture of all kinds of candidates."""
    state, value = [("complete", number / 7), ("pruned", None), ("fail", None), ("complete", math.nan)][number % 4]
    return TrialRecord(
        state=state,  # type: ignore[arg-type]
        value=value,
        rungs={0: number / 3, 1: math.inf if number % 3 else 0.25},
        attributes={
            "key": f"k{number}",
            "birth": number,
            "expression": f"mul(abs(W),{number})",
            "parents": (number - 1, number - 2),
            "complexity": number % 5 + 1,
            "odd": {"nan": math.nan, "path": Path("x")},
        },
        descriptors={"height": number, "exponent": number / 4, "gradient": number % 2 == 0, "undeclared": 1},
        front=number % 8 == 0,
        started=1.7e9 + number,
        finished=1.7e9 + number + 0.5,
    )


RECORDS = [record(number) for number in range(16)]


@pytest.fixture(params=["journal", "sqlite"])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "journal":
        yield None
        return
    memory = Path("/dev/shm")  # every commit waits for the disk, on a busy machine for most of a second
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield f"sqlite:///{folder}/board.db"


def storage(folder: Path, url: str | None) -> optuna.storages.BaseStorage:
    if url is not None:
        return optuna.storages.RDBStorage(url)
    journal = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log"))
    return optuna.storages.JournalStorage(journal)


def trials(folder: Path, url: str | None = None, name: str = NAME) -> list[tuple[Any, ...]]:
    """Everything of a study's trials."""
    study = optuna.load_study(study_name=name, storage=storage(folder, url))
    return [
        (trial.number, trial.state.name, trial.values, trial.user_attrs, trial.params, trial.distributions,
         trial.intermediate_values, trial.datetime_start, trial.datetime_complete)
        for trial in study.trials
    ]  # fmt: skip


def make(folder: Path, url: str | None = None, warnings: list[str] | None = None) -> Board:
    return Board(folder, NAME, url, descriptors=RANGES, warn=(warnings if warnings is not None else []).append)


def wait_for(warnings: list[str]) -> None:
    """Until the board's thread has got into trouble."""
    give_up = time.monotonic() + 60
    while not warnings and time.monotonic() < give_up:
        time.sleep(0.02)


@pytest.fixture
def live(tmp_path: Path, url: str | None) -> Path:
    """A folder whose board was written as a search does."""
    board = make(tmp_path, url)
    for one in RECORDS:
        board.add(one)
    board.set_attributes({"model": "reference", "nan": math.nan})
    board.set_attributes({"counters": {"DUP_SIG": 7}})
    assert board.close()
    return tmp_path


def test_every_candidate_is_one_trial(live: Path, url: str | None) -> None:
    study = optuna.load_study(study_name=NAME, storage=storage(live, url))
    assert study.metric_names == ["fitness"]
    assert study.user_attrs == {"model": "reference", "nan": "nan", "counters": {"DUP_SIG": 7}}
    assert len(study.trials) == len(RECORDS)
    complete, pruned, failed, nan = study.trials[4:8]
    assert (complete.state.name, complete.value) == ("COMPLETE", 4 / 7)
    assert (pruned.state.name, pruned.value, pruned.intermediate_values) == ("PRUNED", None, {0: 5 / 3})
    assert (failed.state.name, nan.state.name) == ("FAIL", "FAIL")
    assert complete.params == {"height": 4, "exponent": 1.0, "gradient": True}
    assert complete.user_attrs["parents"] == [3, 2]
    assert complete.user_attrs["odd"] == {"nan": "nan", "path": "x"}
    assert complete.duration is not None
    assert complete.duration.total_seconds() == 0.5
    assert study.trials[14].params == {"gradient": True}  # the others are out of range
    assert study.best_trial.number == 0


def test_the_front_has_a_study_of_its_own(live: Path, url: str | None) -> None:
    front = optuna.load_study(study_name=f"{NAME}/front", storage=storage(live, url))
    assert front.metric_names == ["fitness", "complexity"]
    assert [trial.values for trial in front.trials] == [[0.0, 1.0], [8 / 7, 4.0]]
    assert [trial.user_attrs["birth"] for trial in front.best_trials] == [0]


def test_a_rebuilt_board_equals_the_live_one(live: Path, url: str | None) -> None:
    before = [trials(live, url, name) for name in (NAME, f"{NAME}/front")]
    board = make(live, url)
    board.rebuild(RECORDS)
    assert board.close()
    assert [trials(live, url, name) for name in (NAME, f"{NAME}/front")] == before


@pytest.mark.parametrize("known", [0, 10])
def test_a_resumed_board_adds_what_is_missing_and_nothing_twice(
    tmp_path: Path, url: str | None, known: int, live: Path
) -> None:
    before = trials(live, url)
    board = make(live, url)
    board.resume(RECORDS[:known])
    for one in RECORDS[known:]:
        board.add(one)
    assert board.close()
    assert trials(live, url) == before


def test_a_board_that_lags_catches_up(tmp_path: Path, url: str | None) -> None:
    first = make(tmp_path, url)
    for one in RECORDS[:5]:
        first.add(one)
    assert first.close()
    second = make(tmp_path, url)
    second.resume(RECORDS[:12])
    for one in RECORDS[12:]:
        second.add(one)
    assert second.close()
    assert [trial[3]["birth"] for trial in trials(tmp_path, url)] == list(range(16))
    assert len(trials(tmp_path, url, f"{NAME}/front")) == 2


def test_another_historys_board_is_replaced_on_resume_and_left_alone_otherwise(
    tmp_path: Path, url: str | None, live: Path
) -> None:
    other = [record(number + 100) for number in range(3)]
    before, warnings = trials(live, url), list[str]()
    board = make(live, url, warnings)
    board.add(other[0])
    assert not board.close()
    assert ["behind" in warnings[0], "--rebuild" in warnings[1]] == [True, True]
    assert trials(live, url) == before
    board = make(live, url)
    board.resume(other)
    assert board.close()
    assert [trial[3]["birth"] for trial in trials(live, url)] == [100, 101, 102]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    board = make(tmp_path)
    for one in RECORDS:
        board.add(one)
    assert board.close()
    return tmp_path / "optuna.log"


def test_damage_to_the_file_is_mended_from_the_history(journal: Path) -> None:
    whole, before = journal.read_bytes(), trials(journal.parent)
    lines = whole.splitlines(keepends=True)
    flipped = lines[-3].replace(b'"k', b'"K')
    damages = [
        whole[:-7],
        whole + b'{"op_code": 4, "torn',
        whole[:100] + b"\x00" + whole[101:],
        b"",
        b"garbage\n" + whole,
        b"".join(lines[:-3]) + flipped + b"".join(lines[-2:]),
        b'{"op_code": 99}\n' + whole,
        b"[]\n",
    ]
    for damaged in damages:
        journal.write_bytes(damaged)
        board = make(journal.parent)
        board.resume(RECORDS)
        assert board.close()
        assert trials(journal.parent) == before


@pytest.mark.parametrize("age", [0, 60])
def test_a_lock_left_by_a_killed_process_does_not_block(
    journal: Path, age: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an old one, nor one so young that a living process might hold it."""
    monkeypatch.chdir(journal.parent)
    lock = journal.parent / "optuna.log.lock"
    lock.symlink_to("runs/of/another/folder/optuna.log" if age else journal)  # a link by a relative path leads nowhere
    os.utime(lock, (time.time() - age,) * 2, follow_symlinks=False)
    begin = time.monotonic()
    board = make(Path())
    board.resume(RECORDS[:-1])
    board.add(RECORDS[-1])
    board.set_attributes({"again": True})
    assert board.close()
    assert time.monotonic() - begin < 10
    assert not lock.is_symlink()


def test_a_torn_line_spoils_the_file_for_optuna_alone_but_not_for_the_board(journal: Path) -> None:
    """The trap: Optuna passes over a torn last line, appends to it, and can never read the file again."""
    before = trials(journal.parent)
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "torn')
    torn = journal.read_bytes()
    study = optuna.load_study(study_name=NAME, storage=storage(journal.parent, None))
    with contextlib.suppress(ValueError):
        study.set_user_attr("x", 1)  # goes into the torn line
        study.set_user_attr("y", 1)
    with pytest.raises(ValueError):
        trials(journal.parent)
    journal.write_bytes(torn)
    board = make(journal.parent)
    board.resume(RECORDS)
    board.set_attributes({"x": 1})
    assert board.close()
    assert trials(journal.parent) == before


def test_constraints_are_where_optuna_and_the_dashboard_look_for_them(tmp_path: Path, url: str | None) -> None:
    serializer = pytest.importorskip("optuna_dashboard._serializer")
    board = make(tmp_path, url)
    for number, constraints in enumerate([(0.5, -1.0), (0.0, -1.0), (0.0, 0.0)]):
        board.add(dataclasses.replace(RECORDS[0], value=0.1 * number, constraints=constraints))
    assert board.close()
    study = optuna.load_study(study_name=NAME, storage=storage(tmp_path, url))
    assert [trial.constraints for trial in study.trials][:2] == [{"0": 0.5, "1": -1.0}, {"0": 0.0, "1": -1.0}]
    assert study.best_trial.number == 1  # the first has the lowest value and exceeds a limit
    shown = [
        serializer.serialize_frozen_trial(0, trial, study._storage.get_study_system_attrs(study._study_id))
        for trial in study.trials
    ]
    assert [trial["constraints"] for trial in shown] == [[0.5, -1.0], [0.0, -1.0], [0.0, 0.0]]


def test_times_are_local_and_stay(live: Path, url: str | None) -> None:
    trial = optuna.load_study(study_name=NAME, storage=storage(live, url)).trials[0]
    assert trial.datetime_start == datetime.fromtimestamp(1.7e9)
    assert trial.datetime_complete == datetime.fromtimestamp(1.7e9 + 0.5)


def test_artifacts_are_kept_once_and_shown_in_the_note(tmp_path: Path, url: str | None) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    (tmp_path / "metric.py").write_text("first")
    board = make(tmp_path, url)
    board.set_attributes({"model": "reference"})
    for _ in range(2):
        note = "[metric](artifact:metric.py) [none](artifact:absent.py) artifact:metric.py"
        board.publish(note, [tmp_path / "metric.py"])
    assert board.close()
    study = optuna.load_study(study_name=NAME, storage=storage(tmp_path, url))
    (listed,) = optuna.artifacts.get_all_artifact_meta(study)
    assert listed.filename == "metric.py"
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == [listed.artifact_id]
    address = f"/artifacts/{study._study_id}/{listed.artifact_id}"
    assert dashboard.get_note(study) == f"[metric]({address}) [none](artifact:absent.py) artifact:metric.py"

    (tmp_path / "artifacts" / listed.artifact_id).unlink()  # as after a crash between listing and copying
    board = make(tmp_path, url)
    board.publish("again", [tmp_path / "metric.py"])
    assert board.close()
    assert [path.read_text() for path in (tmp_path / "artifacts").iterdir()] == ["first"]
    board = make(tmp_path, url)
    board.rebuild([])
    assert board.close()
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_notes_that_wait_for_the_storage_wait_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[object] = []
    down = threading.Event()
    down.set()
    real = Studies.set_attributes

    def unreliable(studies: Studies, attributes: Any) -> None:
        if down.is_set():
            raise ConnectionError("away")
        written.append(attributes)
        real(studies, attributes)

    monkeypatch.setattr(Studies, "set_attributes", unreliable)
    warnings: list[str] = []
    board = make(tmp_path, None, warnings)
    board._background = Background("board", 3, board._failed, first_pause=0.01)
    for number in range(100):
        board.set_attributes({"last": number, f"own {number % 2}": number})
        board.note(f"note {number}")
    wait_for(warnings)
    down.clear()
    assert board.close()
    assert written == [{"last": 99, "own 0": 98, "own 1": 99}]
    assert warnings[1:] == ["the board's storage answers again"]


def test_repairing_a_sound_file_changes_nothing(journal: Path, tmp_path: Path) -> None:
    before = journal.read_bytes()
    repair_journal(journal)
    assert journal.read_bytes() == before
    repair_journal(tmp_path / "absent")


def test_an_outage_delays_the_board_and_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    board = make(tmp_path, None, warnings)
    board._background = Background("board", 100, board._failed, first_pause=0.01)
    down = threading.Event()
    down.set()
    real = optuna.Study.add_trial

    def unreliable(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if down.is_set():
            raise ConnectionError("the database is away")
        real(study, trial)
        if trial.user_attrs["birth"] == 3 and "lost" not in warnings:
            warnings.append("lost")
            raise ConnectionError("written, but the answer got lost")

    monkeypatch.setattr(optuna.Study, "add_trial", unreliable)
    for one in RECORDS:
        board.add(one)
    wait_for(warnings)
    time.sleep(0.1)
    assert len(warnings) == 1
    assert "the database is away; the search goes on" in warnings[0]
    down.clear()
    assert board.close()
    assert [trial[3]["birth"] for trial in trials(tmp_path)] == list(range(16))


def test_a_search_never_waits_for_the_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "CAPACITY", 10)
    monkeypatch.setattr(board_module.Board, "_open", lambda self: time.sleep(60))
    warnings: list[str] = []
    board = make(tmp_path, None, warnings)
    begin = time.monotonic()
    for one in RECORDS:
        board.add(one)
    assert not board.close(patience=0.2)
    assert time.monotonic() - begin < 5
    assert any("--rebuild" in warning for warning in warnings)


def test_a_board_in_a_folder_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    warnings: list[str] = []
    board = make(tmp_path / "absent", None, warnings)
    board.add(RECORDS[0])
    assert not board.close(patience=0.5)
    assert warnings
    with pytest.raises(InvalidInput, match="cannot be rebuilt"):
        make(tmp_path / "absent").rebuild(RECORDS)


def test_a_note_is_what_the_dashboard_shows(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    board = make(tmp_path)
    board.note("first")
    board.note("## Winner\n$|W| \\cdot x$")
    assert board.close()
    study = optuna.load_study(study_name=NAME, storage=storage(tmp_path, None))
    assert dashboard.get_note(study) == "## Winner\n$|W| \\cdot x$"


def test_storages_are_checked_before_a_search_starts(tmp_path: Path) -> None:
    check_storage(f"sqlite:///{tmp_path / 'new.db'}")
    secret = "hunter2"
    for url, says in [
        ("not a url", "not a database URL"),
        (f"sqlite:///{tmp_path / 'absent' / 'new.db'}", "cannot be reached"),
        (f"oracle9://me:{secret}@host/name", "oracle9"),
        (f"postgresql+pg8000://me:{secret}@host/name", "needs the Python package 'pg8000'"),
    ]:
        with pytest.raises(InvalidInput, match=says) as caught:
            check_storage(url)
        assert secret not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "text", "expected"),
    [
        ("postgresql://me:hunter2@h/n", "hunter2 is wrong", "*** is wrong"),
        ("postgresql://me:hunter2@h/n", "at URL", "at postgresql://me:***@h/n"),
        ("postgresql+psycopg://me@h/n?password=hunter2", "--storage=URL", "--storage=postgresql+psycopg://me@h/n?password=***"),
        ("postgresql://h/n?user=me&PassWord=hunter2&x=y", "URL", "postgresql://h/n?user=me&PassWord=***&x=y"),
        ("postgresql://h/n?sslpassword=hunter2&passfile=file", "URL", "postgresql://h/n?sslpassword=***&passfile=file"),
        ("mysql+pymysql://h/n?passwd=hunter2", "passwd='hunter2'", "passwd='***'"),
        ("postgresql://me:p%40ss@h/n", "URL and p%40ss and p@ss", "postgresql://me:***@h/n and *** and ***"),
        ("postgresql://h/n?password=p+%2F", "p+%2F, p%20%2F or 'p /'", "***, *** or '***'"),
        ("postgresql://postgres:postgres@h/n", "URL", "postgresql://postgres:***@h/n"),
        ("postgresql://me:a@h/n", "URL has a table", "postgresql://me:***@h/n has a table"),
        ("postgresql://me:tab@h/n", "URL: tab is no table", "postgresql://me:***@h/n: *** is no table"),
        ("postgresql://me:@h/n", "URL has a table", "postgresql://me:***@h/n has a table"),
        ("sqlite:///board.db", "URL is locked", "sqlite:///board.db is locked"),
        ("nonsense", "URL has a table", "nonsense has a table"),
    ],
)  # fmt: skip
def test_passwords_are_not_printed(url: str, text: str, expected: str) -> None:
    assert without_password(text.replace("URL", url), url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "oracle9://me@host/name?password=hunter2",
        "postgresql+pg8000://me@host/name?password=hunter2",
        "postgresql://me:word@hunter2@host/name",
        "postgresql://me:word@host:hunter2@host/name",
    ],
)
def test_a_refused_storage_is_named_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match="--storage") as caught:
        check_storage(url)
    assert "hunter2" not in str(caught.value) and "word@" not in str(caught.value)


def test_a_database_file_is_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_storage("sqlite:///board.db") == f"sqlite:///{tmp_path}/board.db"
    assert absolute_storage("sqlite:///sub/board.db?timeout=5") == f"sqlite:///{tmp_path}/sub/board.db?timeout=5"
    for url in (f"sqlite:///{tmp_path}/b.db", "sqlite://", "sqlite:///:memory:", "postgresql://me:p%40ss@host/name"):
        assert absolute_storage(url) == url


@pytest.mark.parametrize(
    ("value", "allowed", "fine"),
    [
        (3, (0, 5), True),
        (6, (0, 5), False),
        (3.0, (0, 5), False),
        (True, (0, 5), False),
        (3, (0.0, 5.0), True),
        (math.nan, (0.0, 5.0), False),
        (True, [False, True], True),
        (1, [False, True], False),
        ("mul", ["mul", "div"], True),
        ("x", (0.0, 1.0), False),
    ],
)
def test_descriptors_stay_within_their_ranges(value: object, allowed: Range, fine: bool) -> None:
    assert fits(value, allowed) is fine


def test_trials_get_their_times_from_the_log_and_the_rest_from_the_history() -> None:
    def line(birth: int, rungs: list[float] | None, **fields: Any) -> dict[str, Any]:
        known = {"origin": "random", "parents": [], "island": 0, "complexity": 2, "signature": "s", "reason": None}
        measured = {} if rungs is None else {"rungs": rungs, "stderr": 0.0, "front": len(rungs) == 2}
        return {"birth": birth, "expression": "abs(W)", **known, **measured, **fields}

    history = [
        line(0, [0.5, 0.25]),
        line(1, [0.5], parents=[0], reason="CUT_F0"),
        line(2, None, reason="DUP_SIG", same_as=0),
        line(3, [0.5], parents=[1, 0], reason="CUT_F0"),  # as good as birth 1, digit by digit
        line(4, None, reason="TIMEOUT"),
    ]
    outcomes = [
        Outcome(
            f"k{number}", "ok", {"rungs": rungs, "stderr": 0.0}, telemetry={"started": number, "finished": number + 1}
        )
        for number, rungs in enumerate([[0.5], [0.5, 0.25], [0.5]])
    ]
    records = list(MetricTrials(2).records(history, [*outcomes, Outcome("k3", "timeout")]))
    assert [record.attributes["birth"] for record in records] == [0, 1, 3, 4]
    assert [record.state for record in records] == ["complete", "pruned", "pruned", "fail"]
    assert [record.attributes["generation"] for record in records] == [0, 1, 2, 0]
    assert [record.started for record in records] == [1, 0, 2, None]
    assert [record.front for record in records] == [True, False, False, False]
