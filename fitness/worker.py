"""What runs in a worker process of a metric search."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from evoprune.fitness.compressors import stores_weights
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.evaluator import Evaluator
from evoprune.fitness.model_worker import Handler, ModelWorker, criterion_from, heldout_answer
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.teacher import WindowLosses, window_losses
from evoprune.metrics.criterion import CRITERIA

# Restore the dense model and compare its checksum once in so many evaluations.
_CHECK_EVERY = 50


def build(context: dict[str, Any]) -> MetricWorker:
    """The factory that executors call, with `EvaluationContext.to_json` as its argument."""
    return MetricWorker(EvaluationContext.from_json(context))


class MetricWorker(ModelWorker):
    """Answers jobs about pruning metrics.

    Jobs (kind and payload), beside `prepare`, which also tells ``compressor_seconds``, those of one candidate:
        evaluate: ``prepared``, ``criterion``, ``thresholds``, ``max_tied``; returns fitness by rung.
        finals: ``prepared``, ``criterion``, ``windows`` (first and last of text B); returns losses by window.
        heldout: ``prepared``, ``criterion`` (None: the dense model); returns losses on text C, by window.
        agreement: ``prepared``, ``criterion``, ``others``; returns how far masks agree, by site.
    """

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self._evaluator: tuple[Prepared, Evaluator] | None = None
        self._evaluations = 0

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {
            **super().jobs,
            "evaluate": self._evaluate,
            "finals": self._finals,
            "heldout": self._heldout,
            "agreement": self._agreement,
            "replayed": self._replayed,
        }

    def _restore(self) -> None:
        if self._evaluator is not None:
            self._evaluator[1].restore()

    def _prepare(self, payload: dict[str, Any]) -> dict[str, Any]:
        summary = super()._prepare(payload)
        if not stores_weights(self.context.compressor):
            return summary
        evaluator = self.evaluator(summary["name"])
        # Also refuses statistics that the compressor can make nothing of, before the search.
        with evaluator.applied(CRITERIA["magnitude"]):
            began = time.perf_counter()
            evaluator.apply(CRITERIA["magnitude"])
            seconds = time.perf_counter() - began
        return {**summary, "compressor_seconds": seconds}

    def _evaluate(self, payload: dict[str, Any]) -> dict[str, Any]:
        evaluator = self.evaluator(payload["prepared"])
        self._evaluations += 1
        if self._evaluations % _CHECK_EVERY == 0:
            evaluator.restore()
        return evaluator.evaluate(
            criterion_from(payload["criterion"]),
            OBJECTIVES[self.context.objective],
            self.context.rungs,
            payload["thresholds"],
            payload["max_tied"],
        )

    def _finals(self, payload: dict[str, Any]) -> dict[str, Any]:
        evaluator = self.evaluator(payload["prepared"])
        windows = self.prepared(payload["prepared"]).final_windows()[slice(*payload["windows"])]
        with evaluator.applied(criterion_from(payload["criterion"])):
            losses = window_losses(self.language_model.model, evaluator.head, windows, None)
        return {"nll": losses.nll.tolist()}

    def _heldout(self, payload: dict[str, Any]) -> dict[str, Any]:
        evaluator = self.evaluator(payload["prepared"])
        windows, teacher = self.prepared(payload["prepared"]).text("heldout")

        def losses() -> WindowLosses:
            return window_losses(self.language_model.model, evaluator.head, windows, teacher)

        if payload["criterion"] is None:
            evaluator.restore()
            measured = losses()
        else:
            with evaluator.applied(criterion_from(payload["criterion"])):
                measured = losses()
        return heldout_answer(measured, windows)

    def _agreement(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Intersection over union of the pruned sets of a criterion with those of others, by site."""
        evaluator = self.evaluator(payload["prepared"])
        ours = {site.name: keep for site, keep in evaluator.masks(criterion_from(payload["criterion"]))}
        agreement: dict[str, dict[str, float]] = {}
        for name, other in payload["others"].items():
            agreement[name] = {}
            for site, keep in evaluator.masks(criterion_from(other)):
                both = int((~keep & ~ours[site.name]).sum())
                either = int((~(keep & ours[site.name])).sum())
                agreement[name][site.name] = both / either if either else 1.0
        return {"agreement": agreement}

    def evaluator(self, prepared: str) -> Evaluator:
        """The resident model with the prepared set of this name; kept until another is named."""
        opened = self.prepared(prepared)
        if self._evaluator is None or self._evaluator[0] is not opened:
            windows, teacher = opened.text("search")
            evaluator = Evaluator(
                self.language_model,
                opened.dense,
                opened.statistics(),
                windows,
                teacher,
                self.context.rule,
                self.context.own,
                self.context.compressor,
            )
            self._evaluator = (opened, evaluator)
        return self._evaluator[1]
