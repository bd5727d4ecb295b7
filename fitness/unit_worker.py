"""What workers share that know the units of a model: their costs, and what unit criteria choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from evoprune.fitness.latency_passes import Work
from evoprune.fitness.model_worker import Handler, ModelWorker, heldout_answer
from evoprune.fitness.models import refuse_cut
from evoprune.fitness.teacher import window_losses
from evoprune.fitness.unit_choice import choose_units
from evoprune.fitness.unit_costs import UnitCosts, kept_by, unit_costs
from evoprune.fitness.unit_criteria import UNIT_CRITERIA, Compensating, score_units
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.shape import BlockShape

Cut = Callable[[Sequence[BlockShape], Mapping[str, Tensor | None]], AbstractContextManager[None]]
"""Inside, the model is cut to a choice of units, with additions to outputs; see `Surgeon.chosen`."""


class UnitWorker(ModelWorker):
    """A worker whose model can be cut.

    Jobs (kind and payload):
        costs: ``quantity``, ``batch``, ``sequence`` (None: as `Work.of` has it); returns `UnitCosts`.
        choose: ``prepared``, ``criterion``, ``costs``, ``fraction`` of these that goes, ``spread`` (None: the
            criterion's own); returns what this choice of units ``kept``.
    """

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {**super().jobs, "costs": self._costs, "choose": self._choose}

    @cached_property
    def _units(self) -> list[BlockUnits]:
        return find_units(self.language_model)

    def _costs(self, payload: dict[str, Any]) -> dict[str, Any]:
        # Every search of units asks for these first, and what it finds can be cut out of a dense model only.
        refuse_cut(self.language_model)
        work = Work.of(self.language_model, payload["batch"], payload["sequence"], decode=False)
        quantity = payload["quantity"]
        return unit_costs(self.language_model, quantity, batch=work.batch, sequence=work.sequence).to_json()

    def _choose(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"kept": [list(kept_by(block)) for block in self._chosen(payload)]}

    def _chosen(self, payload: dict[str, Any]) -> list[BlockShape]:
        """What a criterion's own choice of units keeps of every block."""
        self._restore()
        criterion = UNIT_CRITERIA[payload["criterion"]]
        scores = score_units(self.language_model, criterion, self.prepared(payload["prepared"]).statistics())
        costs = UnitCosts.from_json(payload["costs"])
        return choose_units(scores, costs, payload["fraction"], spread=payload["spread"] or criterion.spread)

    def _heldout_of_choice(self, payload: dict[str, Any], head: nn.Linear | None, cut: Cut) -> dict[str, Any]:
        """Losses on text C of the model as a criterion leaves it, by window, and what it ``kept``.

        Args:
            payload: as of ``choose``.
            head: of this model.
            cut: brings the model to a choice.
        """
        prepared, shape = self.prepared(payload["prepared"]), self._chosen(payload)
        criterion, statistics = UNIT_CRITERIA[payload["criterion"]], prepared.statistics()
        additions: dict[str, Tensor | None] = {}
        if isinstance(criterion, Compensating):
            for units, kept in zip(self._units, shape, strict=True):
                additions |= criterion.additions(units, kept, statistics)
        windows, teacher = prepared.text("heldout")
        with cut(shape, additions):
            losses = window_losses(self.language_model.model, head, windows, teacher)
        return {**heldout_answer(losses, windows), "kept": [list(kept_by(block)) for block in shape]}
