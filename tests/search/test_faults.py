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
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest

from evoprune.cli import main
from evoprune.search.engine import ray as engine_ray
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.rundir import RunDirectory, list_runs
from tests.door.conftest import CONFIG
from tests.models import save_tiny
from tests.search.engine.clusters import free_port, local_cluster
from tests.search.planted import Session
from tests.search.planted_driver import FACTORY

ROOT = Path(__file__).parents[2]
EVALUATIONS = 220
PATIENCE = 600.0
STORE = 100_000_000

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The search without any fault, in process."""
    session = Session(tmp_path_factory.mktemp("undisturbed") / "run", executor=InlineExecutor(FACTORY, {}))
    session.go(EVALUATIONS)
    return session


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """What drivers and clusters inherit: a token, so that no port of a test's is open to others."""
    with pytest.MonkeyPatch.context() as patch:
        # Ray reads its token once per process, so every instance that this process starts needs the same one.
        patch.setenv("RAY_AUTH_TOKEN", engine_ray._process_token)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # a busy machine would let workers starve
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

    def remove(self, which: int) -> None:
        """A node leaves, with time to say so."""
        self.cluster.remove_node(self.nodes.pop(which))

    def kill_head(self) -> None:
        """SIGKILL of the process that knows the cluster (GCS)."""
        os.kill(self.cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)

    def restart_head(self, seconds: float) -> None:
        """The same, and `seconds` later it is back at its address."""
        self.kill_head()
        head = self.cluster.head_node
        time.sleep(seconds)
        head.kill_gcs_server(check_alive=False)
        head.start_gcs_server()

    def shutdown(self) -> None:
        self.cluster.shutdown()

    def abandon(self) -> None:
        """End every process of a cluster that has lost its head, which could not take its leave."""
        for node in (self.cluster.head_node, *self.nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes(environment: None) -> Iterator[Nodes]:
    pytest.importorskip("ray")
    made = Nodes(2, 2)
    yield made
    made.shutdown()


RUNS: list[Run] = []


@pytest.fixture(autouse=True)
def no_driver_is_left() -> Iterator[None]:
    """A test that fails leaves no driver at work."""
    yield
    while RUNS:
        process = RUNS.pop().process
        if process is not None:
            process.kill()
            process.wait()


class Run:
    """A run whose driver may be killed and started again."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder / "run"
        self.log = folder / "begun"
        self.errors = folder / "stderr"
        self.options = {"evaluations": EVALUATIONS, "log": self.log, **options}
        self.process: subprocess.Popen[bytes] | None = None
        RUNS.append(self)

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


def check(run: Run, undisturbed: Session) -> None:
    """History and state are the undisturbed ones; every evaluation counts once; none in the log was begun again."""
    for name in ("history.jsonl", "state.json"):
        assert (run.folder / name).read_bytes() == (undisturbed.run.path / name).read_bytes()
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


def test_drivers_are_killed_at_random_instants(nodes: Nodes, undisturbed: Session, tmp_path: Path) -> None:
    """20 kills of the driver, another number of workers after each. One in four comes while it starts."""
    chance = random.Random(1)
    run = Run(tmp_path, address=nodes.address, seconds=0.04)
    for kill in range(20):
        before = run.finished
        process = run.start(workers=(1, 2, 1, 3)[kill % 4])
        if kill % 4 == 3:
            # A quick machine is at work long before 8 s: then it is killed there, or it would come to the end.
            latest = time.monotonic() + chance.uniform(0.5, 8.0)
            while time.monotonic() < latest and run.finished < before + 5:
                time.sleep(0.01)
        else:
            run.wait_for(before + chance.randrange(1, 8))
            time.sleep(chance.uniform(0.0, 0.05))
        assert process.poll() is None, run.errors.read_text()[-2000:]
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run.finished < EVALUATIONS
    run.start(workers=2)
    assert run.end() == 0, run.errors.read_text()[-2000:]
    check(run, undisturbed)


def test_workers_are_killed_while_they_work(nodes: Nodes, undisturbed: Session, tmp_path: Path) -> None:
    """50 kills, each in the middle of an evaluation, which another worker then does."""
    run = Run(tmp_path, address=nodes.address, seconds=0.1)
    process = run.start(workers=3)
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


def test_raylets_are_killed_and_others_join(nodes: Nodes, undisturbed: Session, tmp_path: Path) -> None:
    """5 times a raylet with workers on it is killed, once a node takes its leave, and each time a new one comes.

    With health checks every half second the work never stands still for 10 s (engine list 4).
    """
    run = Run(tmp_path, address=nodes.address, seconds=1.0)  # slow, for a new node takes seconds to join
    process = run.start(workers=4)
    for loss in range(6):
        assert run.wait_for(run.finished + 5)
        if loss == 2:
            nodes.remove(loss % 2)
        else:
            nodes.kill_raylet(loss % 2)
        nodes.add(2)
    assert process.poll() is None
    assert run.end() == 0, run.errors.read_text()[-2000:]
    check(run, undisturbed)
    assert {event["loss"] for event in run.events("worker_lost")} >= {"node"}
    log = EvaluationLog(run.folder / "evaluations.wal")
    finished = sorted(outcome.telemetry["finished"] for outcome in log.outcomes())
    log.close()
    assert max(later - earlier for earlier, later in pairwise(finished)) < 10


@pytest.mark.parametrize("workers", ["all"])
def test_a_head_that_is_gone_ends_the_driver_resumably(
    workers: int | str, environment: None, undisturbed: Session, tmp_path: Path
) -> None:
    """Left alone, Ray would end the process after a minute, with exit code 1 and without a word."""
    nodes = Nodes(1)
    try:
        run = Run(tmp_path, address=nodes.address, seconds=0.3)
        run.start(workers=workers)
        assert run.wait_for(5)
        nodes.kill_head()
        assert run.end() == 75, run.errors.read_text()[-2000:]
        assert "NoCapacity: the head of the Ray cluster" in run.errors.read_text()
    finally:
        nodes.abandon()
    resume_elsewhere(run, undisturbed)


def resume_elsewhere(run: Run, undisturbed: Session) -> None:
    """Nothing that was finished is lost, and the rest is done without the cluster."""
    assert 5 <= run.finished < EVALUATIONS
    run.start(workers=0, seconds=0)
    assert run.end() == 0, run.errors.read_text()[-2000:]
    check(run, undisturbed)


@pytest.mark.parametrize("workers", [2])
def test_a_head_that_comes_back_with_its_memory_costs_nothing(
    workers: int | str, environment: None, undisturbed: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own store on disk (alpha in 2.60) in place of Redis. A worker is lost afterwards and replaced."""
    (tmp_path / "gcs").mkdir()
    monkeypatch.setenv("RAY_gcs_storage", "rocksdb")
    monkeypatch.setenv("RAY_gcs_storage_path", str(tmp_path / "gcs"))
    nodes = Nodes(2)
    try:
        run = Run(tmp_path, address=nodes.address, seconds=0.4)
        run.start(workers=workers)
        assert run.wait_for(5)
        nodes.restart_head(8.0)
        assert run.wait_for(run.finished + 5)
        os.kill(run.begun[-1][1], signal.SIGKILL)
        assert run.end() == 0, run.errors.read_text()[-2000:]
        check(run, undisturbed)
        assert len(run.events("worker_ready")) == 3
    finally:
        nodes.abandon()


@pytest.mark.parametrize("workers", [2, "all"])
def test_a_head_that_comes_back_without_its_memory_ends_the_driver_resumably(
    workers: int | str, environment: None, undisturbed: Session, tmp_path: Path
) -> None:
    """As soon as a worker is needed. Some questions to such a head would abort the process."""
    nodes = Nodes(2)
    try:
        run = Run(tmp_path, address=nodes.address, seconds=0.4)
        run.start(workers=workers)
        assert run.wait_for(5)
        nodes.restart_head(8.0)
        assert run.wait_for(run.finished + 5)
        os.kill(run.begun[-1][1], signal.SIGKILL)
        assert run.end() == 75, run.errors.read_text()[-2000:]
        assert "NoCapacity: the Ray cluster at" in run.errors.read_text()
    finally:
        nodes.abandon()
    resume_elsewhere(run, undisturbed)


def test_a_client_whose_head_is_gone_ends_resumably(
    undisturbed: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left alone, Ray would look for another cluster on this machine, and wait for it."""
    pytest.importorskip("grpc", reason="needs evoprune[cluster]")
    port = free_port()
    with local_cluster(tmp_path) as cluster:
        cluster.add("head", 2, options=[f"--ray-client-server-port={port}"])
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"):
            monkeypatch.setenv(name, cluster.environment[name])
        run = Run(tmp_path, address=f"ray://127.0.0.1:{port}", seconds=0.3)
        run.start(workers=2)
        assert run.wait_for(5)
        cluster.remove("head")
        assert run.end() == 75, run.errors.read_text()[-2000:]
        assert f"NoCapacity: the Ray cluster at ray://127.0.0.1:{port} is lost" in run.errors.read_text()
    resume_elsewhere(run, undisturbed)


def test_without_room_on_the_cluster_the_command_ends_resumably(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_ray, "STALL_SECONDS", 5.0)
    run = tmp_path / "run"
    words = ["search", "metric", "--address", nodes.address, "--gpus-per-worker", "1", "--run-dir", str(run)]
    assert main(words) == 75
    last = capsys.readouterr().err.splitlines()[-1]
    assert "no worker for 5 s" in last
    assert last.endswith(f"continue with `evoprune resume {run} --address {nodes.address} --gpus-per-worker 1`")
    assert RunDirectory(run).state == "interrupted"


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Words that make a search one of seconds."""
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    return [str(save_tiny(tmp_path / "model")), "--config", str(config)]


def test_searches_share_a_cluster_a_cache_and_a_storage(
    nodes: Nodes, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once, from one folder and with a cold cache: each gives what it gives alone."""
    monkeypatch.chdir(tmp_path)
    storage = f"sqlite:///{tmp_path / 'board.db'}"
    shared = ["--address", nodes.address, "--workers", "1", "--storage", storage]
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EVOPRUNE_RUNS", str(tmp_path / "runs"))
    command = [sys.executable, "-m", "evoprune", "search", "metric", *tiny]
    together = [
        subprocess.Popen([*command, *shared, "--seed", str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for seed in (1, 2)
    ]
    for process in together:
        _, errors = process.communicate(timeout=2 * PATIENCE)
        assert process.returncode == 0, errors.decode()[-2000:]
        assert errors.count(b"no GPU in the cluster yet") == 1
    runs = {run.config["seed"]: run for run in list_runs()}
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "other-cache"))
    for seed in (1, 2):
        alone = tmp_path / f"alone-{seed}"
        words = [*command, "--executor", "inline", "--seed", str(seed), "--run-dir", str(alone)]
        subprocess.run(words, check=True, capture_output=True)
        assert (runs[seed].path / "history.jsonl").read_bytes() == (alone / "history.jsonl").read_bytes()
        study = optuna.load_study(study_name=runs[seed].run_id, storage=storage)
        assert len(study.trials) == runs[seed].config["evaluations"]
        assert not any(hides_a_secret(path) for path in runs[seed].path.rglob("*") if path.is_file())


def hides_a_secret(path: Path) -> bool:
    """Whether a file holds the cluster's token, or looks like a pickle."""
    data = path.read_bytes()
    return engine_ray._process_token.encode() in data or data[:1] == b"\x80"  # as pickles of protocol 2 and later
