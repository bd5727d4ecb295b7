"""Evaluate on Ray actors, on this machine or on a cluster. Only this file and the librarian's import ray, at the start.

Ray lives in one thread of its own, the keeper: it connects, feeds the workers, replaces the dead ones and shuts down.
So the search never waits for Ray, workers never wait for the search, and Ray's processes, which end with the thread
that started them, end with the executor.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evoprune.fitness import parcels as fitness_parcels
from evoprune.metrics.errors import InvalidInput, NoCapacity, WorkersFailed
from evoprune.metrics.files import canonical_json
from evoprune.search.engine.address import AUTO, LOCAL, running_cluster, split_address
from evoprune.search.engine.admission import Admission
from evoprune.search.engine.crew import Crew, room
from evoprune.search.engine.executor import Executor, Job, Notify, Outcome
from evoprune.search.engine.head import Head
from evoprune.search.engine.librarian import RayCourier, engage, package_folder
from evoprune.search.engine.running import WorkerRecipe, last_line
from evoprune.search.engine.stdout import stdout_kept_clean

OBJECT_STORE_BYTES = 200_000_000
"""Jobs and outcomes are small and models are shared through memory-mapped files, so Ray's own store stays small."""
STALL_SECONDS = 600.0
KNOCK_SECONDS = 10.0
GROW_SECONDS = 2.0
"""Between two looks at how many workers a cluster has room for."""
NO_GPU = "no GPU in the cluster yet: workers run on CPUs; --gpus-per-worker 1 waits for some"

_CLIENT_ATTEMPTS = 3

_process_token = secrets.token_hex(32)
"""Ray reads its token once per process, so all private instances of a process use the same one."""


class RayExecutor(Executor):
    """Keeps `workers` long-lived actors busy, each with a worker of its own; dead ones are replaced.

    Args:
        factory: `"module:function"` that makes a worker from the context, in the actor.
        context: JSON data for the factory.
        workers: how many actors; None takes as many as a cluster has room for, and more as it grows. Those that have
            no room wait until a node joins.
        slots_per_worker: how many jobs an actor runs at the same time, each in a thread of its own. Above 1 the worker
            must bear that, and a worker's death makes all that it ran suspects.
        gpus_per_worker: a fraction of a device or whole devices; 0 is CPU only; None is 1 if the cluster has any.
        threads: torch threads of every worker.
        address: `local` starts a private instance on this machine; anything else is a running cluster's address, and
            this package and `parcels` are sent there. A Ray that this process is connected to already is used as it
            is.
        parcels: names of this machine's parcels that workers will ask for.
        admission: decides which workers may take part; by default all that have this process's code.
        python_path: folders that actors import from first.
        environment: environment variables of the actors.
        notify: is told what happens to the workers, from the keeper's thread.
        audited: kinds of jobs whose values depend on nothing but the job, to the last bit, on every worker that is
            admitted. A hundredth of them is done again by another worker; if that gives other values, `poll` raises
            `AuditFailed`.
        stall_seconds: without any worker for this long, `poll` raises `NoCapacity`; None is `STALL_SECONDS`.
    """

    def __init__(
        self,
        factory: str,
        context: dict[str, Any],
        *,
        workers: int | None = 1,
        slots_per_worker: int = 1,
        gpus_per_worker: float | None = 0.0,
        threads: int = 1,
        address: str = LOCAL,
        parcels: Sequence[str] = (),
        admission: Admission | None = None,
        python_path: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        notify: Notify | None = None,
        audited: Collection[str] = (),
        stall_seconds: float | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise InvalidInput(f"--workers is {workers}; it must be at least 1")
        if slots_per_worker < 1:
            raise InvalidInput(f"slots_per_worker is {slots_per_worker}; it must be at least 1")
        if not (gpus_per_worker is None or 0 <= gpus_per_worker < 1 or gpus_per_worker in range(1, 1025)):
            raise InvalidInput(f"--gpus-per-worker is {gpus_per_worker}; it must be below 1 or a whole number")
        self._size = workers
        self._slots = slots_per_worker
        self._gpus = gpus_per_worker
        self._recipe = WorkerRecipe(factory, context, threads, tuple(python_path), dict(environment or {}))
        self._address = address
        self._parcels = tuple(parcels)
        self._admission = admission
        self._audited = frozenset(audited)
        self._notify: Notify = notify or (lambda *_, **__: None)
        self._stall_seconds = STALL_SECONDS if stall_seconds is None else stall_seconds
        self._unanswered: set[str] = set()
        self._inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._sigterm_taken = threading.Event()
        self._draining = threading.Event()
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._failure: BaseException | None = None
        self._keeper: threading.Thread | None = None
        self._surroundings = contextlib.ExitStack()
        self._counters = {"ready": 0, "starting": workers or 1, "running": 0, "deaths": 0}
        self.workers = (workers or 1) * slots_per_worker

    def start(self) -> None:
        """Begin to start Ray and the workers, and return at once.

        From here to `close`, `sys.stdout` leads to stderr: whoever writes results there has kept the real one.
        """
        if self._keeper is None:
            self._surroundings.enter_context(stdout_kept_clean(self._notify))
            self._surroundings.enter_context(_private_settings(self._address))
            self._keeper = threading.Thread(target=self._keep, name="ray-keeper", daemon=True)
            self._keeper.start()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs; see `Executor.submit`. They wait until a worker is ready."""
        for job in jobs:
            canonical_json(job.payload)  # what cannot be sent is refused here, not in the keeper's thread
            if job.key not in self._unanswered:
                self._unanswered.add(job.key)
                self._inbox.put(job)
        self._wake.set()

    def poll(self, timeout: float) -> list[Outcome]:
        """What has finished; see `Executor.poll`."""
        if self._keeper is None:
            raise RuntimeError("start() comes before poll()")
        if self._closing.is_set():
            raise RuntimeError("closed")
        if self._sigterm_taken.is_set() and threading.current_thread() is threading.main_thread():
            self._sigterm_taken.clear()
            _take_sigterm_back()
        outcomes: list[Outcome] = []
        with contextlib.suppress(queue.Empty):
            if self._unanswered or self._failure is not None:
                outcomes += self._received(self._outbox.get(timeout=timeout))
            while True:
                outcomes += self._received(self._outbox.get_nowait())
        if not outcomes and self._failure is not None:
            raise self._failure
        return outcomes

    def drain(self) -> None:
        """See `Executor.drain`."""
        self._draining.set()
        self._wake.set()

    def counters(self) -> dict[str, int]:
        """See `Executor.counters`."""
        return dict(self._counters)

    def close(self) -> None:
        """Stop the workers, and Ray if this executor started it. Waits for a start-up in progress."""
        self._closing.set()
        self._wake.set()
        if self._keeper is not None:
            self._keeper.join()
            self._surroundings.close()

    def _received(self, outcome: Outcome | None) -> list[Outcome]:
        """The outcome as a list; the keeper's farewell, None, is an empty one."""
        if outcome is None:
            self._outbox.put(None)  # every later poll finds it again
            raise queue.Empty
        self._unanswered.discard(outcome.key)
        return [outcome]

    def _keep(self) -> None:
        """The keeper's thread, from the connection to Ray until `close`."""
        try:
            with _connected(self._address, self._size, self._gpus) as ray, self._libraried(ray) as librarian:
                self._sigterm_taken.set()
                self._notify("info", "ray_started", logs=_log_folder(ray))
                # A client of Ray speaks to a proxy, and need not reach the head.
                head = None if self._address.startswith("ray://") else Head(ray.get_runtime_context().gcs_address)
                crew = self._crew(ray, librarian, head)
                look = time.monotonic() + GROW_SECONDS
                try:
                    while not self._closing.is_set():
                        self._wake.clear()
                        crew.submit(self._take_inbox())
                        if self._draining.is_set():
                            crew.drain()
                        for outcome in crew.step(self._wake):
                            self._outbox.put(outcome)
                        if head is not None:
                            head.check()
                        if self._size is None and time.monotonic() > look:
                            crew.grow()
                            look = time.monotonic() + GROW_SECONDS
                        self._counters, self.workers = crew.counters(), crew.size * self._slots
                except (ray.exceptions.RayError, ConnectionError) as problem:
                    place = "on this machine" if self._address == LOCAL else f"at {self._address}"
                    raise NoCapacity(
                        f"the Ray cluster {place} is lost: its head is gone, or was restarted and knows no workers"
                    ) from problem
                finally:
                    crew.dismiss()
        except BaseException as problem:
            self._failure = problem
        finally:
            self._outbox.put(None)

    def _crew(self, ray: Any, librarian: Any, head: Head | None = None) -> Crew:
        """The crew with the resources that were asked for, or those that the cluster has."""
        gpus = self._gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
            if not gpus and self._address != LOCAL:  # an autoscaler may have GPUs to come, and starts them when asked
                self._notify("info", "no_gpu", text=NO_GPU)
        # Ray leaves all GPUs visible to an actor that asked for none.
        hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
        recipe = replace(
            self._recipe,
            environment={**hidden, **self._recipe.environment},
            gpu_share=gpus if 0 < gpus < 1 else 1.0,
        )
        crowded = self._address != LOCAL and not gpus
        options = {"num_cpus": (recipe.threads or 1) if crowded else 1, "num_gpus": gpus}
        size = self._size or max(room(ray, options), 1)
        self.workers = size * self._slots
        return Crew(
            ray,
            recipe,
            size,
            options,
            self._notify,
            self._stall_seconds,
            self._admission,
            librarian,
            elastic=self._size is None,
            slots=self._slots,
            audited=self._audited,
            head=head,
        )

    @contextlib.contextmanager
    def _libraried(self, ray: Any) -> Iterator[Any]:
        """A librarian with this machine's parcels; None for a private instance, where all share one cache."""
        if self._address == LOCAL:
            yield None
            return
        librarian = engage(ray, over_client=self._address.startswith("ray://"))
        fitness_parcels.set_courier(RayCourier(librarian))
        try:
            for name in self._parcels:
                fitness_parcels.deliver(name)
            yield librarian
        finally:
            fitness_parcels.set_courier(None)
            with contextlib.suppress(Exception):
                ray.kill(librarian)

    def _take_inbox(self) -> Iterator[Job]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._inbox.get_nowait()


@contextlib.contextmanager
def _connected(address: str, workers: int | None, gpus_per_worker: float | None) -> Iterator[Any]:
    """Connect to Ray, or start it; yields the module, and undoes what it did.

    Raises:
        WorkersFailed: Ray is missing, does not start, or cannot be reached.
        InvalidInput: this machine has too few GPUs.
    """
    try:
        import ray
    except ImportError as problem:
        raise WorkersFailed(f"Ray cannot be imported ({problem}); --executor inline works without it") from problem
    if ray.is_initialized():
        yield ray
        return
    _check_reachable(address)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any]
        if address == LOCAL:
            options = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        else:
            options = {"runtime_env": stack.enter_context(_shipment())}
        try:
            _start(ray, address, options)
        except Exception as problem:
            place = "on this machine" if address == LOCAL else f"at {address}"
            lacks = isinstance(problem, ImportError) and address.startswith("ray://")
            hint = "; ray:// needs pip install 'evoprune[cluster]'" if lacks else ""
            raise WorkersFailed(f"Ray does not start {place}: {last_line(str(problem))}{hint}") from problem
    try:
        if address == LOCAL:
            _check_gpus(ray.cluster_resources().get("GPU", 0.0), workers or 1, gpus_per_worker or 0.0)
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, address: str, options: dict[str, Any]) -> None:
    """`ray.init`, again where the server that the head starts for this client ends before it is up.

    Ray's client then raises ConnectionAbortedError, with the head's traceback as its text.
    """
    for left in reversed(range(_CLIENT_ATTEMPTS)):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            return
        except ConnectionAbortedError as problem:
            if not left or "Starting Ray client server failed" not in str(problem):
                raise
            ray.shutdown()


def _take_sigterm_back() -> None:
    """Make Python's handler of SIGTERM the process's again: Ray's calls it, but aborts the process 3 s later."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _private_settings(address: str) -> Iterator[None]:
    """Environment that Ray is to find: a token for a private instance, so that none is written to HOME; no reports;
    workers at this process's priority, for Ray's niceness of 15 starves them on a machine that has other work; and no
    looking for another cluster, which a call of Ray's would do by itself after a `ray://` connection has ended."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}
    known = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"}
    if address == LOCAL and not known & os.environ.keys():
        wanted["RAY_AUTH_TOKEN"] = _process_token
    # Ray sets RAY_AUTH_MODE itself, which the next private instance must not take for the user's choice.
    absent = [name for name in {*wanted, *known} if name not in os.environ]
    os.environ.update({name: value for name, value in wanted.items() if name in absent})
    try:
        yield
    finally:
        for name in absent:
            os.environ.pop(name, None)


def _check_reachable(address: str) -> None:
    """Knock first: Ray itself would go on trying for minutes.

    Raises:
        WorkersFailed: nothing listens there, or `auto` stands for no cluster.
    """
    if address == LOCAL:
        return
    found = running_cluster() if address == AUTO else address
    if found is None:
        raise WorkersFailed(
            "no Ray cluster runs on this machine: `ray start` here first, or give its --address HOST:PORT "
            "or ray://HOST:PORT in place of auto"
        )
    host, port = split_address(found) or ("", 0)
    if host:
        try:
            socket.create_connection((host, port), timeout=KNOCK_SECONDS).close()
        except OSError as problem:
            raise WorkersFailed(f"no Ray cluster answers at {found}: {problem.strerror or problem}") from None


@contextlib.contextmanager
def _shipment() -> Iterator[dict[str, Any]]:
    """A runtime environment that brings this package to the nodes; empty if the job that this is part of brings it.

    Ray names the upload by its content, so a changed file reaches nodes that have an older copy.
    """
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    if "py_modules" in job:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="evoprune-") as scratch:
        folder = package_folder(Path(scratch))
        yield {"py_modules": [str(folder)], "excludes": ["**/__pycache__", "**/*.pyc"]}


def current_cluster() -> str | None:
    """``host:port`` of the cluster that `ray start` began on this machine, None if there is none."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address("auto")
    except ConnectionError:
        return None


def _check_gpus(present: float, workers: int, gpus_per_worker: float) -> None:
    """Refuse more workers than the GPUs of this machine can hold; Ray would wait for them forever."""
    # Ray gives out whole devices, or fractions of one: 0.6 of each of two devices is one worker per device.
    room = int(present) * int(1 / gpus_per_worker + 1e-9) if 0 < gpus_per_worker < 1 else present
    needed = workers if 0 < gpus_per_worker < 1 else workers * gpus_per_worker
    if needed > room:
        raise InvalidInput(
            f"{workers} workers with {gpus_per_worker:g} GPUs each do not fit on the {present:g} GPUs here; "
            "lower --workers or --gpus-per-worker (0 is CPU only)"
        )


def _log_folder(ray: Any) -> str:
    """Where Ray writes its logs."""
    node = getattr(ray._private.worker, "_global_node", None)
    return node.get_logs_dir_path() if node is not None else "on the cluster"
