"""Masks of a policy search as trials of the board."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from evoprune.search.engine.trial_record import Range, TrialRecord
from evoprune.search.result import window_mean
from evoprune.search.trials import Trials


class PolicyTrials(Trials):
    """One trial for each mask that was measured.

    Its value is the loss on the text that it was measured on, so that masks of one stage compare, and of stage ``step``
    those of one step. The front has the modes that were the best so far.
    """

    ranges: ClassVar[Mapping[str, Range]] = {
        "step": (0, 100_000),
        "role": ["sample", "reference", "mode"],
        "stage": ["initialisation", "step", "validation", "final"],
    }

    def __init__(self) -> None:
        super().__init__(1)
        self._best: float | None = None

    def take(self, line: Mapping[str, Any], telemetry: Mapping[str, Any] | None = None) -> Sequence[TrialRecord]:
        loss, times = line["loss"], telemetry or {}
        # Masks of a step are measured on other text than modes, which alone make the front.
        leads = loss is not None and line["role"] == "mode" and line["stage"] != "final"
        leads = leads and (self._best is None or loss < self._best)
        if leads:
            self._best = loss
        return (
            TrialRecord(
                state="fail" if loss is None else "complete",
                value=loss,
                rungs={} if loss is None else {0: loss},
                attributes={
                    "birth": line["birth"],
                    "mask": line["mask"],
                    "cost": line["step"],
                    "reason": line["reason"],
                },
                descriptors={name: line[name] for name in self.ranges},
                front=leads,
                started=times.get("started"),
                finished=times.get("finished"),
            ),
        )

    def reached(self, line: Mapping[str, Any]) -> Iterable[int]:
        return (0,)

    def measured(self, values: Mapping[str, Any]) -> tuple[float, ...]:
        kl, nll = values.get("kl"), values.get("nll")
        # Held-out losses, which have no line, are of further tokens, and say how many.
        if kl is None or nll is None or "tokens" in values:
            return ()
        # A line has the means over the windows of an outcome.
        return (kl, nll) if isinstance(kl, float) else (window_mean(kl), window_mean(nll))
