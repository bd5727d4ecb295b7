"""One session of a run: its workers, what they prepare, and what a run must not change."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from evoprune.fitness.prepare import Summary
from evoprune.fitness.travel import pack_inputs
from evoprune.metrics.errors import Interrupted, InvalidInput, WorkersFailed
from evoprune.metrics.files import content_hash
from evoprune.search.config_sections import SearchConfig, with_window
from evoprune.search.engine.address import EXPOSURE, LOCAL
from evoprune.search.engine.admission import Admission
from evoprune.search.engine.deadline import Deadline
from evoprune.search.engine.executor import Executor, Job, Outcome
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.engine.ray import RayExecutor
from evoprune.search.identity import code_hash, evaluation_code_hash
from evoprune.search.loop import finish_running, take_finished
from evoprune.search.progress import Progress
from evoprune.search.result import failure, invalid_input
from evoprune.search.rundir import RunDirectory
from evoprune.search.watch import Watch

Config = TypeVar("Config", bound=SearchConfig)

# Facts of a run that must not change between its sessions, and what they are called.
_FIXED = {
    "config": "configuration",
    "code": "code of evoprune",
    "prepared": "model or data",
    "files": "bits of the statistics or of the teacher (another processor, or another library)",
    "database": "bits of the level database (another processor, or another library)",
    "seeds": "candidates to start from",
    "allocation": "allocation that candidates are masked at",
    "latencies": "table of latencies",
}


STARTING_SECONDS = 120.0
"""How long a measurement of times waits for workers to be up, which load their models beside it otherwise."""


@dataclass(frozen=True)
class Resources:
    """Where a search runs. Nothing here changes its history.

    Attributes:
        executor: Ray actors, or this process.
        workers: number of workers; None takes one per processor core, or per GPU, of this machine or of the cluster.
        gpus_per_worker: GPUs of a worker, a fraction of one, or 0; None is 1 if there is a GPU.
        address: ``local`` for a private Ray instance, else a cluster's address.
        storage: Optuna storage URL; None keeps the board in the run folder.
        insecure_cluster: use a cluster that asks for no token; see `evoprune.search.engine.address`.
        lost_board: the database that the board was in, without the password that this session would need for it.
    """

    executor: Literal["ray", "inline"] = "ray"
    workers: int | None = None
    gpus_per_worker: float | None = None
    address: str = LOCAL
    storage: str | None = None
    insecure_cluster: bool = False
    lost_board: str | None = None

    @property
    def on_cluster(self) -> bool:
        """Whether workers run on nodes that may share nothing with this machine."""
        return self.executor == "ray" and self.address != LOCAL


class Ask(Protocol):
    """Gives the outcomes of jobs, in their order; those in the run's log are not run again."""

    def __call__(self, jobs: Sequence[Job], *, limited: bool = True, alone: bool = False) -> list[Outcome]:
        """Outcomes of `jobs`; `limited` ones take as long as a pass over the held-out text, or count as hung.

        Those to be done `alone` take times: they wait until no worker is starting up beside them, for a while.

        Raises:
            Interrupted: the user wants to stop.
        """


class First(Protocol):
    """Has a worker do what every session begins with, whatever is in the run's log; what is cached takes no time."""

    def __call__(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The values of the one job of this kind.

        Raises:
            Interrupted: the user wants to stop.
        """


class WorkerSession(ABC, Generic[Config]):
    """One session of a run: its workers, what they prepare, and what the run must not change.

    Args:
        run: locked by this process.
        config: as stored in the run.
        resources: of this session.
        progress: shows what happens.

    Attributes:
        worker_factory: what executors call.
        pure_jobs: kinds of jobs that give the same values on every admitted worker; `prepare` also times itself.
    """

    worker_factory: ClassVar[str]
    pure_jobs: ClassVar[tuple[str, ...]]

    def __init__(self, run: RunDirectory, config: Config, resources: Resources, progress: Progress) -> None:
        self.config = config
        self.progress = progress
        self.context = config.context()
        self.identity = ""
        self._run = run
        self._resources = resources
        self._watch = Watch(run, config, progress, resources.storage, resources.lost_board)
        self._log = EvaluationLog(run.path / "evaluations.wal")
        self._stopping: Callable[[], bool] = lambda: False
        self._seconds_per_token = 0.0
        self._compressor_seconds = 0.0
        self._deadline = Deadline(None, 0.0)
        self._facts: dict[str, Any] = {}
        known = run.identity
        mixed = known.get("bit_reproducible") is False
        self._admission = Admission(config.numerics, known.get("numerics"), mixed, self.measures_time)

    @abstractmethod
    def seeds_identity(self) -> Any:
        """What the search starts from, as JSON values."""

    @property
    def measures_time(self) -> bool:
        """Whether times are part of what is searched, so that all workers must be of one kind of device."""
        return False

    def given_facts(self) -> dict[str, str]:
        """What else must not change between the run's sessions and is known without workers: hashes by name."""
        return {}

    def phase(self, name: str, details: str = "") -> None:
        """A part of the work begins."""
        self._watch.phase(name, details)

    def _begin(self, stopping: Callable[[], bool]) -> None:
        """The session begins, on what the run began with.

        Raises:
            InvalidInput: configuration or code changed.
        """
        self._stopping = stopping
        self._hold(config=self.config.identity, code=code_hash(), **self.given_facts())

    @contextmanager
    def _workers(self) -> Iterator[Executor]:
        """Workers for as long as the block takes."""
        executor = self._executor()
        try:
            self._watch.starting(executor)
            executor.start()
            yield executor
        finally:
            executor.close()
            if self._admission.mixed:
                self._run.add_identity(bit_reproducible=False)

    def _end(self, stopping: Callable[[], bool]) -> None:
        """The session ends, however it does."""
        self._watch.close(stopping)
        self._log.close()

    def _executor(self) -> Executor:
        resources = self._resources
        if resources.executor == "inline":
            return InlineExecutor(
                self.worker_factory,
                self.context.to_json(),
                threads=self.config.threads,
                admission=self._admission,
            )
        workers, gpus, places = resources.workers, resources.gpus_per_worker, {}
        if resources.on_cluster:
            self.progress.phase("packing the model and the texts for the cluster")
            places = pack_inputs(self.context)
            if resources.insecure_cluster:
                self.progress.line(f"warning: --insecure-cluster: {resources.address} may be open, and {EXPOSURE}")
        else:
            workers, gpus = workers or _slots(gpus), _gpus(gpus)
        return RayExecutor(
            self.worker_factory,
            replace(self.context, places=places).to_json(),
            workers=workers,
            gpus_per_worker=gpus,
            threads=self.config.threads,
            address=resources.address,
            parcels=sorted({place.partition("/")[0] for place in places.values()}),
            admission=self._admission,
            notify=self._notify,
            audited=self.pure_jobs if self.config.numerics == "strict" else (),
        )

    def _notify(self, level: str, event: str, **fields: Any) -> None:
        """To the run's log; on the display too, what the search goes on without: GPUs, or a refused worker."""
        self._run.events(level, event, **fields)
        if event == "worker_refused" and level == "warning":
            self.progress.line(f"a worker was refused: {fields['error']}")
        elif event == "no_gpu":
            self.progress.line(fields["text"])

    def _ask(
        self,
        executor: Executor,
        stopping: Callable[[], bool],
        jobs: Sequence[Job],
        *,
        limited: bool = True,
        alone: bool = False,
    ) -> list[Outcome]:
        """See `Ask`."""
        missing = {job.key: job for job in jobs if job.key not in self._log}
        patience = time.monotonic() + (STARTING_SECONDS if alone and missing else 0.0)
        while executor.counters()["starting"] and time.monotonic() < patience and not stopping():
            time.sleep(0.1)
            self._watch.tick()
        executor.submit(
            replace(job, deadline=self._deadline.seconds(self.tokens_asked(job)) if limited else None)
            for job in missing.values()
        )
        waiting = set(missing)
        while waiting:
            if stopping():
                finish_running(executor, self._log, self._polled)
                raise Interrupted("stopped by the user; everything finished is saved")
            take_finished(executor, self._log)
            waiting = {key for key in waiting if key not in self._log}
            self._watch.tick()
        return [outcome for job in jobs if (outcome := self._log.get(job.key)) is not None]

    def tokens_asked(self, job: Job) -> int:
        """How many tokens of text a job outside of the search reads at most: the held-out text, unless more is said."""
        return self._facts["heldout_windows"] * self.config.data.window

    def _polled(self) -> None:
        if self._stopping():
            self.progress.phase("stopping: what runs is finished first; a second Ctrl-C stops at once")
        self._watch.tick()

    def before_preparing(self) -> dict[str, Any]:
        """What the worker has to know to refuse, before its long work, what the model cannot do: often nothing."""
        return {}

    def prepare(self, first: First, ask: Ask) -> Summary:
        """Tokens, statistics and teacher, by one worker; nothing of this machine's paths enters the log.

        Args:
            first: for what every session needs on its own workers, whatever was done before.
            ask: for what is done once in a run, such as measurements that nobody can repeat.
        """
        self._watch.phase("collecting statistics and teacher", " (cached for the next run)")
        values = first("prepare", self.before_preparing())
        self._seconds_per_token = values["seconds_per_token"]
        self._compressor_seconds = values.get("compressor_seconds", 0.0)
        return self.identify(Summary.from_json(values))

    def _first(
        self, executor: Executor, stopping: Callable[[], bool], kind: str, payload: dict[str, Any]
    ) -> dict[str, Any]:
        """See `First`."""
        executor.submit([Job(f"{kind}-{self._run.run_id}", kind, payload)])
        arrived: list[Outcome] = []
        while not arrived:
            if stopping():
                raise Interrupted("stopped by the user before the search began")
            try:
                arrived = executor.poll(0.2)
            except WorkersFailed as error:
                message = invalid_input(f"{error}\n{error.__cause__ or ''}")
                if message is None:
                    raise
                raise InvalidInput(message) from error
            self._watch.tick()
        (outcome,) = arrived
        if outcome.status != "ok":
            raise failure(outcome)
        return dict(outcome.values)

    def identify(self, prepared: Summary) -> Summary:
        """Hold the run to what was prepared.

        Raises:
            InvalidInput: the run began with another model, other data or other code.
        """
        self._facts = prepared.facts
        if prepared.facts["images"]:
            self.config = with_window(self.config, prepared.facts["window"])
            self._run.add_identity(window=prepared.facts["window"])
        self._deadline = Deadline(self.config.deadline, self._seconds_per_token, self._compressor_seconds)
        self.identity = content_hash(
            [
                prepared.facts["identity"],
                self.config.objective,
                str(self.context.rule),
                self.context.group,
                self.context.own,
                self.context.compressor,
                prepared.name,
                evaluation_code_hash(),
                self._admission.expected if self.config.numerics == "strict" else None,
            ]
        )
        self._hold(
            prepared=content_hash(prepared.facts["identity"]),
            files=prepared.name,
            seeds=content_hash(self.seeds_identity()),
        )
        self._run.add_identity(
            model_fingerprint=prepared.facts["fingerprint"],
            model_class=prepared.facts["model_class"],
            parameters=prepared.facts["parameters"],
            prunable=prepared.facts["prunable"],
        )
        if self._admission.expected is not None and "numerics" not in self._run.identity:
            self._run.add_identity(numerics=dict(self._admission.expected))
        return prepared

    def _hold(self, **facts: str) -> None:
        """Hold the run to what it began with.

        Raises:
            InvalidInput: a fact is not what it was.
        """
        known = self._run.identity
        for name, value in facts.items():
            if known.get(name, value) != value:
                raise InvalidInput(
                    f"the {_FIXED[name]} changed since this run began, so it cannot go on as before: undo the "
                    f"change, or `evoprune resume {self._run.path} --fork` starts a new run that reuses what holds"
                )
        self._run.add_identity(**facts)


def _gpus(asked: float | None) -> float:
    if asked is not None:
        return asked
    import torch

    return 1.0 if torch.cuda.is_available() else 0.0


def _slots(gpus_per_worker: float | None) -> int:
    import torch

    each = _gpus(gpus_per_worker)
    if each > 0 and torch.cuda.is_available():
        return max(int(torch.cuda.device_count() / each), 1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
