"""What runs in a worker process: a resident model that answers jobs. A pure function of each job's content."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.evaluator import Evaluator
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.numerics import numerics
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.parcels import deliver
from evoprune.fitness.prepare import Prepared, prepare, seconds_per_token
from evoprune.fitness.teacher import WindowLosses, window_losses
from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.expression import from_json

# Restore the dense model and compare its checksum once in so many evaluations.
_CHECK_EVERY = 50


def build(context: dict[str, Any]) -> MetricWorker:
    """The factory that executors call, with `EvaluationContext.to_json` as its argument."""
    return MetricWorker(EvaluationContext.from_json(context))


class MetricWorker:
    """Answers jobs about pruning metrics. The model is loaded at once, everything else when a job names it.

    Jobs (kind and payload):
        prepare: nothing; returns the summary of the prepared set, and ``seconds_per_token``.
        evaluate: ``prepared``, ``criterion``, ``thresholds``, ``max_tied``; returns fitness by rung.
        heldout: ``prepared``, ``criterion`` (None: the dense model); returns losses on text C, by window.
        agreement: ``prepared``, ``criterion``, ``others``; returns how far masks agree, by site.

    ``prepared`` is the set's name. A criterion is ``{"name": ...}`` or ``{"expression": nested lists}``.
    """

    def __init__(self, context: EvaluationContext) -> None:
        torch.set_num_threads(context.threads)
        self.context = context
        loaded = load_model(
            context.place(context.model),
            dtype=context.dtype,
            device=context.device,
            revision=context.revision,
            trust_remote_code=context.trust_remote_code,
        )
        self.language_model: LanguageModel = replace(loaded, name=context.model)
        self._prepared: Prepared | None = None
        self._evaluator: Evaluator | None = None
        self._evaluations = 0

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The answer to one job.

        Raises:
            InvalidCandidate: the candidate has no fitness.
            InvalidInput: the job or the context asks for what does not exist.
        """
        jobs = {
            "prepare": self._prepare,
            "evaluate": self._evaluate,
            "heldout": self._heldout,
            "agreement": self._agreement,
        }
        if kind not in jobs:
            raise InvalidInput(f"no job of kind {kind!r}; a metric worker knows {', '.join(jobs)}")
        return jobs[kind](payload)

    def _prepare(self, payload: dict[str, Any]) -> dict[str, Any]:
        prepared = prepare(self.language_model, self.context)
        deliver(prepared.name)
        windows, _ = prepared.text("search")
        speed = seconds_per_token(self.language_model, windows[: self.context.rungs[0]])
        return {**prepared.summary(), "seconds_per_token": speed}

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

    def _heldout(self, payload: dict[str, Any]) -> dict[str, Any]:
        evaluator = self.evaluator(payload["prepared"])
        assert self._prepared is not None
        windows, teacher = self._prepared.text("heldout")

        def losses() -> WindowLosses:
            return window_losses(self.language_model.model, evaluator.head, windows, teacher)

        if payload["criterion"] is None:
            evaluator.restore()
            measured = losses()
        else:
            with evaluator.applied(criterion_from(payload["criterion"])):
                measured = losses()
        assert measured.kl is not None
        return {
            "nll": measured.nll.tolist(),
            "kl": measured.kl.tolist(),
            "tokens": windows.shape[0] * (windows.shape[1] - 1),
        }

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

    def numerics(self) -> dict[str, Any]:
        """What tells whether another worker would give the same bits; see `evoprune.fitness.numerics`."""
        return numerics(self.language_model)

    def evaluator(self, prepared: str) -> Evaluator:
        """The resident model with the prepared set of this name; kept until another is named."""
        if self._evaluator is None or self._prepared is None or self._prepared.name != prepared:
            self._prepared = Prepared.open(prepared)
            windows, teacher = self._prepared.text("search")
            self._evaluator = Evaluator(
                self.language_model,
                self._prepared.dense,
                self._prepared.statistics(),
                windows,
                teacher,
                self.context.rule,
            )
        return self._evaluator


def criterion_from(value: dict[str, Any]) -> Criterion:
    """The criterion that a job names or spells.

    Raises:
        InvalidInput: no such name, or an expression that cannot be read.
    """
    if "name" in value:
        return CRITERIA[value["name"]]
    return Metric(from_json(value["expression"]))
