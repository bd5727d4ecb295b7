"""What runs in a worker process that compares metrics beside allocations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.model_worker import Handler, criterion_from, heldout_answer
from evoprune.fitness.teacher import window_losses
from evoprune.fitness.worker import MetricWorker


def build(context: dict[str, Any]) -> JointWorker:
    """The factory that executors call, with `EvaluationContext.to_json` as its argument."""
    return JointWorker(EvaluationContext.from_json(context))


class JointWorker(MetricWorker):
    """Answers jobs about pruning metrics, each at sparsities of its own.

    Jobs (kind and payload), beside those of `MetricWorker`:
        pair: ``prepared``, ``criterion`` (None: the dense model), ``sparsities`` (by site name, in [0, 1]; empty: that
            of the context everywhere), ``text`` (``search`` or ``heldout``); returns losses by window.
    """

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {**super().jobs, "pair": self._pair}

    def _pair(self, payload: dict[str, Any]) -> dict[str, Any]:
        evaluator = self.evaluator(payload["prepared"])
        windows, teacher = self.prepared(payload["prepared"]).text(payload["text"])
        model = self.language_model.model
        if payload["criterion"] is None:
            evaluator.restore()
            return heldout_answer(window_losses(model, evaluator.head, windows, teacher), windows)
        evaluator.own = payload["sparsities"]
        try:
            with evaluator.applied(criterion_from(payload["criterion"])):
                return heldout_answer(window_losses(model, evaluator.head, windows, teacher), windows)
        finally:
            evaluator.own = self.context.own
