"""The worker's process: what runs inside an actor."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

from evoprune.fitness.parcels import set_courier
from evoprune.metrics.errors import AuditFailed
from evoprune.search.engine.executor import Job, Worker
from evoprune.search.engine.librarian import RayCourier, node_id
from evoprune.search.engine.running import SickWorker, WorkerRecipe, run_job, tail_of_traceback
from evoprune.search.identity import code_hash


class WorkerProcess:
    """Builds a worker when asked whether it is ready, then does jobs; strings and plain data in and out.

    Args:
        recipe: for the worker.
        librarian: the actor to get files from that this node lacks; None on the driver's own machine.
    """

    def __init__(self, recipe: WorkerRecipe, librarian: Any = None) -> None:
        self._recipe = recipe
        if librarian is not None:
            set_courier(RayCourier(librarian))
        self._worker: Worker | None = None

    def ready(self) -> dict[str, Any]:
        """Build the worker: where it lives and what it is, or `error` (the traceback's end) and `line` (its gist)."""
        if self._recipe.threads is not None:  # before numpy and torch are loaded and read it
            os.environ["OMP_NUM_THREADS"] = str(self._recipe.threads)
        try:
            self._worker = self._recipe.build()
        except Exception as problem:
            return {"error": tail_of_traceback(problem), "line": f"{type(problem).__name__}: {problem}"}
        report = getattr(self._worker, "numerics", None)
        return {
            "pid": os.getpid(),
            "node": platform.node(),
            "node_id": node_id(),
            "code": code_hash(),
            "numerics": None if report is None else report(),
        }

    def work(self, job: str) -> dict[str, Any]:
        """The outcome of a job, both as JSON data.

        Or `sick`, a traceback: then this process is to be replaced; or `audit`, a line: then the search is to stop.
        """
        if self._worker is None:
            raise RuntimeError("not ready")
        try:
            return run_job(self._worker, Job.from_json(json.loads(job))).to_json()
        except SickWorker as problem:
            return {"sick": str(problem)}
        except AuditFailed as problem:
            return {"audit": str(problem)}
