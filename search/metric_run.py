"""A metric search from configuration to result: prepare, search, measure on held-out text, write everything down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from evoprune.fitness.prepare import Summary
from evoprune.fitness.travel import pack_inputs
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import EvopruneError, Interrupted, InvalidInput, NoCapacity, WorkersFailed
from evoprune.metrics.exported import load_metric
from evoprune.metrics.expression import Expression
from evoprune.metrics.files import content_hash
from evoprune.search.archive import Archive
from evoprune.search.config import MetricSearchConfig, validated
from evoprune.search.engine.address import EXPOSURE, LOCAL
from evoprune.search.engine.admission import Admission
from evoprune.search.engine.board_storage import check_storage
from evoprune.search.engine.deadline import Deadline
from evoprune.search.engine.events import SEARCHING
from evoprune.search.engine.executor import Executor, Job, Outcome
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.engine.ray import RayExecutor
from evoprune.search.identity import code_hash, evaluation_code_hash, git_commit, versions
from evoprune.search.loop import BirthLoop, Budget, finish_running, take_finished
from evoprune.search.metric_result import BASELINES, Comparison, failure, invalid_input
from evoprune.search.metric_search import MetricSearch
from evoprune.search.progress import Progress
from evoprune.search.racing import SuccessiveHalving
from evoprune.search.rundir import RunDirectory
from evoprune.search.searchers import SEARCHERS
from evoprune.search.signals import stop_on_signals
from evoprune.search.spaces.symbolic import MetricSpace
from evoprune.search.watch import Watch

WORKER_FACTORY = "evoprune.fitness.worker:build"
PURE_JOBS = ("evaluate", "heldout", "agreement")
"""Kinds of jobs that give the same values on every admitted worker; `prepare` also times itself."""

# Facts of a run that must not change between its sessions, and what they are called.
_FIXED = {
    "config": "configuration",
    "code": "code of evoprune",
    "prepared": "model or data",
    "files": "bits of the statistics or of the teacher (another processor, or another library)",
    "seeds": "metrics to start from",
}


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
    """

    executor: Literal["ray", "inline"] = "ray"
    workers: int | None = None
    gpus_per_worker: float | None = None
    address: str = LOCAL
    storage: str | None = None
    insecure_cluster: bool = False

    @property
    def on_cluster(self) -> bool:
        """Whether workers run on nodes that may share nothing with this machine."""
        return self.executor == "ray" and self.address != LOCAL


class MetricRun:
    """One session of a run.

    Args:
        run: locked by this process.
        config: as stored in the run.
        resources: of this session.
        progress: shows what happens.
    """

    def __init__(self, run: RunDirectory, config: MetricSearchConfig, resources: Resources, progress: Progress) -> None:
        self._run = run
        self._config = config
        self._resources = resources
        self._progress = progress
        self._watch = Watch(run, config, progress, resources.storage)
        self._log = EvaluationLog(run.path / "evaluations.wal")
        self._context = config.context()
        self._identity = ""
        self._stopping: Callable[[], bool] = lambda: False
        self._seconds_per_token = 0.0
        self._deadline = Deadline(None, 0.0)
        self._prepared_facts: dict[str, Any] = {}
        known = run.identity
        self._admission = Admission(config.numerics, known.get("numerics"), known.get("bit_reproducible") is False)

    def execute(self, stopping: Callable[[], bool]) -> dict[str, Any]:
        """Search, measure, write ``result.json`` and the exports; the result.

        Raises:
            Interrupted: `stopping` became true; the run can be resumed.
            InvalidInput: the configuration does not fit the model or the data, or the run's identity changed.
        """
        self._stopping = stopping
        self._hold(config=self._config.identity, code=code_hash())
        executor = self._executor()
        try:
            self._watch.starting(executor)
            executor.start()
            prepared = self._prepare(executor, stopping)
            search = self.build_search(prepared)
            self._announce(prepared, executor)
            loop = self.build_loop(search, executor)
            spent = self._run.phase_seconds(SEARCHING)  # by earlier sessions
            began = time.monotonic() - spent
            minutes = self._config.minutes
            budget = Budget(
                self._config.evaluations,
                expired=lambda: minutes is not None and time.monotonic() - began > 60 * minutes,
                stopping=stopping,
            )
            self._progress.clock_starts(spent)
            self._watch.phase(SEARCHING)
            loop.run(budget)
            self._watch.phase("measuring on held-out text")
            comparison = Comparison(self._config, self._identity, prepared.name, search)
            outcomes = self._ask(executor, comparison.jobs(), stopping)
            result = comparison.result(self._run.run_id, loop.evaluations, outcomes)
            result["bit_reproducible"] = not self._admission.mixed
            comparison.export(self._run, result)
        finally:
            executor.close()
            if self._admission.mixed:
                self._run.add_identity(bit_reproducible=False)
            self._watch.close(stopping)
            self._log.close()
        self._run.write_result(result)
        return result

    def _executor(self) -> Executor:
        resources = self._resources
        if resources.executor == "inline":
            return InlineExecutor(
                WORKER_FACTORY,
                self._context.to_json(),
                threads=self._config.threads,
                admission=self._admission,
            )
        workers, gpus, places = resources.workers, resources.gpus_per_worker, {}
        if resources.on_cluster:
            self._progress.phase("packing the model and the texts for the cluster")
            places = pack_inputs(self._context)
            if resources.insecure_cluster:
                self._progress.line(f"warning: --insecure-cluster: {resources.address} may be open, and {EXPOSURE}")
        else:
            workers, gpus = workers or _slots(gpus), _gpus(gpus)
        return RayExecutor(
            WORKER_FACTORY,
            replace(self._context, places=places).to_json(),
            workers=workers,
            gpus_per_worker=gpus,
            threads=self._config.threads,
            address=resources.address,
            parcels=sorted({place.partition("/")[0] for place in places.values()}),
            admission=self._admission,
            notify=self._notify,
            audited=PURE_JOBS if self._config.numerics == "strict" else (),
        )

    def _notify(self, level: str, event: str, **fields: Any) -> None:
        """To the run's log; a refused worker is told on the display too, for the search goes on without it."""
        self._run.events(level, event, **fields)
        if event == "worker_refused" and level == "warning":
            self._progress.line(f"a worker was refused: {fields['error']}")

    def _ask(self, executor: Executor, jobs: Sequence[Job], stopping: Callable[[], bool]) -> list[Outcome]:
        """Outcomes of jobs in their order; those in the log are not run again.

        Raises:
            Interrupted: `stopping` became true.
            InvalidInput: a job failed.
        """
        tokens = self._prepared_facts["heldout_windows"] * self._config.data.window
        missing = {job.key: job for job in jobs if job.key not in self._log}
        executor.submit(replace(job, deadline=self._deadline.seconds(tokens)) for job in missing.values())
        waiting = set(missing)
        while waiting:
            if stopping():
                finish_running(executor, self._log, self._polled)
                raise Interrupted("stopped by the user; everything finished is saved")
            take_finished(executor, self._log)
            waiting = {key for key in waiting if key not in self._log}
            self._watch.tick()
        return [outcome for job in jobs if (outcome := self._log.get(job.key)) is not None]

    def _prepare(self, executor: Executor, stopping: Callable[[], bool]) -> Summary:
        """Tokens, statistics and teacher, by one worker; nothing of this machine's paths enters the log."""
        self._watch.phase("collecting statistics and teacher", " (cached for the next run)")
        job = Job(f"prepare-{self._run.run_id}", "prepare", {})
        executor.submit([job])
        arrived: list[Outcome] = []
        while not arrived:
            if stopping():
                raise Interrupted("stopped by the user before the search began")
            try:
                arrived = executor.poll(0.2)
            except WorkersFailed as error:
                raise _input_at_fault(error) from error
            self._watch.tick()
        (outcome,) = arrived
        if outcome.status != "ok":
            raise failure(outcome)
        self._seconds_per_token = outcome.values["seconds_per_token"]
        return self.identify(Summary.from_json(outcome.values))

    def identify(self, prepared: Summary) -> Summary:
        """Hold the run to what was prepared.

        Raises:
            InvalidInput: the run began with another model, other data or other code.
        """
        self._prepared_facts = prepared.facts
        self._deadline = Deadline(self._config.deadline, self._seconds_per_token)
        self._identity = content_hash(
            [
                prepared.facts["identity"],
                self._config.objective,
                str(self._context.rule),
                self._context.group,
                prepared.name,
                evaluation_code_hash(),
                self._admission.expected if self._config.numerics == "strict" else None,
            ]
        )
        self._hold(
            prepared=content_hash(prepared.facts["identity"]),
            files=prepared.name,
            seeds=content_hash({name: seed.to_json() for name, seed in self._seeds().items()}),
        )
        self._run.add_identity(
            model_fingerprint=prepared.facts["fingerprint"],
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

    def build_search(self, prepared: Summary) -> MetricSearch:
        """The search as the configuration asks for it, at its beginning."""
        config = self._config
        dead = frozenset(prepared.facts["dead"])
        if dead:
            self._progress.line(
                f"warning: {', '.join(sorted(dead))}: zero along 1 % or more of all rows, so no candidate may read it"
            )
        space = MetricSpace(
            config.terminals - dead,
            self._context.group,
            simplify=config.searcher.simplify,
            typical=prepared.probe.typical,
        )
        archive = Archive()
        seeds = self._seeds()
        options = config.searcher.model_dump(exclude={"name", "seeds", "simplify"})
        searcher = SEARCHERS[config.searcher.name](space, archive, seeds, **options)
        racing = SuccessiveHalving(len(config.racing.rungs), config.racing.keep, config.racing.uniform)
        return MetricSearch(
            space,
            searcher,
            archive,
            racing,
            prepared.probe,
            self._context.rule,
            seed=config.seed,
            prepared=prepared.name,
            identity=self._identity,
            full_ladder=frozenset(BASELINES),
            dead=dead,
        )

    def _seeds(self) -> dict[str, Expression]:
        """Metrics to start from, by name; Wanda, or what comes closest to it, first."""
        config = self._config
        names = config.searcher.seeds if config.searcher.seeds is not None else tuple(CRITERIA)
        order = ("wanda", "magnitude", *BASELINES)
        seeds = {}
        for name in sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name)):
            criterion = CRITERIA[name]
            if isinstance(criterion, Metric) and criterion.needs <= config.terminals:
                seeds[name] = criterion.expression
        for name, expression in seeds_from(config.seed_from).items():
            seeds[name] = expression
        return seeds

    def build_loop(self, search: MetricSearch, executor: Executor) -> BirthLoop:
        """The loop around `search`, watched; continued from the run's last commit if there is one."""
        loop = BirthLoop(
            search,
            executor,
            self._log,
            self._run,
            window=self._config.window,
            deadline=lambda job: self._deadline.seconds(self._config.racing.rungs[-1] * self._config.data.window),
            on_applied=lambda birth, line, outcome: self._applied(line, outcome),
            on_poll=self._polled,
        )
        loop.restore()
        self._watch.searching(search, loop, self._run.history(), self._log.outcomes())
        return loop

    def _polled(self) -> None:
        if self._stopping():
            self._progress.phase("stopping: what runs is finished first; a second Ctrl-C stops at once")
        self._watch.tick()

    def _applied(self, line: Mapping[str, Any], outcome: Outcome | None) -> None:
        if outcome is not None:
            self._deadline.observe(outcome)
        self._watch.applied(line, outcome)

    def _announce(self, prepared: Summary, executor: Executor) -> None:
        """What the search will cost, before it starts."""
        facts, config = prepared.facts, self._config
        memory = facts["model_bytes"] + facts["teacher_bytes"]
        rungs = [windows * config.data.window for windows in config.racing.rungs]
        per_candidate = sum(
            (after - before) * config.racing.keep**rung
            for rung, (before, after) in enumerate(zip([0, *rungs], rungs, strict=False))
        )
        pace = per_candidate * self._seconds_per_token / max(executor.workers, 1)
        if config.evaluations is None:
            cost = f"{config.minutes:g} min: expect {60 * (config.minutes or 0) / pace:,.0f} candidates"
        else:
            limit = "" if config.minutes is None else f" (at most {config.minutes:g} min)"
            cost = f"{config.evaluations} candidates: expect {config.evaluations * pace / 60:.1f} min{limit}"
        self._progress.line(
            f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['prunable'] / 1e6:.1f} M prunable, "
            f"target {self._context.rule}; {executor.workers} workers, "
            f"{memory / 2**20:.0f} MiB of model and teacher each"
        )
        self._progress.line(
            f"{' / '.join(f'{tokens:,}' for tokens in rungs)} tokens by rung, about {per_candidate:,.0f} a candidate; "
            f"{cost}"
        )
        if executor.workers > config.window / 2:
            self._progress.line(
                f"warning: {executor.workers} workers and a window of {config.window} births: some will wait; "
                f"--window {2 * executor.workers} keeps them busy (it is part of the run's identity)"
            )


def start_metric_search(
    config: MetricSearchConfig,
    resources: Resources | None = None,
    *,
    run_dir: Path | str | None = None,
    argv: Sequence[str] = (),
    stream: TextIO | None = None,
) -> RunDirectory:
    """Run a metric search in a new folder and return it, finished.

    Raises:
        Interrupted: SIGINT or SIGTERM; the run's folder holds what `resume_metric_search` needs.
        InvalidInput: the configuration, the model or the data is not usable.
    """
    resources = resources or Resources()
    SEARCHERS[config.searcher.name]
    if resources.storage is not None:
        check_storage(resources.storage)
    identity = {"versions": versions(), "git": git_commit(), "argv": list(argv)}
    run = RunDirectory.create("metric", config.model_dump(mode="json"), identity, run_dir=run_dir)
    with closing(run):
        _session(run, config, resources, stream)
    return run


def resume_metric_search(
    run: RunDirectory, resources: Resources | None = None, *, stream: TextIO | None = None
) -> RunDirectory:
    """Continue an interrupted run to its end; a finished one is returned as it is.

    Raises:
        InvalidInput: model, data or code changed, or another process drives the run.
    """
    if run.result is not None:
        return run
    config = validated(run.config)
    run.lock()
    if (run.path / "evaluations.wal").exists():
        run.events("info", "resumed")
    with closing(run):
        _session(run, config, resources or Resources(), stream)
    return run


def _session(run: RunDirectory, config: MetricSearchConfig, resources: Resources, stream: TextIO | None) -> None:
    state = run.peek()
    done = 0 if state is None else state["evaluations"]
    title = f"evoprune {run.run_id}: {config.model.name} at {config.target.rule}, seed {config.seed}"
    with (
        stop_on_signals() as stopping,
        Progress(config.evaluations, config.minutes, stream, title=title, done=done, elapsed=run.seconds) as progress,
    ):
        try:
            MetricRun(run, config, resources, progress).execute(stopping)
        except (Interrupted, NoCapacity, KeyboardInterrupt) as reason:
            run.events("info", "interrupted", reason=str(reason) or "stopped at once")
            raise
        except BaseException as error:
            run.events("error", "failed", error=f"{type(error).__name__}: {error}")
            raise


def seeds_from(source: str | None) -> dict[str, Expression]:
    """Expressions to start from: an exported metric, or the front of another run.

    Raises:
        InvalidInput: neither.
    """
    if source is None:
        return {}
    path = Path(source)
    if path.suffix in (".json", ".py") or not (path.is_dir() or source == "latest"):
        metric = load_metric(source)
        if not isinstance(metric, Metric):
            raise InvalidInput(f"{source} is no expression of this language, so it cannot be bred")
        return {"given": metric.expression}
    result = RunDirectory.open(source).result
    if result is None:
        raise InvalidInput(f"run {source} is not finished: resume it first")
    from evoprune.metrics.expression import parse

    members = sorted(result["front"], key=lambda member: member["fitness"])
    return {f"given-{index}": parse(member["expression"]) for index, member in enumerate(members)}


def _input_at_fault(error: WorkersFailed) -> EvopruneError:
    """`error`, or the wrong input that kept the workers from starting."""
    message = invalid_input(f"{error}\n{error.__cause__ or ''}")
    return InvalidInput(message) if message else error


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
