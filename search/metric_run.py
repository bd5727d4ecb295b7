"""A metric search from configuration to result: prepare, search, measure on held-out text, write everything down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from evoprune.fitness.prepare import Prepared
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import MetricExport, latex
from evoprune.metrics.errors import EvopruneError, Interrupted, InvalidInput, WorkersFailed
from evoprune.metrics.exported import load_metric
from evoprune.metrics.expression import Expression
from evoprune.metrics.files import content_hash
from evoprune.search.archive import Archive
from evoprune.search.candidate import Candidate
from evoprune.search.config import MetricSearchConfig, validated
from evoprune.search.engine.board import Board
from evoprune.search.engine.board_storage import check_storage
from evoprune.search.engine.executor import Executor, Job, Outcome
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.engine.ray import RayExecutor
from evoprune.search.identity import code_hash, git_commit, versions
from evoprune.search.loop import Birth, BirthLoop, Budget
from evoprune.search.metric_search import MetricSearch
from evoprune.search.progress import Progress
from evoprune.search.racing import SuccessiveHalving
from evoprune.search.result import paired_difference, summary
from evoprune.search.rundir import RunDirectory
from evoprune.search.searchers import SEARCHERS
from evoprune.search.signals import stop_on_signals
from evoprune.search.spaces.symbolic import MetricSpace
from evoprune.search.trials import DESCRIPTORS, trial_record

WORKER_FACTORY = "evoprune.fitness.worker:build"

# Named criteria that every result is compared with, as far as their statistics are there.
BASELINES = ("random", "magnitude", "wanda", "ria", "gblm", "gblm-gradient", "pruner-zero")

# Facts of a run that must not change between its sessions.
_FIXED = ("prepared", "code")


@dataclass(frozen=True)
class Resources:
    """Where a search runs. Nothing here changes its history.

    Attributes:
        executor: Ray actors, or this process.
        workers: number of workers; None takes one per processor core, or per GPU.
        gpus_per_worker: GPUs of a worker, a fraction of one, or 0; None is 1 if there is a GPU.
        address: ``local`` for a private Ray instance, else a cluster's address.
        storage: Optuna storage URL; None keeps the board in the run folder.
    """

    executor: Literal["ray", "inline"] = "ray"
    workers: int | None = None
    gpus_per_worker: float | None = None
    address: str = "local"
    storage: str | None = None


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
        self._log = EvaluationLog(run.path / "evaluations.wal")
        self._context = config.context()
        self._identity = ""

    def execute(self, stopping: Callable[[], bool]) -> dict[str, Any]:
        """Search, measure, write ``result.json`` and the exports; the result.

        Raises:
            Interrupted: `stopping` became true; the run can be resumed.
            InvalidInput: the configuration does not fit the model or the data, or the run's identity changed.
        """
        executor = self._executor()
        try:
            self._progress.phase("starting workers")
            executor.start()
            prepared = self._prepare(executor, stopping)
            search = self._search_object(executor, prepared)
            self._announce(prepared, executor)
            loop = self._loop(search, executor)
            began = time.monotonic()
            minutes = self._config.minutes
            budget = Budget(
                self._config.evaluations,
                expired=lambda: minutes is not None and time.monotonic() - began > 60 * minutes,
                stopping=stopping,
            )
            self._progress.phase("searching")
            loop.run(budget)
            self._board.set_counters(dict(search.reasons))
            result = self._measure(executor, prepared, search, loop, stopping)
        finally:
            executor.close()
            if hasattr(self, "_board"):
                self._board.close()
            self._log.close()
        self._run.write_result(result)
        return result

    def _executor(self) -> Executor:
        context = self._context.to_json()
        if self._resources.executor == "inline":
            return InlineExecutor(WORKER_FACTORY, context, threads=self._config.threads)
        return RayExecutor(
            WORKER_FACTORY,
            context,
            workers=self._resources.workers or _slots(self._resources.gpus_per_worker),
            gpus_per_worker=_gpus(self._resources.gpus_per_worker),
            threads=self._config.threads,
            address=self._resources.address,
            notify=self._run.events,
        )

    def _ask(self, executor: Executor, jobs: Sequence[Job], stopping: Callable[[], bool]) -> list[Outcome]:
        """Outcomes of jobs in their order; those in the log are not run again.

        Raises:
            Interrupted: `stopping` became true.
            InvalidInput: a job failed.
        """
        missing = [job for job in jobs if job.key not in self._log]

        def arrived(outcome: Outcome) -> None:
            self._log.append(outcome.key, outcome)

        executor.submit(missing)
        waiting = {job.key for job in missing}
        while waiting:
            if stopping():
                raise Interrupted("stopped by the user; everything finished is saved")
            for outcome in executor.poll(0.2):
                arrived(outcome)
                waiting.discard(outcome.key)
            self._progress.update()
        outcomes = []
        for job in jobs:
            outcome = self._log.get(job.key)
            assert outcome is not None
            outcomes.append(outcome)
        return outcomes

    def _prepare(self, executor: Executor, stopping: Callable[[], bool]) -> Prepared:
        """Tokens, statistics and teacher, by one worker; nothing of this machine's paths enters the log."""
        self._progress.phase("loading the model; collecting statistics and teacher (cached for the next run)")
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
            self._progress.update()
        (outcome,) = arrived
        if outcome.status != "ok":
            raise _failure(outcome)
        prepared = Prepared.open(Path(outcome.values["folder"]))
        self._identity = content_hash(
            [prepared.facts["identity"], self._config.objective, str(self._context.rule), self._context.group]
        )
        facts = {"prepared": content_hash(prepared.facts["identity"]), "code": code_hash()}
        known = self._run.identity
        for name in _FIXED:
            if name in known and known[name] != facts[name]:
                what = "model or data" if name == "prepared" else "code"
                raise InvalidInput(
                    f"the {what} changed since this run began: `evoprune resume {self._run.path} --fork` starts a new "
                    "run with the same configuration"
                )
        self._run.add_identity(
            **facts,
            model_fingerprint=prepared.facts["fingerprint"],
            parameters=prepared.facts["parameters"],
            prunable=prepared.facts["prunable"],
        )
        return prepared

    def _search_object(self, executor: Executor, prepared: Prepared) -> MetricSearch:
        config = self._config
        space = MetricSpace(config.terminals, self._context.group)
        archive = Archive()
        seeds = self._seeds()
        options = config.searcher.model_dump(exclude={"name", "seeds"})
        searcher = SEARCHERS[config.searcher.name](space, archive, seeds, **options)
        racing = SuccessiveHalving(len(config.racing.rungs), config.racing.keep, config.racing.uniform)
        return MetricSearch(
            space,
            searcher,
            archive,
            racing,
            prepared.probe(),
            self._context.rule,
            seed=config.seed,
            prepared=str(prepared.folder),
            identity=self._identity,
            full_ladder=frozenset(BASELINES),
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

    def _loop(self, search: MetricSearch, executor: Executor) -> BirthLoop:
        self._board = Board(
            self._run.path,
            self._run.run_id,
            self._resources.storage,
            descriptors=DESCRIPTORS,
            warn=self._progress.line,
        )
        loop = BirthLoop(
            search,
            executor,
            self._log,
            self._run,
            window=self._config.window,
            on_applied=lambda birth, line, outcome: self._applied(search, loop, birth, line, outcome),
            on_poll=lambda: self._progress.update(),
        )
        if loop.restore():
            self._board.resume(
                record for line in self._run.history() if (record := trial_record(line, len(self._config.racing.rungs)))
            )
        self._board.set_attributes(
            {"model": self._config.model.name, "target": str(self._context.rule), "seed": self._config.seed}
        )
        return loop

    def _applied(
        self, search: MetricSearch, loop: BirthLoop, birth: Birth, line: Mapping[str, Any], outcome: Outcome | None
    ) -> None:
        record = trial_record(line, len(self._config.racing.rungs), outcome)
        if record is not None:
            self._board.add(record)
        best = search.best
        rejected = sum(count for reason, count in search.reasons.items() if not reason.startswith("CUT"))
        self._progress.update(
            loop.evaluations,
            best=None if best is None else best.value,
            expression=None if best is None else str(best.expression),
            counters={"births": search.births, "answered without a forward pass": rejected},
        )

    def _announce(self, prepared: Prepared, executor: Executor) -> None:
        """What the search will cost, before it starts."""
        facts, config = prepared.facts, self._config
        memory = facts["model_bytes"] + facts["teacher_bytes"]
        rungs = [windows * config.data.window for windows in config.racing.rungs]
        per_candidate = sum(
            (after - before) * config.racing.keep**rung
            for rung, (before, after) in enumerate(zip([0, *rungs], rungs, strict=False))
        )
        seconds = config.evaluations * per_candidate * facts["seconds_per_token"] / max(executor.workers, 1)
        limit = "" if config.minutes is None else f" (at most {config.minutes:g} min)"
        self._progress.line(
            f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['prunable'] / 1e6:.1f} M prunable, target {self._context.rule}; "
            f"{executor.workers} workers, {memory / 2**20:.0f} MiB of model and teacher each"
        )
        self._progress.line(
            f"{config.evaluations} candidates, {' / '.join(f'{tokens:,}' for tokens in rungs)} tokens by rung, "
            f"about {per_candidate:,.0f} each: expect {seconds / 60:.1f} min{limit}"
        )
        if executor.workers > config.window / 2:
            self._progress.line(
                f"warning: {executor.workers} workers and a window of {config.window} births: some will wait; "
                f"--window {2 * executor.workers} keeps them busy (it is part of the run's identity)"
            )

    def _measure(
        self,
        executor: Executor,
        prepared: Prepared,
        search: MetricSearch,
        loop: BirthLoop,
        stopping: Callable[[], bool],
    ) -> dict[str, Any]:
        """The result: winner, front and baselines on held-out text."""
        best = search.archive.best or search.best
        if best is None:
            raise InvalidInput("no candidate could be evaluated; `evoprune show` lists the reasons")
        self._progress.phase("measuring on held-out text")
        entrants: dict[str, dict[str, Any] | None] = {"dense": None, "winner": _criterion(best.expression)}
        for name in BASELINES:
            if CRITERIA[name].needs <= self._config.terminals:
                entrants[name] = {"name": name}
        if search.power is not None:
            entrants["power"] = _criterion(search.power.expression)
        folder = str(prepared.folder)
        jobs = [
            Job(
                content_hash([self._identity, "heldout", criterion]),
                "heldout",
                {"folder": folder, "criterion": criterion},
            )
            for criterion in entrants.values()
        ]
        others = {name: {"name": name} for name in ("wanda", "magnitude") if name in entrants}
        jobs.append(
            Job(
                content_hash([self._identity, "agreement", entrants["winner"]]),
                "agreement",
                {"folder": folder, "criterion": entrants["winner"], "others": others},
            )
        )
        *measured, agreement = self._ask(executor, jobs, stopping)
        for outcome in (*measured, agreement):
            if outcome.status != "ok" and outcome is measured[0]:
                raise _failure(outcome)
        losses = {
            name: outcome.values for name, outcome in zip(entrants, measured, strict=True) if outcome.status == "ok"
        }
        fitness = {**search.seed_fitness, **({"power": search.power.value} if search.power else {})}
        winner = losses["winner"]
        baselines = [
            {
                "name": name,
                "fitness": fitness.get(name),
                "expression": str(search.power.expression)
                if name == "power" and search.power
                else str(getattr(CRITERIA[name], "expression", name)),
                "heldout": summary(values),
                "winner_minus_this": paired_difference(winner, values),
            }
            for name, values in losses.items()
            if name not in ("dense", "winner")
        ]
        births = search.births
        result = {
            "run": self._run.run_id,
            "kind": "metric",
            "model": self._config.model.name,
            "target": str(self._context.rule),
            "group": self._context.group,
            "objective": self._config.objective,
            "seed": self._config.seed,
            "evaluations": loop.evaluations,
            "births": births,
            "distinct": search.distinct,
            "evolved_parents": search.evolved_parents,
            "origins": dict(sorted(search.origins.items())),
            "reasons": dict(sorted(search.reasons.items())),
            "rung_tokens": [windows * self._config.data.window for windows in self._config.racing.rungs],
            "rung_correlations": search.racing.correlations(),
            "window": self._config.data.window,
            "data": self._config.data.source,
            "dense": {"heldout": summary(losses["dense"])},
            "baselines": baselines,
            "best": {**_described(best), "heldout": summary(winner)},
            "front": [_described(member) for member in search.archive.front],
            "classes": {
                name: None if member is None else _described(member)
                for name, member in search.archive.by_class().items()
            },
            "agreement": agreement.values.get("agreement", {}),
        }
        self._export(best, result)
        return result

    def _export(self, best: Candidate, result: Mapping[str, Any]) -> None:
        """Write the winner's files and read them back.

        Raises:
            EvopruneError: a file does not give the winner back.
        """
        wanda = next((row for row in result["baselines"] if row["name"] == "wanda"), None)
        heldout = {"winner": result["best"]["heldout"]["perplexity"], "dense": result["dense"]["heldout"]["perplexity"]}
        if wanda is not None:
            heldout["wanda"] = wanda["heldout"]["perplexity"]
        export = MetricExport(
            Metric(best.expression, self._context.group, f"evoprune run {self._run.run_id}"),
            rule=self._context.rule,
            title=f"found by evoprune on {self._config.model.name} at {self._context.rule}",
            canonical=best.expression.text,
            provenance={
                "run": self._run.run_id,
                "model": self._config.model.name,
                "model_fingerprint": self._run.identity["model_fingerprint"],
                "seed": self._config.seed,
                "fitness": f"{self._config.objective} {best.value:.5f} at {result['rung_tokens'][len(best.rungs) - 1]} tokens",
                "evaluations": result["evaluations"],
                "parents": list(best.parents),
                "versions": versions(),
            },
            results={"heldout_perplexity": {name: round(value, 4) for name, value in heldout.items()}},
        )
        folder = self._run.path / "export"
        folder.mkdir(exist_ok=True)
        for suffix in ("json", "py", "tex"):
            export.write(folder / f"metric.{suffix}")
        for suffix in ("json", "py"):
            read = load_metric(str(folder / f"metric.{suffix}"))
            if not isinstance(read, Metric) or read.expression != best.expression:
                raise EvopruneError(f"{folder / f'metric.{suffix}'} does not give the winner back")


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
        Interrupted: SIGINT or SIGTERM; `error.run` is the folder to resume.
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
        Progress(config.evaluations, config.minutes, stream, title=title, done=done) as progress,
    ):
        try:
            MetricRun(run, config, resources, progress).execute(stopping)
        except Interrupted:
            run.events("info", "interrupted")
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


def _criterion(expression: Expression) -> dict[str, Any]:
    return {"expression": expression.to_json()}


def _described(candidate: Candidate) -> dict[str, Any]:
    return {
        "birth": candidate.birth,
        "expression": candidate.expression.text,
        "latex": latex(candidate.expression),
        "fitness": candidate.value,
        "stderr": candidate.stderr,
        "rungs": list(candidate.rungs),
        "complexity": candidate.complexity,
        "origin": candidate.origin,
        "parents": list(candidate.parents),
        "statistics": sorted(candidate.expression.statistics),
    }


def _failure(outcome: Outcome) -> EvopruneError:
    """What a failed job of the set-up says: one line if the input is at fault."""
    message = _invalid_input(outcome.error)
    return InvalidInput(message) if message else EvopruneError(f"the worker failed: {outcome.error or outcome.status}")


def _input_at_fault(error: WorkersFailed) -> EvopruneError:
    """`error`, or the wrong input that kept the workers from starting."""
    message = _invalid_input(f"{error}\n{error.__cause__ or ''}")
    return InvalidInput(message) if message else error


def _invalid_input(traceback: str) -> str | None:
    """The message of the `InvalidInput` that ended a worker's work, from its traceback."""
    for line in reversed(traceback.strip().splitlines()):
        kind, colon, message = line.strip().partition(": ")
        if colon and kind.rpartition(".")[2] in ("InvalidInput", "UnknownName", "InvalidExpression"):
            return message
    return None


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
