"""A worker of a metric search that never finds a fitness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.model_worker import Handler
from evoprune.fitness.worker import MetricWorker


class HopelessWorker(MetricWorker):
    """Whatever the candidate, the loss is no number."""

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {**super().jobs, "evaluate": lambda payload: {"rungs": [math.nan], "stderr": 0.0, "removed": 0}}


def build(context: dict[str, Any]) -> HopelessWorker:
    """The factory that executors call."""
    return HopelessWorker(EvaluationContext.from_json(context))
