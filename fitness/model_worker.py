"""What every worker process is: a resident model that answers jobs, each answer a pure function of the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.numerics import numerics
from evoprune.fitness.parcels import deliver
from evoprune.fitness.prepare import Prepared, calibration_windows, prepare, seconds_per_token
from evoprune.fitness.replay import replayed
from evoprune.fitness.resident import ResidentWeights
from evoprune.fitness.samples import Sequences, n_predictions
from evoprune.fitness.teacher import WindowLosses, linear_head, window_losses
from evoprune.metrics.allocation_file import from_json as from_document
from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.expression import from_json
from evoprune.metrics.records import MaskRule

Handler = Callable[[dict[str, Any]], dict[str, Any]]


class ModelWorker:
    """Answers jobs about one model, which is loaded at once; everything else when a job names it.

    Jobs (kind and payload):
        prepare: nothing; returns the summary of the prepared set, and ``seconds_per_token``.

        replayed, in kinds of search that list it: ``prepared``, ``criterion``, ``compressor``, ``allocation`` (its
            document, or None: the context's rule everywhere); returns losses on text C, by window, of the model pruned
            in replay.

    A kind of search adds its own in `jobs`. ``prepared`` in a payload is the set's name; a criterion is
    ``{"name": ...}`` or ``{"expression": nested lists}``.
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

    @property
    def jobs(self) -> Mapping[str, Handler]:
        """What answers each kind of job."""
        return {"prepare": self._prepare}

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The answer to one job.

        Raises:
            InvalidCandidate: the candidate has no fitness.
            InvalidInput: the job or the context asks for what does not exist.
        """
        if kind not in self.jobs:
            raise InvalidInput(f"no job of kind {kind!r}; a {type(self).__name__} knows {', '.join(self.jobs)}")
        return self.jobs[kind](payload)

    def numerics(self) -> dict[str, Any]:
        """What tells whether another worker would give the same bits; see `evoprune.fitness.numerics`."""
        return numerics(self.language_model)

    def prepared(self, name: str) -> Prepared:
        """The prepared set of this name; kept until another is named."""
        if self._prepared is None or self._prepared.name != name:
            self._prepared = Prepared.open(name)
        return self._prepared

    def _restore(self) -> None:
        """Make the model dense, for whoever reads its weights; workers that leave candidates in it say how."""

    def _prepare(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        prepared = prepare(self.language_model, self.context)
        deliver(prepared.name)
        windows, _ = prepared.text("search")
        speed = seconds_per_token(self.language_model, windows[: self.context.rungs[0]])
        return {**prepared.summary(), "seconds_per_token": speed}

    def _replayed(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        prepared, model = self.prepared(payload["prepared"]), self.language_model
        windows, teacher = prepared.text("heldout")
        allocation = None if payload["allocation"] is None else from_document(payload["allocation"])
        rule = self.context.rule if allocation is None else MaskRule(allocation.sparsity)
        weights = ResidentWeights(model, prepared.dense)
        try:
            replayed(
                model,
                criterion_from(payload["criterion"]),
                rule,
                calibration_windows(model, self.context),
                compressor=payload["compressor"],
                allocation=allocation,
                statistics=prepared.statistics(),
            )
            return heldout_answer(
                window_losses(model.model, linear_head(model.model, windows), windows, teacher), windows
            )
        finally:
            weights.restore()


def heldout_answer(measured: WindowLosses, windows: Sequences) -> dict[str, Any]:
    """Losses by window as a job returns them, with the number of predictions.

    Args:
        windows: what they were measured on.
    """
    assert measured.kl is not None
    return {
        "nll": measured.nll.tolist(),
        "kl": measured.kl.tolist(),
        "tokens": int(n_predictions(windows).sum()),
    }


def criterion_from(value: dict[str, Any]) -> Criterion:
    """The criterion that a job names or spells.

    Raises:
        InvalidInput: no such name, or an expression that cannot be read.
    """
    if "name" in value:
        return CRITERIA[value["name"]]
    return Metric(from_json(value["expression"]))
