"""A crash at any step of a commit leaves the state of one commit or of the next, never a mixture."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.commit import CommittedState
from tests.search.engine.disk_steps import count_steps, ends_at_step

N_COMMITS = 3


def commit(state: CommittedState, number: int) -> None:
    """The commit with this number, from 1; the last has no new lines and no arrays."""
    lines = [json.dumps({"birth": 2 * number + part}) for part in (0, 1)] if number < N_COMMITS else []
    arrays = (
        None if number == N_COMMITS else {"logits": torch.full((3,), float(number)), "table": torch.eye(2).T * number}
    )
    state.commit(lines, {"applied": number}, arrays)


def go_on(folder: Path) -> None:
    """Restore whatever is there, check that it fits together, and do the commits that are missing."""
    state = CommittedState(folder)
    restored = state.restore()
    applied = restored["applied"] if restored else 0
    assert len(list(state.history())) == 2 * min(applied, N_COMMITS - 1)
    assert (folder / "history.jsonl").read_bytes().count(b"\n") == 2 * min(applied, N_COMMITS - 1)
    arrays = state.arrays()
    expected = applied in (1, 2)
    assert arrays["logits"].tolist() == [applied] * 3 if expected else arrays == {}
    assert len(list(folder.glob("state-*"))) == expected
    for number in range(applied + 1, N_COMMITS + 1):
        commit(state, number)
    state.close()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    go_on(folder)
    return files(folder)


class Crash(BaseException):
    """Stands for anything that ends a process."""


@pytest.fixture
def n_steps(tmp_path: Path) -> int:
    (folder := tmp_path / "counted").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        steps = count_steps(patch, lambda step, half: None)
        go_on(folder)
    assert steps[0] >= 30
    return steps[0]


@pytest.mark.slow
def test_a_process_may_end_before_and_after_every_step(
    tmp_path: Path, undisturbed: dict[str, bytes], n_steps: int
) -> None:
    for fatal in range(n_steps):
        (folder := tmp_path / f"exit-{fatal}").mkdir()
        ends_at_step(fatal, lambda folder=folder: partial(go_on, folder))
        go_on(folder)
        assert files(folder) == undisturbed


@pytest.mark.parametrize("kind", [Crash, OSError])
def test_an_exception_at_any_step_leaves_a_state_to_go_on_from(
    tmp_path: Path, undisturbed: dict[str, bytes], n_steps: int, kind: type[BaseException]
) -> None:
    for fatal in range(n_steps):
        (folder := tmp_path / f"raise-{fatal}").mkdir()

        def fail(step: int, half: Callable[[], Any] | None, fatal: int = fatal) -> None:
            if step == fatal:
                if half is not None:
                    half()
                raise Crash if kind is Crash else OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch, pytest.raises((Crash, InvalidInput)):
            count_steps(patch, fail)
            go_on(folder)
        go_on(folder)
        assert files(folder) == undisturbed


def test_after_a_full_disk_the_same_object_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = CommittedState(tmp_path)
    commit(state, 1)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(InvalidInput, match="read-only file system"):
            commit(state, 2)
    assert files(tmp_path) == before
    commit(state, 2)
    assert (state.peek() or {})["applied"] == 2
    assert len(list(state.history())) == 4


def test_nothing_to_restore_before_the_first_commit(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"birth": 0}\n')
    state = CommittedState(tmp_path)
    assert state.peek() is None
    assert state.restore() is None
    assert (tmp_path / "history.jsonl").read_bytes() == b""


def test_a_history_that_is_not_the_one_is_refused(tmp_path: Path) -> None:
    commit(CommittedState(tmp_path), 1)
    path = tmp_path / "history.jsonl"
    whole = path.read_bytes()
    for damaged in (whole.replace(b"2", b"7"), whole[:-1], b""):
        path.write_bytes(damaged)
        with pytest.raises(InvalidInput, match=r"history\.jsonl is not the one"):
            CommittedState(tmp_path).restore()


def test_a_state_of_another_schema_or_none_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"schema": 99}')
    with pytest.raises(InvalidInput, match=r"schema 99.*--fork"):
        CommittedState(tmp_path).restore()
    for text in ("", "[]", "{}", "{"):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(InvalidInput, match="damaged"):
            CommittedState(tmp_path).restore()


def test_what_would_spoil_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reserved"):
        CommittedState(tmp_path).commit([], {"schema": 1})
    with pytest.raises(ValueError, match="line end"):
        CommittedState(tmp_path).commit(["a\nb"], {})
