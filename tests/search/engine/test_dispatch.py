"""Who gets which job, and what becomes of jobs whose worker is lost."""

from __future__ import annotations

import random

import pytest

from evoprune.metrics.errors import AuditFailed
from evoprune.search.engine.dispatch import Dispatcher, Loss, is_audited
from evoprune.search.engine.executor import Job, Outcome


def job(key: str, deadline: float | None = None) -> Job:
    return Job(key, "k", {}, deadline)


def crew(*keys: str, workers: int = 1, slots: int = 1, audited: tuple[str, ...] = ()) -> Dispatcher:
    dispatcher = Dispatcher(slots, lambda job: job.key in audited)
    dispatcher.submit([job(key) for key in keys])
    for worker in range(workers):
        dispatcher.add_worker(worker)
    return dispatcher


def take_all(dispatcher: Dispatcher, worker: int, now: float = 0.0) -> list[str]:
    keys = []
    while (given := dispatcher.next_job(worker, now)) is not None:
        keys.append(given.key)
    return keys


def test_two_jobs_are_in_flight_per_worker() -> None:
    dispatcher = crew("a", "b", "c")
    assert take_all(dispatcher, 0) == ["a", "b"]
    assert dispatcher.finish(0, Outcome("a", "ok"), 0.0) is not None
    assert take_all(dispatcher, 0) == ["c"]


def test_a_job_can_be_kept_from_waiting_at_a_busy_worker() -> None:
    dispatcher = crew("a", "b", workers=2)
    assert dispatcher.next_job(0, 0.0, ahead=False) == job("a")
    assert dispatcher.next_job(0, 0.0, ahead=False) is None
    assert dispatcher.next_job(1, 0.0, ahead=False) == job("b")


def test_only_the_running_job_is_suspected_when_a_worker_dies() -> None:
    dispatcher = crew("a", "b", "c")
    take_all(dispatcher, 0)
    assert dispatcher.lose(0, "died") == []
    dispatcher.add_worker(1)
    assert take_all(dispatcher, 1) == ["a"]  # alone
    assert dispatcher.finish(1, Outcome("a", "ok"), 0.0) is not None
    assert take_all(dispatcher, 1) == ["b", "c"]


def test_a_suspect_waits_until_a_worker_has_run_dry() -> None:
    dispatcher = crew("a", "b", "c", "d", "e", workers=2)
    take_all(dispatcher, 0)
    assert take_all(dispatcher, 1) == ["c", "d"]
    dispatcher.lose(0, "died")
    dispatcher.finish(1, Outcome("c", "ok"), 0.0)
    assert take_all(dispatcher, 1) == []
    dispatcher.finish(1, Outcome("d", "ok"), 0.0)
    assert take_all(dispatcher, 1) == ["a"]


def settle(loss: Loss, deaths: int, cause: str = "") -> list[Outcome]:
    """What comes out when a job is lost `deaths` times in probation."""
    dispatcher = Dispatcher()
    dispatcher.submit([job("a", 1.0)])
    settled = []
    for worker in range(deaths + 1):
        dispatcher.add_worker(worker)
        assert take_all(dispatcher, worker) == ["a"]
        settled += dispatcher.lose(worker, loss, cause)
    return settled


def test_three_deaths_in_probation_are_a_crash() -> None:
    assert settle("died", 2) == []
    (outcome,) = settle("died", 3)
    assert (outcome.status, outcome.telemetry["attempts"]) == ("crash", 4)


def test_memory_kills_and_deadlines_have_their_own_limits() -> None:
    assert settle("oom", 1) == []
    assert settle("oom", 2)[0].status == "oom"
    assert settle("deadline", 1)[0].status == "timeout"


def test_the_outcome_says_what_happened_the_last_time() -> None:
    assert "lost 3 times while it ran alone; the last time: CUDA error" in settle("died", 3, "CUDA error")[0].error


def test_a_lack_of_memory_that_a_worker_reports_is_tried_again_alone() -> None:
    dispatcher = crew("a", "b")
    take_all(dispatcher, 0)
    assert dispatcher.finish(0, Outcome("a", "oom", error="full"), 0.0) is None
    assert take_all(dispatcher, 0) == []  # b runs dry first
    assert dispatcher.finish(0, Outcome("b", "ok"), 0.0) is not None
    for _ in range(2):
        assert take_all(dispatcher, 0) == ["a"]
        settled = dispatcher.finish(0, Outcome("a", "oom", error="full"), 0.0)
    assert settled is not None
    assert (settled.status, settled.telemetry["attempts"]) == ("oom", 3)
    assert "full" in settled.error


def test_memory_that_comes_back_costs_nothing() -> None:
    dispatcher = crew("a")
    take_all(dispatcher, 0)
    assert dispatcher.finish(0, Outcome("a", "oom"), 0.0) is None
    take_all(dispatcher, 0)
    settled = dispatcher.finish(0, Outcome("a", "ok"), 0.0)
    assert settled is not None
    assert settled.status == "ok"


def test_while_draining_only_what_runs_comes_out() -> None:
    dispatcher = crew("a", "b", "c", "d", "e", workers=2)
    take_all(dispatcher, 0)
    take_all(dispatcher, 1)
    dispatcher.drain()
    dispatcher.submit([job("f")])
    assert dispatcher.running == 2
    assert dispatcher.finish(0, Outcome("a", "ok"), 0.0) is not None
    assert dispatcher.finish(0, Outcome("b", "ok"), 0.0) is None  # it was given out, but had not begun
    assert dispatcher.lose(1, "died") == []
    assert dispatcher.running == 0
    dispatcher.add_worker(2)
    assert take_all(dispatcher, 0) == take_all(dispatcher, 2) == []


def test_a_lost_node_is_nobodys_fault_until_one_job_has_lost_ten() -> None:
    assert settle("node", 9) == []
    (outcome,) = settle("node", 10, "its node has died")
    assert (outcome.status, outcome.telemetry["attempts"]) == ("crash", 11)
    assert outcome.error == "its node was lost 10 times while it ran alone; the last time: its node has died"


def test_deadlines_count_from_the_start_of_the_job_and_are_longer_in_probation() -> None:
    dispatcher = Dispatcher()
    dispatcher.submit([job("a", 1.0), job("b", 1.0)])
    dispatcher.add_worker(0)
    take_all(dispatcher, 0, now=10.0)
    assert dispatcher.overdue(10.9) == []
    assert dispatcher.overdue(11.1) == [0]
    dispatcher.finish(0, Outcome("a", "ok"), 11.1)
    assert dispatcher.overdue(12.0) == []
    assert dispatcher.overdue(12.2) == [0]
    dispatcher.lose(0, "deadline")
    dispatcher.add_worker(1)
    take_all(dispatcher, 1, now=20.0)
    assert dispatcher.overdue(23.9) == []
    assert dispatcher.overdue(24.1) == [1]


def test_each_slot_of_a_worker_runs_one_job_and_has_the_next_beside_it() -> None:
    dispatcher = crew("a", "b", "c", "d", "e", slots=2)
    assert dispatcher.is_idle()
    assert take_all(dispatcher, 0) == ["a", "b", "c", "d"]
    assert dispatcher.running == 2
    assert not dispatcher.is_idle()
    assert dispatcher.finish(0, Outcome("b", "ok"), 0.0) is not None  # c begins
    assert take_all(dispatcher, 0) == ["e"]
    dispatcher.drain()
    assert dispatcher.running == 2
    assert [dispatcher.finish(0, Outcome(key, "ok"), 0.0) is not None for key in "acde"] == [True, True, False, False]


def test_all_that_a_worker_ran_is_suspected_and_then_runs_alone() -> None:
    dispatcher = crew("a", "b", "c", slots=2)
    take_all(dispatcher, 0)
    assert dispatcher.lose(0, "died") == []
    dispatcher.add_worker(1)
    for suspect in "ab":
        assert take_all(dispatcher, 1) == [suspect]
        assert dispatcher.finish(1, Outcome(suspect, "ok"), 0.0) is not None
    assert take_all(dispatcher, 1) == ["c"]


def test_every_slot_has_a_deadline_of_its_own() -> None:
    dispatcher = Dispatcher(slots=2)
    dispatcher.submit([job("a", 2.0), job("b", 1.0), job("c", 1.5)])
    dispatcher.add_worker(0)
    take_all(dispatcher, 0, now=10.0)
    assert dispatcher.overdue(10.9) == []
    assert dispatcher.overdue(11.1) == [0]  # b
    dispatcher.finish(0, Outcome("b", "ok"), 11.1)
    assert dispatcher.overdue(11.9) == []
    assert dispatcher.overdue(12.1) == [0]  # a
    dispatcher.finish(0, Outcome("a", "ok"), 12.1)
    assert dispatcher.overdue(12.5) == []
    assert dispatcher.overdue(12.7) == [0]  # c, since 11.1


@pytest.mark.parametrize("slots", [1, 3])
def test_every_key_leaves_exactly_once_whatever_happens(slots: int) -> None:
    for seed in range(200):
        chance = random.Random(seed)
        keys = [f"k{number}" for number in range(30)]
        poison = set(chance.sample(keys, 2))
        dispatcher, alive, fresh, left = crew(*keys, workers=3, slots=slots), [0, 1, 2], 3, []
        in_flight: dict[int, list[str]] = {worker: [] for worker in alive}
        for _ in range(10_000):
            if len(left) == len(keys):
                break
            worker = chance.choice(alive)
            in_flight[worker] += take_all(dispatcher, worker)
            if not in_flight[worker]:
                continue
            runs = in_flight[worker][:slots]
            if poison & set(runs) or chance.random() < 0.1:
                left += dispatcher.lose(worker, "died")
                alive.remove(worker)
                alive.append(fresh)
                dispatcher.add_worker(fresh)
                in_flight[fresh] = []
                fresh += 1
            else:
                done = chance.choice(runs)
                in_flight[worker].remove(done)
                outcome = dispatcher.finish(worker, Outcome(done, "ok"), 0.0)
                assert outcome is not None
                left.append(outcome)
        assert sorted(outcome.key for outcome in left) == sorted(keys)
        assert poison <= {outcome.key for outcome in left if outcome.status == "crash"}


def test_an_audited_job_is_done_again_by_another_worker() -> None:
    dispatcher = crew("a", "b", "c", "d", workers=2, audited=("a",))
    assert dispatcher.next_job(0, 0.0) == job("a")
    assert dispatcher.next_job(1, 0.0) == job("b")
    outcome = dispatcher.finish(0, Outcome("a", "ok", {"fitness": 0.5}), 0.0)
    assert outcome is not None and outcome.values == {"fitness": 0.5}
    assert take_all(dispatcher, 0) == ["c", "d"]  # not by the same one
    assert take_all(dispatcher, 1) == ["audit:a"]
    assert dispatcher.finish(1, Outcome("b", "ok"), 0.0) is not None
    assert dispatcher.finish(1, Outcome("audit:a", "ok", {"fitness": 0.5}), 0.0) is None


@pytest.mark.parametrize("values", [{"fitness": 0.5000000000000001}, {}, {"fitness": 0.5, "more": 1}])
def test_an_audit_that_gives_other_values_stops_the_search(values: dict[str, float]) -> None:
    dispatcher = crew("a", workers=2, audited=("a",))
    take_all(dispatcher, 0)
    dispatcher.finish(0, Outcome("a", "ok", {"fitness": 0.5}), 0.0)
    assert take_all(dispatcher, 1) == ["audit:a"]
    with pytest.raises(AuditFailed, match="workers 0 and 1 disagree about evaluation a"):
        dispatcher.finish(1, Outcome("audit:a", "ok", values), 0.0)


def test_an_audit_that_fails_or_is_lost_proves_nothing_and_blames_nobody() -> None:
    dispatcher = crew("a", "b", workers=2, audited=("a", "b"))
    assert take_all(dispatcher, 0) == ["a", "b"]
    dispatcher.finish(0, Outcome("a", "ok", {"fitness": 0.5}), 0.0)
    dispatcher.finish(0, Outcome("b", "ok", {"fitness": 0.5}), 0.0)
    assert take_all(dispatcher, 1) == ["audit:a", "audit:b"]
    assert dispatcher.lose(1, "died") == []
    dispatcher.add_worker(2)
    assert take_all(dispatcher, 2) == ["audit:b"]  # that of `a` ran when its worker died, and is given up
    assert dispatcher.finish(2, Outcome("audit:b", "error"), 0.0) is None
    assert take_all(dispatcher, 2) == []


def test_a_job_that_failed_is_not_audited_and_draining_forgets_audits() -> None:
    dispatcher = crew("a", "b", "c", workers=2, audited=("a", "b"))
    take_all(dispatcher, 0)
    dispatcher.finish(0, Outcome("a", "invalid", error="TIES"), 0.0)
    dispatcher.finish(0, Outcome("b", "ok", {"fitness": 1.0}), 0.0)
    dispatcher.drain()
    assert take_all(dispatcher, 1) == []


def test_one_key_in_a_hundred_is_audited() -> None:
    assert 70 < sum(is_audited(job(f"k{number}")) for number in range(10_000)) < 130
