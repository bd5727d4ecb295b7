"""The Ray executor: the same outcomes as in process, each exactly once, whatever dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evoprune.metrics.errors import AuditFailed, InvalidInput, NoCapacity, WorkersFailed
from evoprune.metrics.files import content_hash
from evoprune.search.engine import ray as engine_ray
from evoprune.search.engine.admission import Admission
from evoprune.search.engine.dispatch import is_audited
from evoprune.search.engine.executor import Executor, Job, Outcome, evaluate
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.ray import RayExecutor

pytestmark = pytest.mark.ray
HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module", autouse=True)
def private_ray() -> Iterator[None]:
    """One private instance for the whole module; executors use what is there and leave it alone."""
    before = set(os.environ)
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # Ray reads its token once per process, so every instance that this process starts needs the same one.
        patch.setenv("RAY_AUTH_TOKEN", engine_ray._process_token)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100_000_000,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()
    for name in [name for name in os.environ if name.startswith("RAY_AUTH") and name not in before]:
        del os.environ[name]


MakeExecutor = Callable[..., RayExecutor]


@pytest.fixture
def make() -> Iterator[MakeExecutor]:
    """Makes started executors and closes them."""
    made: list[RayExecutor] = []

    def start(
        workers: int = 1, *, slots: int = 1, notify: Any = None, audited: tuple[str, ...] = (), **context: object
    ) -> RayExecutor:
        executor = RayExecutor(
            "fake_workers:build",
            dict(context),
            workers=workers,
            slots_per_worker=slots,
            python_path=[HERE],
            threads=2,
            notify=notify,
            audited=audited,
        )
        executor.start()
        made.append(executor)
        return executor

    yield start
    for executor in made:
        executor.close()


def essence(outcomes: list[Outcome]) -> list[tuple[object, ...]]:
    """Outcomes without what depends on time and place."""
    return [(outcome.key, outcome.status, outcome.values, outcome.error[-30:]) for outcome in outcomes]


def mixed_jobs(count: int) -> list[Job]:
    kinds = {3: "invalid", 5: "nan", 7: "broken"}
    return [Job(f"k{x}", kinds.get(x % 11, "square"), {"x": x}) for x in range(count)]


def fed(executor: Executor, jobs: list[Job], batch: int) -> list[Outcome]:
    """Outcomes in the order of the jobs, which come in batches: the next one after a look at what has finished."""
    found: dict[str, Outcome] = {}
    for first in range(0, len(jobs), batch):
        executor.submit(jobs[first : first + batch])
        found |= {outcome.key: outcome for outcome in executor.poll(0.0)}
    while len(found) < len(jobs):
        found |= {outcome.key: outcome for outcome in executor.poll(1.0)}
    return [found[job.key] for job in jobs]


def test_outcomes_are_those_of_the_inline_executor_for_any_number_of_workers(make: MakeExecutor) -> None:
    """Engine list 1."""
    inline = InlineExecutor("fake_workers:build", {"offset": 2}, python_path=[HERE], threads=None)
    inline.start()
    hashes = {}
    for batch in (1, 8):
        hashes["inline", batch] = content_hash(essence(fed(inline, mixed_jobs(250), batch)))
    for workers in (1, 2, 4):
        executor = make(workers, offset=2)
        warm_up(executor)
        for batch in (1, 8):
            outcomes = fed(executor, mixed_jobs(250), batch)
            hashes[workers, batch] = content_hash(essence(outcomes))
            assert len({outcome.telemetry["worker"] for outcome in outcomes}) == workers
        executor.close()
    assert len(set(hashes.values())) == 1, hashes


def warm_up(executor: RayExecutor) -> None:
    """Until every worker is there."""
    while executor.counters()["ready"] < executor.workers:
        executor.poll(0.0)
        time.sleep(0.05)


def test_start_and_submit_do_not_wait_for_workers(make: MakeExecutor) -> None:
    begin = time.monotonic()
    executor = make()
    executor.submit([Job("k", "square", {"x": 1})])
    assert time.monotonic() - begin < 0.5
    assert executor.counters()["starting"] == 1
    assert evaluate(executor, [Job("k", "square", {"x": 1})])[0].values["fitness"] == 1
    assert executor.poll(10.0) == []  # nothing is open, so there is nothing to wait for


def test_workers_get_their_threads_and_answer_from_their_own_process(make: MakeExecutor) -> None:
    (outcome,) = evaluate(make(), [Job("k", "where", {})])
    assert outcome.values["threads"] == "2"
    assert outcome.values["pid"] == outcome.telemetry["pid"] != os.getpid()
    assert (outcome.telemetry["worker"], outcome.telemetry["attempts"]) == (0, 1)


def test_the_slots_of_a_worker_run_at_the_same_time_in_one_process(make: MakeExecutor) -> None:
    executor = make(slots=4)
    assert executor.workers == 4
    outcomes = evaluate(executor, [Job(f"k{x}", "square", {"x": x, "seconds": 0.5}) for x in range(8)])
    assert [outcome.values["fitness"] for outcome in outcomes] == [x**2 for x in range(8)]
    assert len({outcome.telemetry["pid"] for outcome in outcomes}) == 1
    begun = [outcome.telemetry["started"] for outcome in outcomes]
    ended = [outcome.telemetry["finished"] for outcome in outcomes]
    at_once = [sum(a <= moment < b for a, b in zip(begun, ended, strict=True)) for moment in begun]
    assert max(at_once) == 4


def test_no_job_waits_at_one_worker_while_another_has_none(make: MakeExecutor) -> None:
    executor = make(2)
    warm_up(executor)
    outcomes = evaluate(executor, [Job(f"k{x}", "square", {"x": x, "seconds": 0.5}) for x in range(2)])
    assert len({outcome.telemetry["worker"] for outcome in outcomes}) == 2


def test_killed_workers_cost_no_outcome_and_condemn_nobody(make: MakeExecutor) -> None:
    ready: list[int] = []
    executor = make(2, notify=lambda _, event, **fields: event == "worker_ready" and ready.append(fields["pid"]))
    jobs = [Job(f"k{x}", "square", {"x": x, "seconds": 0.01}) for x in range(200)]
    counts: dict[str, int] = {}

    def kill_sometimes(outcome: Outcome) -> None:
        counts[outcome.key] = counts.get(outcome.key, 0) + 1
        if len(counts) in (20, 100):
            os.kill(ready.pop(0), signal.SIGKILL)

    outcomes = evaluate(executor, jobs, kill_sometimes)
    assert set(counts.values()) == {1}
    assert [outcome.values["fitness"] for outcome in outcomes] == [x**2 for x in range(200)]
    assert executor.counters()["deaths"] == 2


def test_a_poison_job_crashes_and_the_others_do_not(make: MakeExecutor) -> None:
    jobs = mixed_jobs(40)
    jobs.insert(7, Job("poison", "poison", {}))
    outcomes = evaluate(make(2), jobs)
    assert [outcome.key for outcome in outcomes if outcome.status == "crash"] == ["poison"]
    assert outcomes[7].telemetry["attempts"] >= 4
    assert sum(outcome.status == "ok" for outcome in outcomes) == sum(job.kind == "square" for job in jobs)


def test_whatever_ends_a_worker_ends_one_job_and_no_other(make: MakeExecutor) -> None:
    jobs = mixed_jobs(40)
    for place, kind in ((3, "leave"), (11, "segfault")):
        jobs.insert(place, Job(kind, kind, {}))
    outcomes = evaluate(make(2), jobs)
    assert [outcome.key for outcome in outcomes if outcome.status == "crash"] == ["leave", "segfault"]
    assert sum(outcome.status == "ok" for outcome in outcomes) == sum(job.kind == "square" for job in jobs)


def test_after_a_device_error_another_process_goes_on(make: MakeExecutor, tmp_path: Path) -> None:
    jobs = [Job("once", "device", {"marker": str(tmp_path / "a"), "once": True}), Job("k", "square", {"x": 3})]
    jobs.append(Job("always", "device", {"marker": str(tmp_path / "b")}))
    executor = make()
    once, other, always = evaluate(executor, jobs)
    assert (once.status, other.status, always.status) == ("ok", "ok", "crash")
    assert "CUDA error: an illegal memory access" in always.error
    assert executor.counters()["deaths"] == 5


def test_a_worker_that_finds_its_model_changed_stops_the_search(make: MakeExecutor) -> None:
    with pytest.raises(AuditFailed, match="worker 0: the restored model differs"):
        evaluate(make(), [Job("k", "changed", {})])


def test_workers_that_disagree_stop_the_search(make: MakeExecutor) -> None:
    """A hundredth of the jobs is done twice; the process id stands for a value that memory has spoilt."""
    audited = next(key for key in map(str, range(1000)) if is_audited(Job(key, "", {})))
    sound = [Job(audited if x == 3 else f"k{x}", "square", {"x": x}) for x in range(40)]
    executor = make(2, audited=("square", "where"))
    assert [outcome.values["fitness"] for outcome in evaluate(executor, sound)] == [x**2 for x in range(40)]
    spoilt = [Job(audited, "where", {}), *(Job(f"l{x}", "square", {"x": x, "seconds": 0.05}) for x in range(400))]
    with pytest.raises(AuditFailed, match="disagree about evaluation"):
        evaluate(executor, spoilt)


def test_draining_lets_what_runs_finish_and_begins_nothing_more(make: MakeExecutor) -> None:
    executor = make()
    executor.submit([Job(f"k{x}", "square", {"x": x, "seconds": 1.0}) for x in range(5)])
    while executor.counters()["running"] == 0:
        assert executor.poll(0.05) == []
    executor.drain()
    outcomes = []
    while executor.counters()["running"]:
        outcomes += executor.poll(0.1)
    outcomes += executor.poll(0.1)
    assert [outcome.key for outcome in outcomes] == ["k0"]


def test_a_job_that_hangs_times_out(make: MakeExecutor) -> None:
    hanging = Job("hang", "square", {"x": 1, "seconds": 600}, deadline=0.2)
    slow, other = evaluate(make(), [hanging, Job("k", "square", {"x": 3}, deadline=60)])
    assert slow.status == "timeout"
    assert other.values["fitness"] == 9


def test_when_no_worker_can_start_its_error_arrives(make: MakeExecutor) -> None:
    executor = make(2, refuse=True)
    with pytest.raises(WorkersFailed, match="no worker can start: InvalidInput: no model at /nowhere") as caught:
        evaluate(executor, mixed_jobs(3))
    assert caught.value.exit_code == 3
    assert "Traceback" in str(caught.value.__cause__)


def test_when_every_worker_dies_on_its_way_up_that_is_said_too(
    make: MakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evoprune.search.engine.crew.DEATHS_BEFORE_READY", 2)
    with pytest.raises(WorkersFailed, match="no worker can start"):
        evaluate(make(1, fall=True), mixed_jobs(1))


class Unloadable:
    """What an actor on a node that lacks something cannot even be made of."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.stat, ("/nowhere/libcuda.so.1",)


def test_an_actor_that_cannot_be_made_is_made_once() -> None:
    """Engine list 5, for what fails in Ray's own hands; `tests/door/test_starting.py` has the rest."""
    told: list[str] = []
    executor = RayExecutor(
        "fake_workers:build", {"device": Unloadable()}, workers=2, notify=lambda _, event, **fields: told.append(event)
    )
    executor.start()
    try:
        with pytest.raises(WorkersFailed, match=r"no worker can start: FileNotFoundError.*libcuda\.so\.1"):
            evaluate(executor, mixed_jobs(1))
    finally:
        executor.close()
    assert told.count("worker_refused") == 2


def test_workers_whose_numbers_are_not_the_runs_are_turned_away_by_nodes() -> None:
    """None is started again where one was refused: it would be the same there."""
    theirs = {"class": {"threads": 2}, "loss": 3.0, "bits": "00"}
    told: list[str] = []
    executor = RayExecutor(
        "fake_workers:build",
        {"numerics": theirs},
        workers=2,
        python_path=[HERE],
        admission=Admission(expected={**theirs, "class": {"threads": 1}}),
        notify=lambda _, event, **fields: told.append(event),
    )
    executor.start()
    try:
        with pytest.raises(WorkersFailed, match="no worker may take part: its numbers differ from the run's: threads"):
            evaluate(executor, mixed_jobs(1))
    finally:
        executor.close()
    assert told.count("worker_refused") <= 2


def test_without_a_ready_worker_for_too_long_there_is_no_capacity() -> None:
    executor = RayExecutor("fake_workers:build", {}, gpus_per_worker=1, python_path=[HERE], stall_seconds=0.5)
    executor.start()
    try:
        with pytest.raises(NoCapacity, match=r"no worker for 0\.5 s: Ray has no room for one"):
            evaluate(executor, mixed_jobs(1))
    finally:
        executor.close()


def test_a_factory_that_is_not_there_is_an_error_not_a_wait() -> None:
    executor = RayExecutor("no_such_module:build", {})
    executor.start()
    try:
        with pytest.raises(WorkersFailed, match="no_such_module"):
            evaluate(executor, mixed_jobs(1))
    finally:
        executor.close()


class FailingRay:
    """A head that fails as Ray's does, so many times."""

    def __init__(self, failures: int, message: str) -> None:
        self.failures, self.message = failures, message
        self.started, self.shut = 0, 0

    def init(self, **options: object) -> None:
        self.started += 1
        if self.started <= self.failures:
            raise ConnectionAbortedError(f"Initialization failure from server:\nTraceback:\n{self.message}")

    def shutdown(self) -> None:
        self.shut += 1


def test_a_client_that_its_head_did_not_reach_tries_again() -> None:
    fault = "Starting Ray client server failed. See ray_client_server_23000.err for detailed logs."
    twice = FailingRay(2, fault)
    engine_ray._start(twice, "ray://head:10001", {})
    assert (twice.started, twice.shut) == (3, 2)
    always = FailingRay(9, fault)
    with pytest.raises(ConnectionAbortedError, match="client server failed"):
        engine_ray._start(always, "ray://head:10001", {})
    assert always.started == 3
    other = FailingRay(1, "no such host")
    with pytest.raises(ConnectionAbortedError, match="no such host"):
        engine_ray._start(other, "ray://head:10001", {})
    assert other.started == 1


def test_senseless_sizes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="--workers is 0"):
        RayExecutor("fake_workers:build", {}, workers=0)
    with pytest.raises(InvalidInput, match=r"--gpus-per-worker is 1.5"):
        RayExecutor("fake_workers:build", {}, gpus_per_worker=1.5)
    with pytest.raises(InvalidInput, match="slots_per_worker is 0"):
        RayExecutor("fake_workers:build", {}, slots_per_worker=0)


@pytest.mark.parametrize(
    ("present", "workers", "each", "fits"),
    [
        (0, 2, 0.0, True),
        (0, 1, 1.0, False),
        (2, 2, 1.0, True),
        (2, 3, 1.0, False),
        (4, 2, 2.0, True),
        (3, 2, 2.0, False),
        (2, 4, 0.5, True),
        (2, 5, 0.5, False),
        (2, 3, 0.6, False),  # 0.6 of each of two devices, never of both
    ],
)
def test_more_workers_than_the_gpus_here_can_hold_are_refused(
    present: float, workers: int, each: float, fits: bool
) -> None:
    if fits:
        engine_ray._check_gpus(present, workers, each)
        return
    with pytest.raises(InvalidInput, match=rf"{workers} workers with {each:g} GPUs each do not fit on the {present}"):
        engine_ray._check_gpus(present, workers, each)


OWN_INSTANCE = """
import os, sys
from evoprune.search.engine import ray as engine_ray
from evoprune.search.engine.admission import Admission
from evoprune.search.engine.dispatch import is_audited
from evoprune.search.engine.executor import Job, evaluate
from evoprune.search.engine.ray import RayExecutor
if __name__ == "__main__":
    out = sys.stdout
    executor = RayExecutor("fake_workers:build", {}, python_path=[sys.argv[1]])
    executor.start()
    outcomes = evaluate(executor, [Job("p", "die_once", {"marker": sys.argv[2]}), Job("k", "square", {"x": 5})])
    print("chatter")
    executor.close()
    assert sys.stdout is out and "RAY_AUTH_TOKEN" not in os.environ
    print(outcomes[0].telemetry["attempts"], [outcome.status for outcome in outcomes])
"""


def test_an_instance_of_its_own_leaves_stdout_home_and_processes_clean(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(OWN_INSTANCE)
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(program), HERE, str(tmp_path / "marker")],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 ['ok', 'ok']\n"
    assert "raylet" not in done.stderr
    assert "chatter" in done.stderr
    assert list(home.rglob("*auth*")) == []
    give_up = time.monotonic() + 10
    while (left := processes_with_home(home)) and time.monotonic() < give_up:
        time.sleep(0.2)
    assert left == []


MONITORED = """
import sys
from evoprune.search.engine.executor import Job, evaluate
from evoprune.search.engine.ray import RayExecutor
if __name__ == "__main__":
    executor = RayExecutor("fake_workers:build", {}, workers=2, python_path=[sys.argv[1]])
    executor.start()
    jobs = [Job(f"k{x}", "square", {"x": x, "seconds": 0.1}) for x in range(20)]
    jobs.insert(3, Job("hoard", "hoard", {"bytes": int(sys.argv[2])}))
    outcomes = evaluate(executor, jobs)
    executor.close()
    print(*(outcome.status for outcome in outcomes))
"""


@pytest.mark.slow
def test_a_job_that_the_memory_monitor_ends_is_out_of_memory(tmp_path: Path) -> None:
    """Engine list 3, with Ray's threshold lowered to 2 GiB above what the machine has in use."""
    memory = pytest.importorskip("psutil").virtual_memory()
    if memory.available < 6 << 30:
        pytest.skip("needs 6 GiB of free memory")
    program = tmp_path / "program.py"
    program.write_text(MONITORED)
    threshold = (memory.total - memory.available + (2 << 30)) / memory.total
    monitor = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(program), HERE, str(5 << 30)],
        env={**clean, **monitor},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ok"] * 3 + ["oom"] + ["ok"] * 17


def processes_with_home(home: Path) -> list[str]:
    """The processes that were started with this HOME and still live."""
    psutil = pytest.importorskip("psutil")
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HOME") == str(home):
                found.append(" ".join(process.cmdline()))
    return found
