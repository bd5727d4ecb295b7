"""Evaluate in this process: for debugging, for embedding, and for tests. Needs no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evoprune.metrics.errors import NoCapacity, WorkersFailed
from evoprune.metrics.files import canonical_json
from evoprune.search.engine.admission import Admission
from evoprune.search.engine.executor import Executor, Job, Outcome, Worker
from evoprune.search.engine.running import (
    SickWorker,
    WorkerRecipe,
    get_threads,
    last_line,
    run_job,
    set_threads,
)
from evoprune.search.signals import stop_if_insisted


class InlineExecutor(Executor):
    """Does the jobs one after another, in the order in which they were submitted, inside `poll`.

    A debugger works in it. A job's deadline is not kept, and a job that kills its process kills this one.

    Args:
        factory: `"module:function"` that makes the worker from the context.
        context: JSON data for the factory.
        threads: torch threads between `start` and `close`; None leaves them as they are.
        python_path: folders to import the factory from.
        environment: environment variables to set.
        admission: decides whether this process may work on the run.
    """

    workers = 1

    def __init__(
        self,
        factory: str,
        context: dict[str, Any],
        *,
        threads: int | None = 1,
        python_path: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        admission: Admission | None = None,
    ) -> None:
        self._admission = admission
        self._recipe = WorkerRecipe(factory, context, threads, python_path, environment or {})
        self._threads_before: int | None = None
        self._worker: Worker | None = None
        self._queue: dict[str, Job] = {}

    def start(self) -> None:
        """Nothing to start early: the worker is built when the first job runs."""

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs; see `Executor.submit`."""
        for job in jobs:
            canonical_json(job.payload)
            self._queue.setdefault(job.key, job)

    def poll(self, timeout: float) -> list[Outcome]:
        """Do the oldest open job, however long it takes, and return its outcome.

        Raises:
            NoCapacity: the device is broken for this process; a new one may go on.
            Exception: whatever the factory raises, as it is.
            WorkersFailed: this process may not take part.
            KeyboardInterrupt: a second signal came; the job stays open.
        """
        if not self._queue:
            return []
        if self._worker is None:
            self._threads_before = get_threads()
            self._worker = self._admitted(self._recipe.build())
        key, job = next(iter(self._queue.items()))
        try:
            outcome = run_job(self._worker, job)
        except SickWorker as sick:
            raise NoCapacity(f"the device failed: {last_line(str(sick))}") from sick
        except SystemExit as leaving:  # in another process this would end the worker
            outcome = Outcome(key, "crash", error=f"the worker called sys.exit({leaving.code!r})")
        stop_if_insisted()
        del self._queue[key]  # only now: an interrupted job stays open
        return [outcome]

    def drain(self) -> None:
        """Forget the open jobs: between two calls of `poll` nothing runs."""
        self._queue.clear()

    def _admitted(self, worker: Worker) -> Worker:
        if self._admission is not None:
            report = getattr(worker, "numerics", None)
            refusal = self._admission.refusal(None, None if report is None else report())
            if refusal is not None:
                raise WorkersFailed(f"no worker may take part: {refusal}")
        return worker

    def counters(self) -> dict[str, int]:
        """See `Executor.counters`."""
        return {"ready": int(self._worker is not None), "starting": 0, "running": 0, "deaths": 0}

    def close(self) -> None:
        """Forget the worker and the open jobs, and give torch its threads back."""
        self._worker = None
        self._queue.clear()
        if self._threads_before is not None:
            set_threads(self._threads_before)
            self._threads_before = None
