"""The reference model made ready for candidates, as a worker has it."""

from __future__ import annotations

import torch

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.evaluator import Evaluator
from evoprune.fitness.worker import MetricWorker
from evoprune.search.config_metric import DEFAULT_STATISTICS


def reference_worker(**changes: object) -> tuple[MetricWorker, Evaluator, str]:
    """(worker, its evaluator, name of the prepared set) on the reference model, one thread; statistics are cached."""
    torch.set_num_threads(1)
    settings: dict[str, object] = {"statistics": DEFAULT_STATISTICS, "heldout_windows": 16, **changes}
    context = EvaluationContext(**settings)  # type: ignore[arg-type]
    worker = MetricWorker(context)
    prepared = worker.handle("prepare", {})["name"]
    return worker, worker.evaluator(prepared), prepared
