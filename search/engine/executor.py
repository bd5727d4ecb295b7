"""What the search asks of whatever evaluates its candidates: plain jobs in, exactly one plain outcome per key back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

Status = Literal["ok", "invalid", "error", "oom", "timeout", "crash"]
STATUSES: tuple[str, ...] = get_args(Status)

# What the history calls an outcome that is no verdict on its candidate.
_REASONS: Mapping[str, str] = {"timeout": "TIMEOUT", "oom": "OOM", "crash": "WORKER_LOST", "error": "ERROR"}

Notify = Callable[..., None]
"""Receives `(level, event, **fields)` for the run's event log; `RunDirectory.events` is one."""


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation to do.

    Args:
        key: names the evaluation: equal keys have equal outcomes.
        kind: which of the worker's abilities is asked for.
        payload: JSON data; with the worker's context it determines the outcome.
        deadline: seconds after which the evaluation is given up, or None. In-process execution cannot keep it.
    """

    key: str
    kind: str
    payload: dict[str, Any]
    deadline: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The job as JSON data."""
        return {"key": self.key, "kind": self.kind, "payload": self.payload, "deadline": self.deadline}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The job that `to_json` gave."""
        return cls(data["key"], data["kind"], data["payload"], data.get("deadline"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job.

    Args:
        key: the job's key.
        status: `ok`, `invalid` (the candidate's own fault), `error` (the worker's code raised), or one of those that
            depend on the machine: `oom` (memory ran out again and again), `timeout`, `crash` (the worker was lost
            three times over it).
        values: what the worker returned; empty unless the status is `ok`.
        error: a reason code when `invalid`, otherwise text for people. It may name paths of the machine.
        telemetry: where, when and how long; never part of a search's history.
    """

    key: str
    status: Status
    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    telemetry: dict[str, Any] = field(default_factory=dict)

    @property
    def reason(self) -> str | None:
        """Why there are no values, as a code for the history; None if the status is `ok`."""
        return self.error if self.status == "invalid" else _REASONS.get(self.status)

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON data."""
        return {
            "key": self.key,
            "status": self.status,
            "values": self.values,
            "error": self.error,
            "telemetry": self.telemetry,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """The outcome that `to_json` gave.

        Raises:
            ValueError: the status is unknown.
        """
        if data["status"] not in STATUSES:
            raise ValueError(f"unknown status {data['status']!r}")
        return cls(data["key"], data["status"], data["values"], data["error"], data["telemetry"])


class Worker(Protocol):
    """Holds what evaluations need (model, statistics, tokens) and does them one at a time.

    An executor that gives a worker several slots calls `handle` from as many threads.
    """

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The values of one evaluation: JSON data, a pure function of the arguments and of the worker's context.

        Raises:
            InvalidCandidate: the candidate cannot have a value; its reason becomes the outcome's error.
        """
        ...

    # A worker may also have `numerics() -> dict`: `class`, `processor`, `loss` and `bits`, by which
    # `Admission` compares workers.


class Executor(Protocol):
    """Evaluates jobs somewhere. Used from one thread; `close` is safe to call at any time and more than once."""

    workers: int
    """How many jobs it means to run at the same time."""

    def start(self) -> None:
        """Begin to start workers; returns before they are ready."""
        ...

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs. One whose key is still unanswered is not queued twice.

        Raises:
            TypeError, ValueError: a payload is not JSON data.
        """
        ...

    def poll(self, timeout: float) -> list[Outcome]:
        """What has finished, in completion order; waits up to `timeout` seconds for the first, if anything is open.

        Raises:
            WorkersFailed: no worker can start.
            NoCapacity: there has been nothing to run on for too long.
            AuditFailed: a worker found its model changed, so that results may be wrong.
        """
        ...

    def drain(self) -> None:
        """Begin no more jobs and forget those that wait. What runs still comes to its end, and out of `poll`."""
        ...

    def counters(self) -> dict[str, int]:
        """Numbers for the display: `ready` and `starting` workers, `running` jobs, `deaths` of workers."""
        ...

    def close(self) -> None:
        """Stop everything that `start` started; unfinished jobs are dropped."""
        ...


def evaluate(
    executor: Executor,
    jobs: Iterable[Job],
    on_outcome: Callable[[Outcome], None] | None = None,
    *,
    poll_seconds: float = 1.0,
) -> list[Outcome]:
    """Run jobs on a started executor and return one outcome per job, in the order of the jobs.

    Args:
        executor: has no other open jobs.
        jobs: equal keys are evaluated once and get the same outcome.
        on_outcome: called with every outcome as it arrives, before anything depends on it.
        poll_seconds: how long to wait at a time.
    """
    wanted = list(jobs)
    found: dict[str, Outcome] = {}
    executor.submit({job.key: job for job in wanted}.values())
    missing = {job.key for job in wanted}
    while missing:
        for outcome in executor.poll(poll_seconds):
            if on_outcome is not None:
                on_outcome(outcome)
            found[outcome.key] = outcome
            missing.discard(outcome.key)
    return [found[job.key] for job in wanted]
