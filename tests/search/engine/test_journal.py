"""The evaluation log keeps what it was given, whatever happens to its file."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.executor import Outcome
from evoprune.search.engine.journal import EvaluationLog


def outcome(number: int) -> Outcome:
    return Outcome(f"k{number}", "ok", {"fitness": number / 7}, "", {"seconds": 0.1, "where": "ä"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    log = EvaluationLog(tmp_path / "evaluations.wal")
    for number in range(10):
        log.append(f"k{number}", outcome(number))
    log.close()
    return log.path


def keys(path: Path) -> list[str]:
    log = EvaluationLog(path)
    log.close()
    return [f"k{number}" for number in range(12) if f"k{number}" in log]


def test_what_was_appended_is_found_again(path: Path) -> None:
    log = EvaluationLog(path)
    assert len(log) == 10
    assert log.get("k3") == outcome(3)
    assert log.get("nothing") is None
    assert log.dropped_bytes == 0


def test_the_first_outcome_of_a_key_counts(path: Path) -> None:
    size = path.stat().st_size
    log = EvaluationLog(path)
    log.append("k3", outcome(99))
    assert log.get("k3") == outcome(3)
    assert path.stat().st_size == size
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[0]]))
    assert len(EvaluationLog(path)) == 10


def test_outcomes_come_in_the_order_of_their_ends_and_stay_on_disk(path: Path) -> None:
    log = EvaluationLog(path)
    log.extend({"k10": outcome(10), "k11": outcome(11)})
    assert list(log.outcomes()) == [outcome(number) for number in range(12)]
    assert log.get("k11") == outcome(11)
    log.close()
    path.write_bytes(path.read_bytes().replace(b"k3", b"k4"))
    with pytest.raises(InvalidInput, match="changed while it was in use"):
        log.get("k3")


def test_several_outcomes_cost_one_flush(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EvaluationLog(path)
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor))[1])
    log.extend({f"k{number}": outcome(number) for number in (3, 10, 11)})
    assert len(synced) == 1
    log.extend({"k3": outcome(99)})
    assert len(synced) == 1
    log.close()
    assert keys(path) == [f"k{number}" for number in range(12)]


def test_a_torn_tail_is_cut_off_at_every_length(path: Path) -> None:
    data = path.read_bytes()
    line_ends = [position + 1 for position, byte in enumerate(data) if byte == ord("\n")]
    for size in range(line_ends[-2] - 1, len(data)):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in line_ends)
        assert len(keys(path)) == whole
        assert path.stat().st_size == (line_ends[whole - 1] if whole else 0)


def test_after_a_torn_tail_the_log_goes_on(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])
    log = EvaluationLog(path)
    assert log.dropped_bytes > 0
    log.append("k11", outcome(11))
    log.close()
    assert keys(path) == [*(f"k{number}" for number in range(9)), "k11"]


def test_flipped_bits_never_give_a_wrong_outcome(path: Path) -> None:
    data = path.read_bytes()
    chance = random.Random(0)
    for _ in range(100):
        damaged = bytearray(data)
        position = chance.randrange(len(data))
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        log = EvaluationLog(path)
        log.close()
        assert len(log) == data[:position].count(b"\n")
        assert all(log.get(f"k{number}") == outcome(number) for number in range(len(log)))


def test_a_full_disk_leaves_the_log_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = path.stat().st_size
    log = EvaluationLog(path)
    real = os.write

    def half(descriptor: int, data: memoryview) -> int:
        if len(data) > 10:
            return real(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(InvalidInput, match=r"cannot write .*no space left"):
            log.append("k11", outcome(11))
    assert path.stat().st_size == size
    assert "k11" not in log
    log.append("k11", outcome(11))
    log.close()
    assert len(keys(path)) == 11


def test_every_append_is_on_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EvaluationLog(tmp_path / "wal")
    synced: list[int] = []
    real = os.fsync

    def note(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", note)
    log.append("k1", outcome(1))
    assert synced == [log.path.stat().st_size]


def test_a_folder_that_is_not_ours_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot write"):
        EvaluationLog(tmp_path / "absent" / "wal")
