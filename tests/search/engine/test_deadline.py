"""How long an evaluation may take."""

from __future__ import annotations

from evoprune.search.engine.deadline import PATIENCE, SHORTEST, Deadline
from evoprune.search.engine.executor import Outcome


def test_a_deadline_follows_from_the_work_and_the_speed() -> None:
    deadline = Deadline("auto", seconds_per_token=0.001)
    assert deadline.seconds(10) == SHORTEST
    assert deadline.seconds(1_000_000) == PATIENCE * 1000.0
    assert Deadline("auto", 0.001, seconds_before=500.0).seconds(1_000_000) == PATIENCE * 1500.0


def test_what_was_slow_once_may_be_slow_again() -> None:
    deadline = Deadline("auto", seconds_per_token=0.0)
    deadline.observe(Outcome("k", "ok", telemetry={"seconds": SHORTEST}), 10)
    deadline.observe(Outcome("k", "crash"), 10)
    assert deadline.seconds(10) == PATIENCE * SHORTEST


def test_the_first_step_does_not_wait_as_long_as_the_last() -> None:
    deadline = Deadline("auto", seconds_per_token=0.0)
    deadline.observe(Outcome("k", "ok", telemetry={"seconds": 2 * SHORTEST}), 1000)
    deadline.observe(Outcome("k", "ok", telemetry={"seconds": SHORTEST}), 100)
    asked = [deadline.seconds(tokens) for tokens in (10, 100, 999, 1000, 5000)]
    assert asked == [SHORTEST, *[PATIENCE * SHORTEST] * 2, *[2 * PATIENCE * SHORTEST] * 2]


def test_the_users_word_counts() -> None:
    assert Deadline(2.5, seconds_per_token=1.0).seconds(1000) == 2.5
    assert Deadline(None, seconds_per_token=1.0).seconds(1000) is None
