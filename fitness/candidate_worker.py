"""What workers share that measure candidates beside their parent: when the parent's own pass is worth remembering."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.model_worker import ModelWorker, heldout_answer
from evoprune.fitness.resident_evaluator import ResidentEvaluator
from evoprune.fitness.teacher import window_losses
from evoprune.metrics.errors import InvalidCandidate

MAX_PREFIX_BYTES = 1 << 30
"""What the parent's remembered hidden states may take in one worker."""

WORTHWHILE = 6
"""Candidates of a worker on one text that save more than the pass of their parent costs."""

# Restore the dense model and compare its checksum once in so many evaluations.
_CHECK_EVERY = 200

Evaluator = TypeVar("Evaluator", bound=ResidentEvaluator[Any, Any])


class CandidateWorker(ModelWorker, Generic[Evaluator]):
    """A worker that keeps an evaluator, and what it remembers of the present parent."""

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self._kept: tuple[Any, Evaluator] | None = None
        self._text: tuple[Any, int, int] | None = None
        self._adopted = False
        self._candidates: Counter[int] = Counter()
        self._evaluations = 0

    @abstractmethod
    def evaluator(self, payload: Mapping[str, Any]) -> Evaluator:
        """The resident model with all that a job names; kept until one names something else."""

    @abstractmethod
    def candidate(self, spelled: Any) -> Any:
        """A candidate as the evaluator takes it, from what a job says."""

    def _measured(self, payload: dict[str, Any], spelled: Any) -> dict[str, Any]:
        """``kl`` and ``nll`` of a candidate on the windows that a job names, and the standard error of the first."""
        evaluator = self.evaluator(payload)
        self._evaluations += 1
        if self._evaluations % _CHECK_EVERY == 0:
            evaluator.restore()
        parent, first, last = payload["parent"], payload["first"], payload["last"]
        adopting = self._adopts(spelled, parent, first, last)
        if adopting:
            # Text before this one is drawn no more, so what is remembered of it would only take the room.
            evaluator.prefix.clear()
            self._adopted = True
        if adopting and spelled == parent:
            losses = evaluator.adopt(self.candidate(parent), first, last)
        else:
            if adopting:
                with suppress(InvalidCandidate):
                    evaluator.adopt(self.candidate(parent), first, last)
            losses = evaluator.evaluate(self.candidate(spelled), first, last)
        assert losses.kl is not None
        spread = (losses.kl.std() / len(losses.kl) ** 0.5).item() if len(losses.kl) > 1 else 0.0
        return {"kl": losses.kl.mean().item(), "nll": losses.nll.mean().item(), "stderr": spread}

    def _adopts(self, spelled: Any, parent: Any, first: int, last: int) -> bool:
        """Whether the parent's own pass over this text is to be remembered now.

        It is where the parent itself is asked about. Else it costs a pass, which candidates have to save: so it is made
        for the first of them if the last text of this length had enough.
        """
        windows, text = last - first, (parent, first, last)
        worthwhile = False
        if text != self._text:
            worthwhile = self._candidates.get(windows, WORTHWHILE) >= WORTHWHILE
            self._text, self._adopted, self._candidates[windows] = text, False, 0
        self._candidates[windows] += 1
        return not self._adopted and (spelled == parent or worthwhile)

    def _heldout_of(self, payload: dict[str, Any], spelled: Any | None) -> dict[str, Any]:
        """Losses of a candidate on text C, by window; None is the dense model."""
        evaluator = self.evaluator(payload)
        windows, teacher = self.prepared(payload["prepared"]).text("heldout")
        if spelled is None:
            evaluator.restore()
        else:
            evaluator.apply(self.candidate(spelled))
        return heldout_answer(window_losses(self.language_model.model, evaluator.head, windows, teacher), windows)

    def _restore(self) -> None:
        if self._kept is not None:
            self._kept[1].restore()
