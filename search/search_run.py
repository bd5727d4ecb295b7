"""One session of a run, whatever is searched: prepare, search, measure on held-out text, write everything down."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from evoprune.fitness.compressing import kept_bytes
from evoprune.fitness.prepare import Summary
from evoprune.fitness.statistics_passes import gradient_sum_bytes
from evoprune.metrics.records import Site
from evoprune.search.config_allocation import AllocationSearchConfig, GenerationsConfig
from evoprune.search.config_sections import Range
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.engine.events import SEARCHING
from evoprune.search.engine.executor import Executor, Job, Outcome
from evoprune.search.kinds import BoardKind, WatchedSearch
from evoprune.search.loop import Birth, BirthLoop, Budget
from evoprune.search.replaying import PHASE, Replayable
from evoprune.search.result import measured_facts
from evoprune.search.rundir import RunDirectory
from evoprune.search.worker_session import Ask, Config, WorkerSession

Search = TypeVar("Search", bound=WatchedSearch)


@dataclass(frozen=True)
class Plan:
    """What a search asks of its workers.

    Attributes:
        tokens: that a candidate reads, step by step.
        step: what such a step is called: rung or stage.
        per_candidate: tokens of a candidate on average, as few get to the last step.
        busy_workers: how many workers always have something to do.
        crowded: what to tell of more workers than that, given their number.
    """

    tokens: Sequence[int]
    step: str
    per_candidate: float
    busy_workers: float
    crowded: Callable[[int], str]


def generation_plan(searcher: GenerationsConfig, window: int) -> Plan:
    """What a search by generations asks of its workers.

    Args:
        window: tokens of a window.
    """
    per_generation, entrants, seen = 0, searcher.offspring, 0
    for stage in searcher.stages:
        per_generation += (entrants + 1) * (stage.windows - seen) * window
        entrants, seen = stage.survivors, stage.windows
    return Plan(
        [stage.windows * window for stage in searcher.stages],
        "stage",
        per_generation / searcher.offspring,
        searcher.offspring,
        lambda workers: (
            f"{searcher.offspring} offspring: some will wait; --population {2 * workers} keeps them busy (it is part "
            "of the run's identity)"
        ),
    )


def front_plan(config: AllocationSearchConfig | StructureSearchConfig, ends: Range) -> Plan:
    """What a search for a front over a range of sparsities asks of its workers."""
    window, offspring = config.data.window, config.searcher.offspring
    tokens, (low, high) = config.front.windows * window, ends
    # The archive at the end, one for each hundredth, is a good part of the work.
    finals = 100 * (high - low) * config.searcher.windows * window / (config.evaluations or math.inf)
    return Plan(
        [tokens],
        "stage",
        tokens + finals,
        offspring,
        lambda workers: (
            f"{offspring} offspring: some will wait; --population {-(-workers // 2) * 4} keeps them busy (it is part "
            "of the run's identity)"
        ),
    )


class Comparison(Protocol):
    """What a search found, beside the baselines."""

    def jobs(self) -> list[Job]:
        """What has to be measured on held-out text."""

    def result(self, run_id: str, evaluations: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The content of ``result.json``, from the outcomes of `jobs`.

        Raises:
            EvopruneError: the dense model or the winner could not be measured.
        """

    def export(self, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Write the winner's files into the run and read them back.

        Raises:
            EvopruneError: a file does not give the winner back.
        """


class SearchRun(WorkerSession[Config], Generic[Config, Search]):
    """A session that searches; each kind of search says what is prepared, searched and compared.

    Attributes:
        kind: how others speak of this search.
    """

    kind: ClassVar[BoardKind]

    @abstractmethod
    def build_search(self, prepared: Summary, ask: Ask) -> Search:
        """The search as the configuration asks for it, at its beginning."""

    @abstractmethod
    def plan(self) -> Plan:
        """What the search will ask of its workers."""

    @abstractmethod
    def comparison(self, prepared: Summary, search: Search, ask: Ask) -> Comparison:
        """The winner beside the baselines.

        Raises:
            InvalidInput: no candidate has a fitness.
        """

    @property
    def counted_by_loop(self) -> bool:
        """Whether the loop ends the search at its evaluations; else the search does so itself."""
        return True

    def execute(self, stopping: Callable[[], bool]) -> dict[str, Any]:
        """Search, measure, write ``result.json`` and the exports; the result.

        Raises:
            Interrupted: `stopping` became true; the run can be resumed.
            InvalidInput: the configuration does not fit the model or the data, or the run's identity changed.
        """
        self._begin(stopping)
        try:
            with self._workers() as executor:
                result = self._search(executor, stopping)
        finally:
            self._end(stopping)
        self._run.write_result(result)
        return result

    def _search(self, executor: Executor, stopping: Callable[[], bool]) -> dict[str, Any]:
        """The result, and the winner's files in the run's folder."""
        ask = partial(self._ask, executor, stopping)
        prepared = self.prepare(partial(self._first, executor, stopping), ask)
        search = self.build_search(prepared, ask)
        self._announce(prepared, executor)
        loop = self.build_loop(search, executor)
        spent = self._run.phase_seconds(SEARCHING)  # by earlier sessions
        began = time.monotonic() - spent
        minutes = self.config.minutes
        budget = Budget(
            self.config.evaluations if self.counted_by_loop else None,
            expired=lambda: minutes is not None and time.monotonic() - began > 60 * minutes,
            stopping=stopping,
        )
        self.progress.clock_starts(spent)
        self._watch.phase(SEARCHING)
        loop.run(budget)
        comparison = self.comparison(prepared, search, ask)
        self._watch.phase("measuring on held-out text")
        outcomes = ask(comparison.jobs())
        result = comparison.result(self._run.run_id, loop.evaluations, outcomes)
        if isinstance(comparison, Replayable) and (job := comparison.replay()) is not None:
            self._watch.phase(PHASE)
            result["best"] |= comparison.replayed(ask([job], limited=False)[0])
        result["bit_reproducible"] = not self._admission.mixed
        result |= measured_facts(self._facts)
        comparison.export(self._run, result)
        return result

    def build_loop(self, search: Search, executor: Executor) -> BirthLoop:
        """The loop around `search`, watched; continued from the run's last commit if there is one."""
        loop = BirthLoop(
            search,
            executor,
            self._log,
            self._run,
            window=self.config.window,
            deadline=self.deadline_of,
            on_applied=self._applied,
            on_poll=self._polled,
        )
        loop.restore()
        self._watch.searching(self.kind, search, loop, self._run.history(), self._log.outcomes())
        return loop

    def tokens_of(self, job: Job) -> int:
        """How many tokens of text B a job of the search reads at most; all steps, unless each is a job of its own."""
        return self.context.rungs[-1] * self.context.window

    def deadline_of(self, job: Job) -> float | None:
        """Seconds after which a job of the search is given up, or None."""
        return self._deadline.seconds(self.tokens_of(job))

    def _applied(self, birth: Birth, line: Mapping[str, Any], outcome: Outcome | None) -> None:
        if outcome is not None and birth.job is not None and birth.job.kind != "rebuilt":
            self._deadline.observe(outcome, self.tokens_of(birth.job))
        self._watch.applied(line, outcome)

    def _announce(self, prepared: Summary, executor: Executor) -> None:
        """What the search will cost, before it starts."""
        facts, config, plan = prepared.facts, self.config, self.plan()
        seconds = plan.per_candidate * self._seconds_per_token + self._compressor_seconds
        pace = seconds / max(executor.workers, 1)
        if config.evaluations is None:
            cost = f"{config.minutes:g} min: expect {60 * (config.minutes or 0) / pace:,.0f} candidates"
        else:
            limit = "" if config.minutes is None else f" (at most {config.minutes:g} min)"
            cost = f"{config.evaluations} candidates: expect {config.evaluations * pace / 60:.1f} min{limit}"
        self.progress.line(
            f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['prunable'] / 1e6:.1f} M prunable, "
            f"target {config.aim}; {executor.workers} workers"
        )
        self.progress.line(
            f"{' / '.join(f'{tokens:,}' for tokens in plan.tokens)} tokens by {plan.step}, about "
            f"{plan.per_candidate:,.0f} a candidate; {cost}"
        )
        if self._compressor_seconds:
            kept = kept_bytes(Site(**site) for site in facts["sites"])
            self.progress.line(
                f"{self.context.compressor} takes {self._compressor_seconds:.2g} s of a candidate, the forward passes "
                f"{seconds - self._compressor_seconds:.2g} s; it keeps {_mib(kept)} in each worker"
            )
        self.progress.line(memory_line(facts, self.context.statistics))
        if executor.workers > plan.busy_workers:
            self.progress.line(f"warning: {executor.workers} workers and {plan.crowded(executor.workers)}")


def memory_line(facts: Mapping[str, Any], statistics: Iterable[str]) -> str:
    """What workers hold: each its own, all of a machine together, and one of them while it collects gradients.

    Args:
        facts: of the prepared set.
        statistics: that candidates read.
    """
    own = facts["model_bytes"] + facts["teacher_bytes"]
    gradients = gradient_sum_bytes(statistics, facts["prunable"], facts["model_bytes"])
    once = f"; collecting gradients takes one of them {_mib(gradients)} more" if gradients else ""
    shared = _mib(facts["statistics_bytes"])
    return f"memory: {_mib(own)} of model and teacher in each worker, {shared} of statistics shared on a machine{once}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
