"""A search goes on from wherever it ended, to the history that it would have had."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from evoprune.metrics.errors import InvalidInput
from tests.search.engine.disk_steps import count_steps, ends_at_step
from tests.search.planted import Session

ROOT = Path(__file__).parents[2]
EVALUATIONS = 60


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Session:
    session = Session(tmp_path_factory.mktemp("undisturbed") / "run")
    session.go(EVALUATIONS)
    return session


def result(folder: Path) -> tuple[bytes, bytes]:
    """History and state."""
    return (folder / "history.jsonl").read_bytes(), (folder / "state.json").read_bytes()


def go_on(folder: Path, undisturbed: Session, *, log_damaged: bool = False) -> Session:
    """Finish a run, which must give what the undisturbed one gave, without doing any evaluation twice."""
    session = Session(folder)
    known = len(session.log)
    done = []
    poll = session.executor.poll

    def counted(timeout: float) -> list[Any]:
        outcomes = poll(timeout)
        done.extend(outcome.key for outcome in outcomes)
        return outcomes

    session.executor.poll = counted  # type: ignore[method-assign]
    session.go(EVALUATIONS)
    assert result(folder) == result(undisturbed.run.path)
    assert len(done) == len(set(done)) <= EVALUATIONS - known
    # What a damaged log has lost is done again only as far as the state did not know it.
    assert log_damaged or len(done) == EVALUATIONS - known
    return session


def raises_at(number: int, real: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """`real`, whose call with this number is interrupted, as a second Ctrl-C would."""
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            raise KeyboardInterrupt
        returned = real(*arguments, **options)
        if calls == number:
            raise KeyboardInterrupt
        return returned

    return call


@pytest.mark.parametrize(
    ("owner", "name", "number", "after"),
    [
        ("search.racing", "observe", 30, False),  # an outcome is half taken in
        ("search.archive", "add", 3, True),
        ("search._searcher", "propose", 40, True),  # a birth has its number, and nobody has the birth
        ("run", "commit", 2, False),
        ("run", "commit", 2, True),  # the state is on disk, and the loop does not know
        ("log", "extend", 25, False),
        ("log", "extend", 25, True),
        ("executor", "poll", 33, True),  # a result got lost
    ],
)
def test_an_interruption_in_the_middle_of_anything_loses_nothing(
    owner: str, name: str, number: int, after: bool, undisturbed: Session, tmp_path: Path
) -> None:
    session = Session(tmp_path / "run")
    place: Any = session
    for part in owner.split("."):
        place = getattr(place, part)
    setattr(place, name, raises_at(number, getattr(place, name), after=after))
    with pytest.raises(KeyboardInterrupt):
        session.go(EVALUATIONS)
    go_on(tmp_path / "run", undisturbed)


def test_the_process_may_end_at_any_step_on_the_disk(undisturbed: Session, tmp_path: Path) -> None:
    """At some of all steps of a whole search, evenly chosen; `test_commit` has every step of a commit."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Session(tmp_path / "counted")
        steps = count_steps(patch, lambda step, half: None)
        counted.go(EVALUATIONS)
    assert steps[0] > 200
    for fatal in range(3, steps[0], steps[0] // 7):
        folder = tmp_path / f"exit-{fatal}"

        def prepare(folder: Path = folder) -> Callable[[], object]:
            torch.set_num_threads(1)  # threads do not survive a fork
            return partial(Session(folder).go, EVALUATIONS)

        ends_at_step(fatal, prepare)
        go_on(folder, undisturbed)


def test_a_damaged_tail_of_the_log_costs_evaluations_and_nothing_else(undisturbed: Session, tmp_path: Path) -> None:
    chance = random.Random(0)
    for damage in range(4):
        folder = tmp_path / str(damage)
        with pytest.raises(KeyboardInterrupt):
            session = Session(folder)
            session.executor.poll = raises_at(40, session.executor.poll)  # type: ignore[method-assign]
            session.go(EVALUATIONS)
        log = folder / "evaluations.wal"
        data = bytearray(log.read_bytes())
        place = chance.randrange(len(data) // 2, len(data))
        if damage % 2:
            data[place] ^= 1 << chance.randrange(8)
        else:
            del data[place:]
        log.write_bytes(data)
        go_on(folder, undisturbed, log_damaged=True)


def test_a_state_that_is_lost_is_made_again_from_the_log(undisturbed: Session, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        session = Session(tmp_path / "run")
        session.executor.poll = raises_at(40, session.executor.poll)  # type: ignore[method-assign]
        session.go(EVALUATIONS)
    (tmp_path / "run" / "state.json").unlink()
    assert len(go_on(tmp_path / "run", undisturbed).log) == EVALUATIONS


def test_a_damaged_state_says_what_to_do(tmp_path: Path) -> None:
    session = Session(tmp_path / "run")
    session.go(20)
    (tmp_path / "run" / "state.json").write_text('{"schema"')
    with pytest.raises(InvalidInput, match=r"damaged.*--fork"):
        Session(tmp_path / "run")


class Doubled(Session):
    """A search whose births ask for the same evaluation again, as a searcher without a memory would."""

    def go(self, evaluations: int, **options: Any) -> None:
        from dataclasses import replace

        real, seen = self.search.next_birth, []

        def next_birth() -> Any:
            birth = real()
            if birth.job is not None:
                seen.append(birth.job)
                birth = replace(birth, job=seen[len(seen) // 2])
            return birth

        self.search.next_birth = next_birth  # type: ignore[method-assign]
        super().go(evaluations, **options)


def test_births_may_share_an_evaluation(tmp_path: Path) -> None:
    session = Doubled(tmp_path / "run")
    session.go(40)
    births = [json.loads(line) for line in session.history.splitlines()]
    assert sum("rungs" in birth for birth in births) == 40
    assert len(session.log) < 40


_ELSEWHERE = """
import random, sys
junk = [object() for _ in range(random.Random({seed}).randrange(10**6))]
del junk[::3]
from pathlib import Path
from tests.search.planted import Session
session = Session(Path(sys.argv[1]))
session.go({evaluations})
"""


@pytest.mark.slow
def test_neither_the_heap_nor_the_seed_of_hashes_matters(undisturbed: Session, tmp_path: Path) -> None:
    """Verification list, check 9: DEAP's own typed crossover would fail here."""
    for seed in (1, 2):
        subprocess.run(
            [sys.executable, "-c", _ELSEWHERE.format(seed=seed, evaluations=EVALUATIONS), str(tmp_path / str(seed))],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            check=True,
        )
        history = (tmp_path / str(seed) / "history.jsonl").read_bytes()
        assert hashlib.sha256(history).hexdigest() == hashlib.sha256(undisturbed.history).hexdigest()
