"""Which worker does which job next, and what becomes of jobs whose worker is lost. Knows no Ray and no clock."""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from evoprune.metrics.errors import AuditFailed
from evoprune.metrics.files import canonical_json
from evoprune.search.engine.executor import Job, Outcome, Status

Loss = Literal["died", "oom", "deadline", "node"]
"""Why a job came to nothing: its worker died or broke, memory ran out, it overran its deadline, or its node left."""

IN_FLIGHT = 2
"""Jobs given to each slot of a worker: while one runs, the next waits beside it, so that the worker never does."""
PROBATION_PATIENCE = 4.0
"""By how much a deadline is stretched in probation, where only a job that really hangs should fail."""
LIMITS: Mapping[Loss, tuple[int, Status]] = {
    "died": (3, "crash"),
    "oom": (2, "oom"),
    "deadline": (1, "timeout"),
    "node": (10, "crash"),
}
"""How many losses in probation settle a job, and the status it gets. Nodes leave by themselves, and so often only from
under a job that takes them down."""

AUDIT_EVERY = 100
"""One job in so many, chosen by its key, is done again by another worker."""
_MOST_AUDITS = 64


def is_audited(job: Job) -> bool:
    """Whether the job is one of the hundredth that is done twice."""
    return zlib.crc32(job.key.encode()) % AUDIT_EVERY == 0


@dataclass(frozen=True, slots=True)
class _Audit:
    """A job to be done again, and what `worker` made of it."""

    job: Job
    worker: int
    values: dict[str, Any]


@dataclass(slots=True)
class _Lane:
    """What one worker has been given, oldest first; the first `slots` of them are what it runs."""

    slots: int
    jobs: deque[Job] = field(default_factory=deque)
    on_probation: bool = False
    since: dict[str, float] = field(default_factory=dict)  # when each of those that run began

    def running(self) -> list[Job]:
        return list(islice(self.jobs, self.slots))

    def note_begun(self, now: float) -> None:
        for job in islice(self.jobs, self.slots):
            self.since.setdefault(job.key, now)


class Dispatcher:
    """Open jobs and the workers they are on. Every key leaves exactly once, as an outcome.

    When a worker is lost, only a job that it ran can be guilty: such a one goes into probation, where it gets a
    worker to itself; the others are given out again untouched. Only losses in probation count against a job, since
    any job may be hit by a worker's death that it did not cause. A job that reports a lack of memory is treated alike.

    Some jobs that are done are given to a second worker, as soon as one is free, and its answer is compared: silent
    damage to a worker's memory is found that way. Nothing waits for these audits, and they leave no outcome.

    Args:
        slots: how many jobs a worker runs at the same time. It begins them in the order in which it got them.
        audited: which jobs are done twice, such as `is_audited`.
    """

    def __init__(self, slots: int = 1, audited: Callable[[Job], bool] = lambda job: False) -> None:
        self._slots = slots
        self._audited = audited
        self._audits: deque[_Audit] = deque(maxlen=_MOST_AUDITS)  # wait for a worker
        self._second: dict[str, _Audit] = {}  # with a worker, by the key that they have there
        self._open: set[str] = set()
        self._pending: deque[Job] = deque()
        self._suspects: deque[Job] = deque()
        self._lanes: dict[int, _Lane] = {}
        self._counted: Counter[tuple[str, Loss]] = Counter()
        self._attempts: Counter[str] = Counter()
        self._draining = False

    def submit(self, jobs: Iterable[Job]) -> None:
        """Add jobs behind those that wait; one whose key is open is left out."""
        for job in jobs:
            if job.key not in self._open and not self._draining:
                self._open.add(job.key)
                self._pending.append(job)

    def add_worker(self, worker: int) -> None:
        """A worker is ready for jobs."""
        self._lanes[worker] = _Lane(self._slots)

    def drain(self) -> None:
        """Forget every job that no worker runs yet."""
        self._draining = True
        self._pending.clear()
        self._suspects.clear()
        self._audits.clear()
        for lane in self._lanes.values():
            lane.jobs = deque(lane.running())
        self._open = {job.key for lane in self._lanes.values() for job in lane.jobs} - self._second.keys()

    def next_job(self, worker: int, now: float, *, ahead: bool = True) -> Job | None:
        """The job that `worker` should get now, or None; to be asked again until it is None.

        Args:
            worker: a ready one.
            now: the time.
            ahead: whether it may be one that waits beside a running job. Ask every worker without that first: no job
                should wait at one worker while another has nothing to do.
        """
        lane = self._lanes[worker]
        if lane.on_probation:
            return None
        if self._suspects:
            if lane.jobs:
                return None  # let it run dry: a suspect shares its worker with nobody
            lane.on_probation = True
            return self._give(lane, self._suspects.popleft(), now)
        if len(lane.jobs) >= lane.slots * (IN_FLIGHT if ahead else 1):
            return None
        for audit in self._audits:
            if audit.worker != worker:
                self._audits.remove(audit)
                again = replace(audit.job, key=f"audit:{audit.job.key}")
                self._second[again.key] = audit
                return self._give(lane, again, now)
        return self._give(lane, self._pending.popleft(), now) if self._pending else None

    def finish(self, worker: int, outcome: Outcome, now: float) -> Outcome | None:
        """`worker` answered a job: the outcome to hand on, or None if the key is answered already.

        Raises:
            AuditFailed: it was an audit, and the answer is not that of the first worker.
        """
        lane = self._lanes[worker]
        answered = [job for job in lane.jobs if job.key == outcome.key]
        lane.jobs = deque(job for job in lane.jobs if job.key != outcome.key)
        lane.since.pop(outcome.key, None)
        lane.note_begun(now)
        on_probation, lane.on_probation = lane.on_probation, False
        if answered and outcome.status == "oom":  # it may be a neighbour on the device who took the memory
            return self._blame(answered[0], "oom", on_probation, outcome.error)
        if (audit := self._second.pop(outcome.key, None)) is not None:
            self._attempts.pop(outcome.key, None)
            _compare(audit, worker, outcome)
            return None
        settled = self._settle(outcome)
        if settled is not None and answered and settled.status == "ok" and self._audited(answered[0]):
            self._audits.append(_Audit(answered[0], worker, settled.values))
        return settled

    def lose(self, worker: int, loss: Loss, cause: str = "") -> list[Outcome]:
        """`worker` is gone: requeue what it had, and return the outcomes of jobs that are thereby settled.

        Args:
            cause: what is known of it, for people.
        """
        lane = self._lanes.pop(worker, None)
        if lane is None or not lane.jobs:
            return []
        suspects = lane.running()
        for job in reversed(list(lane.jobs)[len(suspects) :]):
            if (audit := self._second.pop(job.key, None)) is not None:
                self._audits.append(audit)
            else:
                self._pending.appendleft(job)
        settled = [self._blame(job, loss, lane.on_probation, cause) for job in suspects]
        return [outcome for outcome in settled if outcome is not None]

    def overdue(self, now: float) -> list[int]:
        """Workers with a running job that has passed its deadline."""
        return [worker for worker, lane in self._lanes.items() if now > _due(lane)]

    def is_idle(self) -> bool:
        """Whether some slot of some worker has nothing to do at all."""
        return any(len(lane.jobs) < lane.slots for lane in self._lanes.values())

    @property
    def running(self) -> int:
        """How many jobs are running."""
        return sum(min(len(lane.jobs), lane.slots) for lane in self._lanes.values())

    def _give(self, lane: _Lane, job: Job, now: float) -> Job:
        lane.jobs.append(job)
        lane.note_begun(now)
        self._attempts[job.key] += 1
        return job

    def _blame(self, job: Job, loss: Loss, on_probation: bool, cause: str) -> Outcome | None:
        """Put a job into probation, or, if it is there and has failed too often, settle it; an audit is given up."""
        if self._second.pop(job.key, None) is not None:
            self._attempts.pop(job.key, None)
            return None
        if on_probation:
            self._counted[job.key, loss] += 1
            limit, status = LIMITS[loss]
            if self._counted[job.key, loss] >= limit:
                return self._settle(Outcome(job.key, status, error=_explain(job, loss, cause)))
        if not self._draining:
            self._suspects.append(job)
        return None

    def _settle(self, outcome: Outcome) -> Outcome | None:
        attempts = self._attempts.pop(outcome.key, 0)
        for loss in LIMITS:
            self._counted.pop((outcome.key, loss), None)
        if outcome.key not in self._open:
            return None
        self._open.discard(outcome.key)
        telemetry = {**outcome.telemetry, "attempts": attempts}
        return Outcome(outcome.key, outcome.status, outcome.values, outcome.error, telemetry)


def _compare(audit: _Audit, worker: int, outcome: Outcome) -> None:
    """Refuse an answer that differs from the first one in any bit. One that failed proves nothing.

    Raises:
        AuditFailed: naming the two workers.
    """
    if outcome.status == "ok" and canonical_json(outcome.values) != canonical_json(audit.values):
        raise AuditFailed(
            f"workers {audit.worker} and {worker} disagree about evaluation {audit.job.key[:16]}: the memory or the "
            f"device of one is damaged, so results may be wrong; events.jsonl says on which nodes they are"
        )


def _due(lane: _Lane) -> float:
    """When the first of a lane's running jobs becomes overdue."""
    patience = PROBATION_PATIENCE if lane.on_probation else 1.0
    timed = [(job.key, job.deadline) for job in lane.running() if job.deadline is not None]
    return min((lane.since[key] + deadline * patience for key, deadline in timed), default=float("inf"))


def _explain(job: Job, loss: Loss, cause: str) -> str:
    """Why a job was given up, for people."""
    if loss == "deadline":
        return f"did not finish within {PROBATION_PATIENCE:g} times its deadline of {job.deadline:g} s"
    what = {"oom": "memory ran out", "node": "its node was lost"}.get(loss, "its worker was lost")
    return f"{what} {LIMITS[loss][0]} times while it ran alone; the last time: {cause}"
