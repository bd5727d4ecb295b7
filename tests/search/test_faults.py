"""Whatever dies, and whenever: the history is that of an undisturbed run, and nothing finished is done again.

Real driver processes (`planted_driver`), real Ray, SIGKILL. What a run must look like afterwards is in `check`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evoprune.search.engine import ray as engine_ray
from evoprune.search.engine.journal import EvaluationLog
from tests.search.planted import Session

ROOT = Path(__file__).parents[2]
EVALUATIONS = 220
PATIENCE = 300.0
STORE = 100_000_000

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The history without any fault, in process."""
    session = Session(tmp_path_factory.mktemp("undisturbed") / "run")
    session.go(EVALUATIONS)
    return session.history


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """What drivers and clusters inherit: a token, so that no port of a test's is open to others."""
    with pytest.MonkeyPatch.context() as patch:
        # Ray reads its token once per process, so every instance that this process starts needs the same one.
        patch.setenv("RAY_AUTH_TOKEN", engine_ray._process_token)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


class Nodes:
    """A cluster on this machine: a head without room for workers, and raylets that come and go."""

    def __init__(self, *sizes: int) -> None:
        from ray.cluster_utils import Cluster

        fast = {
            "health_check_initial_delay_ms": 500,
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 2000,
            "health_check_failure_threshold": 3,
        }
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "_system_config": fast}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        for size in sizes:
            self.add(size)

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, size: int) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=size, object_store_memory=STORE))

    def kill_raylet(self, which: int) -> None:
        """SIGKILL of a raylet; the workers on it go with it."""
        node = self.nodes.pop(which)
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    def kill_head(self) -> None:
        """SIGKILL of the process that knows the cluster (GCS)."""
        os.kill(self.cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)

    def shutdown(self) -> None:
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(environment: None) -> Iterator[Nodes]:
    pytest.importorskip("ray")
    made = Nodes(2, 2)
    yield made
    made.shutdown()


class Run:
    """A run whose driver may be killed and started again."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder / "run"
        self.log = folder / "begun"
        self.errors = folder / "stderr"
        self.options = {"evaluations": EVALUATIONS, "log": self.log, **options}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **changes: object) -> subprocess.Popen[bytes]:
        options = {**self.options, **changes}
        words = [f"--{name}={value}" for name, value in options.items()]
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.search.planted_driver", str(self.folder), *words],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        return self.process

    @property
    def finished(self) -> int:
        """Evaluations in the log on disk."""
        return lines(self.folder / "evaluations.wal")

    @property
    def begun(self) -> list[tuple[str, int, float]]:
        """(key, process, time) of every evaluation that a worker has begun, oldest first."""
        if not self.log.exists():
            return []
        whole = self.log.read_text().rpartition("\n")[0].splitlines()
        return [(key, int(pid), float(moment)) for key, pid, moment in (line.split() for line in whole)]

    def wait_for(self, finished: int) -> bool:
        """Until so many evaluations are in the log; False if the driver ended before."""
        assert self.process is not None
        give_up = time.monotonic() + PATIENCE
        while self.finished < finished:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < give_up, self.errors.read_text()[-2000:]
            time.sleep(0.01)
        return True

    def end(self) -> int:
        """The driver's exit code, once it has one."""
        assert self.process is not None
        return self.process.wait(timeout=PATIENCE)

    def events(self, name: str) -> list[dict[str, Any]]:
        found = []
        for line in (self.folder / "events.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                found += [event] if event["event"] == name else []
        return found


def lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def check(run: Run, undisturbed: bytes) -> None:
    """The history is the undisturbed one; every evaluation counts once; none in the log was begun again."""
    assert (run.folder / "history.jsonl").read_bytes() == undisturbed
    raw = (run.folder / "evaluations.wal").read_text().splitlines()
    keys = [json.loads(line.partition(" ")[2])["k"] for line in raw]
    log = EvaluationLog(run.folder / "evaluations.wal")
    outcomes = {key: log.get(key) for key in keys}
    log.close()
    assert len(outcomes) == len(keys) == len(log) == EVALUATIONS
    assert {outcome.status for outcome in outcomes.values() if outcome is not None} == {"ok"}
    begun: dict[str, float] = {}
    for key, _, moment in run.begun:
        begun[key] = max(begun.get(key, 0.0), moment)
    assert begun.keys() == outcomes.keys()
    for key, outcome in outcomes.items():
        assert outcome is not None
        # The last attempt at a key is the one whose outcome is in the log.
        assert begun[key] <= outcome.telemetry["finished"] + 0.001


def test_drivers_are_killed_at_random_instants(nodes: Nodes, undisturbed: bytes, tmp_path: Path) -> None:
    """20 kills of the driver, another number of workers after each. One in four comes while it starts."""
    chance = random.Random(1)
    run = Run(tmp_path, address=nodes.address, seconds=0.02)
    for kill in range(20):
        process = run.start(workers=(1, 2, 3, 4)[kill % 4])
        if kill % 4 == 3:
            time.sleep(chance.uniform(0.5, 8.0))
        else:
            run.wait_for(run.finished + chance.randrange(1, 8))
            time.sleep(chance.uniform(0.0, 0.05))
        assert process.poll() is None, run.errors.read_text()[-2000:]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run.finished < EVALUATIONS
    run.start(workers=2)
    assert run.end() == 0, run.errors.read_text()[-2000:]
    check(run, undisturbed)


def test_workers_are_killed_while_they_work(nodes: Nodes, undisturbed: bytes, tmp_path: Path) -> None:
    """50 kills, each in the middle of an evaluation, which another worker then does."""
    run = Run(tmp_path, address=nodes.address, seconds=0.1)
    process = run.start(workers=4)
    seen, kills = 0, 0
    while kills < 50:
        assert process.poll() is None, (kills, run.errors.read_text()[-2000:])
        begun = run.begun
        if len(begun) >= seen + 3:
            seen = len(begun)
            with contextlib.suppress(ProcessLookupError):
                os.kill(begun[-1][1], signal.SIGKILL)
                kills += 1
        time.sleep(0.005)
    assert run.end() == 0, run.errors.read_text()[-2000:]
    check(run, undisturbed)
    assert len(run.events("worker_lost")) >= 50
    assert len(run.begun) > EVALUATIONS


def test_raylets_are_killed_and_others_join(nodes: Nodes, undisturbed: bytes, tmp_path: Path) -> None:
    """5 times a raylet with workers on it is killed, and a new node comes."""
    run = Run(tmp_path, address=nodes.address, seconds=0.05)
    process = run.start(workers=4)
    for kill in range(5):
        assert run.wait_for(run.finished + 8)
        nodes.kill_raylet(kill % 2)
        nodes.add(2)
    assert process.poll() is None
    assert run.end() == 0, run.errors.read_text()[-2000:]
    check(run, undisturbed)
    assert {event["loss"] for event in run.events("worker_lost")} >= {"node"}
