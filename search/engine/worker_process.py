"""The worker's process: what runs inside an actor."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

from evoprune.metrics.errors import AuditFailed
from evoprune.search.engine.executor import Job, Worker
from evoprune.search.engine.running import SickWorker, WorkerRecipe, run_job, tail_of_traceback


class WorkerProcess:
    """Builds a worker when asked whether it is ready, then does jobs; strings and plain data in and out."""

    def __init__(self, recipe: WorkerRecipe) -> None:
        self._recipe = recipe
        self._worker: Worker | None = None

    def ready(self) -> dict[str, Any]:
        """Build the worker: where it lives, or `error` (the traceback's end) and `line` (its gist)."""
        if self._recipe.threads is not None:  # before numpy and torch are loaded and read it
            os.environ["OMP_NUM_THREADS"] = str(self._recipe.threads)
        try:
            self._worker = self._recipe.build()
        except Exception as problem:
            return {"error": tail_of_traceback(problem), "line": f"{type(problem).__name__}: {problem}"}
        return {"pid": os.getpid(), "node": platform.node()}

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
