"""What runs in a worker process of a policy search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.mask_units import Mask, UnitTable, unit_table
from evoprune.fitness.masked_model import MaskedModel
from evoprune.fitness.maskers import ByMetrics, ByUnits, Masker, masker_from, unit_criterion_named
from evoprune.fitness.matrix_masks import MetricMasks, WeightMasks
from evoprune.fitness.model_worker import Handler, criterion_from, heldout_answer
from evoprune.fitness.resident_evaluator import finite
from evoprune.fitness.samples import Samples, Sequences, forward_batches, taken
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.teacher import BATCH, Teacher, batch_losses, linear_head, window_losses
from evoprune.fitness.unit_criteria import UNIT_CRITERIA
from evoprune.fitness.unit_scores import mask_unit_scores, neuron_orders
from evoprune.fitness.unit_worker import UnitWorker
from evoprune.metrics.errors import InvalidCandidate, UnknownName
from evoprune.metrics.shape import BlockShape

OBJECTIVES = ("kl", "nll")
"""What gradients can be taken of."""

# Restore the dense model and compare its checksum once in so many evaluations.
_CHECK_EVERY = 200


def build(context: dict[str, Any]) -> PolicyWorker:
    """The factory that executors call, with `EvaluationContext.to_json` as its argument."""
    return PolicyWorker(EvaluationContext.from_json(context))


class Masking(Protocol):
    """How masks of a model's units are tried on it."""

    def kept(self, mask: Mask) -> AbstractContextManager[None]:
        """Inside, the model is what the mask leaves."""

    def relaxed(self, values: Tensor) -> AbstractContextManager[None]:
        """Inside, units count as much as their values say; gradients with respect to these flow back.

        Raises:
            InvalidInput: these units have no such values.
        """

    def restore(self) -> None:
        """Make the model dense."""


class PolicyWorker(UnitWorker):
    """Answers jobs about masks of units. A ``masker`` says what a unit is, as `masker_from` reads it.

    Jobs (kind and payload), beside those of any `UnitWorker`:
        units: ``prepared``, ``masker``, ``quantity``; returns the `UnitTable` as ``units``.
        unit-scores: ``prepared``, ``masker``, ``criterion``: the name of a unit criterion, or a criterion of weights,
            whose scores of the columns of output matrices are added up; returns ``scores`` by unit, low = goes first.
        mask: ``prepared``, ``masker``, ``kept`` (`UnitTable.packed`; None: all of the model), ``windows`` (indices into
            text B); returns ``kl`` and ``nll``, each by window.
        gradient: ``prepared``, ``masker``, ``values`` by unit, ``windows``, ``objective`` (``kl``, where it is not
            said, or ``nll``); returns ``kl`` and ``nll`` of the relaxed mask, each by window, and the ``gradient`` of
            the mean of the objective, by unit.
        heldout: ``prepared``, ``masker`` and ``kept`` (None: the dense model), or what ``choose`` was given, for the
            model as that criterion leaves it; returns losses on text C, by window.
    """

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self._tables: dict[tuple[Masker, str, str], UnitTable] = {}
        self._kept: tuple[Any, Masking] | None = None
        self._evaluations = 0
        self._text: tuple[str, Sequences, Teacher, nn.Linear | None] | None = None

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {
            **super().jobs,
            "units": self._unit_table,
            "unit-scores": self._scores,
            "mask": self._mask,
            "gradient": self._gradient,
            "heldout": self._heldout,
        }

    def _unit_table(self, payload: dict[str, Any]) -> dict[str, Any]:
        masker = masker_from(payload["masker"])
        return {"units": self._table(masker, payload["prepared"], payload["quantity"]).to_json()}

    def _scores(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        masker, given = masker_from(payload["masker"]), payload["criterion"]
        criterion = UNIT_CRITERIA[given] if isinstance(given, str) else criterion_from(given)
        prepared = self.prepared(payload["prepared"])
        scores = mask_unit_scores(
            self.language_model,
            self._table(masker, payload["prepared"]),
            criterion,
            prepared.statistics(),
            prepared.facts["identity"]["sparsity"],
        )
        return {"scores": scores.tolist()}

    def _mask(self, payload: dict[str, Any]) -> dict[str, Any]:
        windows, teacher, head = self._search_text(payload["prepared"])
        indices = payload["windows"]
        self._evaluations += 1
        if self._evaluations % _CHECK_EVERY == 0:
            self._restore()
        with self._masked(payload):
            model, chosen = self.language_model.model, taken(windows, indices)
            losses = finite(window_losses(model, head, chosen, teacher.take(indices)))
        assert losses.kl is not None
        return {"kl": losses.kl.tolist(), "nll": losses.nll.tolist()}

    def _gradient(self, payload: dict[str, Any]) -> dict[str, Any]:
        objective = payload.get("objective", "kl")
        if objective not in OBJECTIVES:
            raise UnknownName("objective of a mask", str(objective), OBJECTIVES)
        windows, teacher, head = self._search_text(payload["prepared"])
        masking = self._masking(masker_from(payload["masker"]), payload["prepared"])
        values = torch.tensor(payload["values"], dtype=torch.float32, requires_grad=True)
        model, indices = self.language_model.model, payload["windows"]
        text, kl, nll = taken(windows, indices), [], []
        per_pass = 1 if isinstance(text, Samples) else BATCH
        for first, batch in zip(
            range(0, len(indices), per_pass), forward_batches(text, per_pass, model.device), strict=True
        ):
            with masking.relaxed(values):
                losses = finite(batch_losses(model, head, batch, teacher.take(indices[first : first + per_pass])))
                assert losses.kl is not None
                mean = (losses.kl if objective == "kl" else losses.nll).sum() / len(indices)
                mean.backward()
            kl += losses.kl.tolist()
            nll += losses.nll.tolist()
        assert values.grad is not None
        if not bool(values.grad.isfinite().all()):
            raise InvalidCandidate("NONFINITE", "the gradient of a relaxed mask is not finite")
        return {"gradient": values.grad.tolist(), "kl": kl, "nll": nll}

    def _heldout(self, payload: dict[str, Any]) -> dict[str, Any]:
        prepared = self.prepared(payload["prepared"])
        _, _, head = self._search_text(payload["prepared"])
        if "criterion" in payload:
            return self._heldout_of_choice(payload, head, self._cut)
        windows, teacher = prepared.text("heldout")
        with self._masked(payload):
            losses = finite(window_losses(self.language_model.model, head, windows, teacher))
        return heldout_answer(losses, windows)

    @contextmanager
    def _masked(self, payload: Mapping[str, Any]) -> Iterator[None]:
        """Inside, the model is what a job's mask leaves."""
        if payload["kept"] is None:
            self._restore()
            yield
            return
        masker = masker_from(payload["masker"])
        mask = self._table(masker, payload["prepared"]).unpacked(payload["kept"])
        with self._masking(masker, payload["prepared"]).kept(mask):
            yield

    @contextmanager
    def _cut(self, blocks: Sequence[BlockShape], additions: Mapping[str, Tensor | None]) -> Iterator[None]:
        surgeon = Surgeon(self.language_model, self._units)
        try:
            with surgeon.chosen(blocks, additions):
                yield
        finally:
            surgeon.restore()

    def _table(self, masker: Masker, prepared: str, quantity: str = "parameters") -> UnitTable:
        """The units of the model; which they are does not depend on what they cost."""
        named = masker, prepared, quantity
        if named not in self._tables:
            orders: Mapping[int, Sequence[int]] | None = None
            if isinstance(masker, ByUnits) and masker.ranked_by is not None:
                self._restore()
                known = self.prepared(prepared)
                criterion, sparsity = unit_criterion_named(masker.ranked_by), known.facts["identity"]["sparsity"]
                orders = neuron_orders(self.language_model, criterion, known.statistics(), sparsity)
            self._tables[named] = unit_table(self.language_model, masker, quantity, orders)
        return self._tables[named]

    def _masking(self, masker: Masker, prepared: str) -> Masking:
        """How masks of these units are tried on the model; kept until a job names something else."""
        named = masker, prepared
        if self._kept is None or self._kept[0] != named:
            self._restore()
            self._kept = named, self._built(masker, prepared)
        return self._kept[1]

    def _built(self, masker: Masker, prepared: str) -> Masking:
        model, table, opened = self.language_model, self._table(masker, prepared), self.prepared(prepared)
        if isinstance(masker, ByUnits):
            return MaskedModel(model, self._units, table)
        if isinstance(masker, ByMetrics):
            return MetricMasks(model, opened.dense, table, opened.statistics())
        return WeightMasks(model, opened.dense, table)

    def _search_text(self, prepared: str) -> tuple[Sequences, Teacher, nn.Linear | None]:
        """Windows of text B, their teacher and the head of the model; kept until another set is named."""
        if self._text is None or self._text[0] != prepared:
            self._restore()
            windows, teacher = self.prepared(prepared).text("search")
            self._text = prepared, windows, teacher, linear_head(self.language_model.model, windows)
        return self._text[1:]

    def _restore(self) -> None:
        if self._kept is not None:
            self._kept[1].restore()
