"""The board says what the history says, and never stands in the way."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine import board as board_module
from evoprune.search.engine.background import Background
from evoprune.search.engine.board import Board
from evoprune.search.engine.board_storage import check_storage, repair_journal, without_password
from evoprune.search.engine.trial_record import Range, TrialRecord, fits

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
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return f"sqlite:///{tmp_path / 'board.db'}" if request.param == "sqlite" else None


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


def test_a_lock_left_by_a_killed_process_does_not_block(journal: Path) -> None:
    (journal.parent / "optuna.log.lock").symlink_to(journal)
    begin = time.monotonic()
    board = make(journal.parent)
    board.resume(RECORDS)
    assert board.close()
    assert time.monotonic() - begin < 10


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
        if trial.user_attrs["birth"] == 3 and not down.is_set() and len(warnings) < 2:
            warnings.append("-")
            raise ConnectionError("written, but the answer got lost")

    monkeypatch.setattr(optuna.Study, "add_trial", unreliable)
    for one in RECORDS:
        board.add(one)
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
    assert not board.close(timeout=0.2)
    assert time.monotonic() - begin < 5
    assert any("--rebuild" in warning for warning in warnings)


def test_a_board_in_a_folder_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    warnings: list[str] = []
    board = make(tmp_path / "absent", None, warnings)
    board.add(RECORDS[0])
    assert not board.close(timeout=0.5)
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


def test_passwords_are_not_printed() -> None:
    url = "postgresql://me:hunter2@host/name"
    assert without_password(f"cannot open {url}: hunter2 is wrong", url) == (
        "cannot open postgresql://me:***@host/name: *** is wrong"
    )


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
