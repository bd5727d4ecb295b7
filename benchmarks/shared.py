"""What benchmarks share: the reference model as a worker has it, such a worker as an executor, and runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.evaluator import Evaluator
from evoprune.fitness.worker import MetricWorker
from evoprune.search.config_metric import DEFAULT_STATISTICS
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources


def reference_worker(**changes: object) -> tuple[MetricWorker, Evaluator, str]:
    """(worker, its evaluator, name of the prepared set) on the reference model, one thread; statistics are cached."""
    torch.set_num_threads(1)
    settings: dict[str, object] = {"statistics": DEFAULT_STATISTICS, "heldout_windows": 16, **changes}
    context = EvaluationContext(**settings)  # type: ignore[arg-type]
    worker = MetricWorker(context)
    prepared = worker.handle("prepare", {})["name"]
    return worker, worker.evaluator(prepared), prepared


def searched(config: Any, folder: Path) -> RunDirectory:
    """The run of a configuration, in this process; one that finished in this folder before is read, not repeated."""
    if folder.exists():
        run = RunDirectory.open(folder)
        if run.result is not None:
            return run
        shutil.rmtree(folder)
    return start_search(config, Resources(executor="inline"), run_dir=folder)


class Resident(InlineExecutor):
    """A worker that exists already, as an executor."""

    def __init__(self, worker: Any) -> None:
        super().__init__("", {})
        self._worker = worker

    def ask(self, jobs: Sequence[Job], *, limited: bool = True, alone: bool = False) -> list[Outcome]:
        """See `evoprune.search.worker_session.Ask`."""
        self.submit(jobs)
        return [self.poll(0.0)[0] for _ in jobs]
