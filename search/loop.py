"""The loop: births in, results applied in the order of their numbers, everything on disk before anyone acts on it.

At most `window` evaluated births wait for their results; applying the oldest frees one more birth. So a birth depends
only on results at least a window older, whatever the number of workers and whoever finishes first: one seed, one
history.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from evoprune.metrics.errors import Interrupted
from evoprune.metrics.files import canonical_json
from evoprune.search.engine.executor import Executor, Job, Outcome
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.rundir import RunDirectory

COMMIT_EVERY = 16
"""Births between commits, at least; a sixteenth of the window if that is more, for a commit writes all that wait."""


@dataclass(frozen=True)
class Birth:
    """A numbered birth.

    Attributes:
        number: from 0, without gaps.
        record: what the search wants to remember of it, as JSON values.
        job: what has to be evaluated; None if it was answered without.
        counted: it is the first evaluation of its candidate; only these are in the budget.
    """

    number: int
    record: dict[str, Any]
    job: Job | None
    counted: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        job = None if self.job is None else self.job.to_json()
        return {"number": self.number, "record": self.record, "job": job, "counted": self.counted}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Birth:
        """The birth that `to_json` wrote."""
        job = values["job"]
        return cls(values["number"], values["record"], None if job is None else Job.from_json(job), values["counted"])

    @property
    def spends(self) -> bool:
        """Whether it takes one evaluation of the budget."""
        return self.job is not None and self.counted


class BirthSearch(Protocol):
    """A search by numbered births."""

    def next_birth(self) -> Birth | None:
        """The next birth, from results applied so far and nothing else.

        None while it depends on births whose results are not applied yet, such as the rest of a generation; if there
        are none, the search is over.
        """

    def apply(self, birth: Birth, outcome: Outcome | None) -> dict[str, Any]:
        """Take in a result, in the order of birth numbers; the line of the history, as JSON values."""

    def conclude(self) -> bool:
        """Be told that the budget is spent; whether there are births still that the result needs."""

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as JSON values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""


@dataclass
class Budget:
    """When to stop.

    Attributes:
        evaluations: births with a forward pass; None for no limit.
        expired: asked before each birth; true once the time is over. Births that were begun are then finished.
        stopping: true once the user wants the search to stop. What runs is finished and kept, but no birth is applied
            any more: applying births without replacing them would make a resumed search differ from one that was
            never stopped.
    """

    evaluations: int | None
    expired: Callable[[], bool] = lambda: False
    stopping: Callable[[], bool] = lambda: False


def evaluated(state: dict[str, Any]) -> int:
    """How many evaluations of a committed state are in its history: those of births that wait are not."""
    return int(state["evaluations"]) - sum(Birth.from_json(values).spends for values in state["pending"])


class BirthLoop:
    """Runs a search by births.

    Args:
        search: decides what is born.
        executor: evaluates jobs.
        log: outcomes by job key, on disk; jobs found there are not run again.
        run: where history and state go.
        window: evaluated births that may wait for results.
        deadline: seconds after which a job is given up, or None. It is asked when the job is submitted, and is no part
            of the birth: it depends on the machine.
        on_applied: told each birth, its history line and its outcome, after they are applied.
        on_poll: called whenever the loop has waited.

    Attributes:
        evaluations: taken from the budget so far, by births that wait for their results too.
        evaluated: those among them whose results are applied.
    """

    def __init__(
        self,
        search: BirthSearch,
        executor: Executor,
        log: EvaluationLog,
        run: RunDirectory,
        *,
        window: int = 16,
        deadline: Callable[[Job], float | None] = lambda job: None,
        on_applied: Callable[[Birth, dict[str, Any], Outcome | None], None] = lambda birth, line, outcome: None,
        on_poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.search = search
        self.evaluations = self.evaluated = 0
        self._executor = executor
        self._log = log
        self._run = run
        self._window = window
        self._commit_every = max(COMMIT_EVERY, window // 16)
        self._deadline = deadline
        self._on_applied = on_applied
        self._on_poll = on_poll
        self._pending: deque[Birth] = deque()
        self._waiting = 0
        self._lines: list[str] = []
        self._applied = 0

    def restore(self) -> bool:
        """Continue from the run's last committed state; whether there was one."""
        state = self._run.restore()
        if state is None:
            return False
        self.search.restore(state["search"])
        self.evaluations, self.evaluated = state["evaluations"], evaluated(state)
        self._applied = state["applied"]
        for values in state["pending"]:
            self._enqueue(Birth.from_json(values))
        return True

    def run(self, budget: Budget) -> None:
        """Births until the budget is spent, all of them applied and committed.

        Raises:
            Interrupted: `budget.stopping` became true; what was applied is committed, what was finished is logged.
            Exception: what the executor raises; the same holds. After any other exception, such as one that a signal
                raises in the middle of a step, the last commit stands, and the log knows the evaluations since.
        """
        while True:
            while self._waiting < self._window and (not self._spent(budget) or self.search.conclude()):
                if (birth := self.search.next_birth()) is None:
                    break
                self.evaluations += birth.spends
                self._enqueue(birth)
            if not self._pending:
                break
            self._apply_oldest(budget)
        self.commit()

    def commit(self) -> None:
        """Put history and state on disk."""
        state = {
            "search": self.search.state(),
            "evaluations": self.evaluations,
            "applied": self._applied,
            "pending": [birth.to_json() for birth in self._pending],
        }
        self._run.commit(self._lines, state)
        self._lines = []

    def _spent(self, budget: Budget) -> bool:
        if budget.evaluations is not None and self.evaluations >= budget.evaluations:
            return True
        return budget.expired()

    def _enqueue(self, birth: Birth) -> None:
        self._pending.append(birth)
        if birth.job is None:
            return
        self._waiting += 1
        if birth.job.key not in self._log:
            self._executor.submit([replace(birth.job, deadline=self._deadline(birth.job))])

    def _apply_oldest(self, budget: Budget) -> None:
        """Apply the oldest birth, after waiting for its result if need be."""
        birth = self._pending[0]
        outcome = None
        if birth.job is not None:
            try:
                outcome = self._wait_for(birth.job.key, budget)
            except BaseException:
                self.commit()  # only here: no birth is half applied while its result is awaited
                raise
            self._waiting -= 1
        self._pending.popleft()
        line = self.search.apply(birth, outcome)
        self._lines.append(canonical_json(line))
        self._applied += 1
        self.evaluated += birth.spends
        self._on_applied(birth, line, outcome)
        if self._applied % self._commit_every == 0:
            self.commit()

    def _wait_for(self, key: str, budget: Budget) -> Outcome:
        """The outcome of a job, and on the way those of others, into the log."""
        while (outcome := self._log.get(key)) is None:
            if budget.stopping():
                self.commit()  # before the wait for what runs, which whoever stops us may cut short
                finish_running(self._executor, self._log, self._on_poll)
                raise Interrupted("stopped by the user; everything finished is saved")
            take_finished(self._executor, self._log)
            self._on_poll()
        return outcome


def take_finished(executor: Executor, log: EvaluationLog) -> None:
    """Wait a moment, and put what has finished on disk."""
    log.extend({outcome.key: outcome for outcome in executor.poll(timeout=0.2)})


def finish_running(executor: Executor, log: EvaluationLog, on_poll: Callable[[], None]) -> None:
    """Let what runs come to its end and put it on disk; what waits stays undone."""
    executor.drain()
    running = True
    while running:
        running = executor.counters()["running"] > 0  # first this: what ends between the two is taken still
        take_finished(executor, log)
        on_poll()
