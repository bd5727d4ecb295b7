"""What workers share that can be asked what allocators want."""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import cached_property
from typing import Any

from evoprune.fitness.allocating import allocate_model, ask_allocator
from evoprune.fitness.allocators import ALLOCATORS, READ_A, READ_B, Use
from evoprune.fitness.candidate_worker import CandidateWorker, Evaluator
from evoprune.fitness.model_worker import Handler, criterion_from
from evoprune.fitness.prepare import Prepared, calibration_windows
from evoprune.fitness.samples import Sequences

LOSS_WINDOWS = 8
"""Windows of text B on which an allocator that tries things out compares losses."""


class AllocatorWorker(CandidateWorker[Evaluator]):
    """A worker that allocators can look at the model of.

    Jobs (kind and payload):
        allocate: ``prepared``, ``criterion``, ``allocator``, ``target``, ``repaired`` (brought to the target, or as
            they are asked for); returns ``sparsities``, one per site.
    """

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {**super().jobs, "allocate": self._allocate}

    def _allocate(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        prepared = self.prepared(payload["prepared"])
        allocator = ALLOCATORS[payload["allocator"]]
        given = {
            "criterion": criterion_from(payload["criterion"]),
            "statistics": prepared.statistics(),
            **self._texts(prepared, allocator.uses),
        }
        if not payload["repaired"]:
            return {"sparsities": ask_allocator(self.language_model, allocator, payload["target"], **given)}
        allocation = allocate_model(self.language_model, payload["allocator"], allocator, payload["target"], **given)
        return {"sparsities": [site.sparsity for site in allocation.sites]}

    def _texts(self, prepared: Prepared, uses: Set[Use]) -> dict[str, Any]:
        """The texts that these uses need, as `allocate_model` takes them."""
        return {
            "calibration": self._calibration if uses & READ_A else None,
            "search": prepared.text("search")[0][:LOSS_WINDOWS] if uses & READ_B else None,
        }

    @cached_property
    def _calibration(self) -> Sequences:
        """Text A, which takes its time to be found and cut into tokens."""
        return calibration_windows(self.language_model, self.context)
