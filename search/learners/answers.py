"""Losses of a step's trials as arrays, with what to do where a loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evoprune.metrics.errors import EvopruneError
from evoprune.search.learners import Answer, Diagnostics
from evoprune.search.policies import Floats, Ints


@dataclass(frozen=True, eq=False)
class Told:
    """The samples of a step that can be used.

    Attributes:
        used: [K'] int, which of the samples these are, in whole blocks.
        values: [K'] float64, their losses; a ceiling in place of one that is not finite.
        windows: [K', windows] float64; None if they are not known of all.
        reference: loss of the reference mask.
        failed: how many trials had no finite loss.
        enough: at least two samples had.
    """

    used: Ints
    values: Floats
    windows: Floats | None
    reference: float | None
    failed: int
    enough: bool

    def diagnostics(self) -> Diagnostics:
        """Mean and standard deviation of the losses, the reference's loss, how many were not finite."""
        count = len(self.values)
        return {
            "loss": float(self.values.mean()) if count else None,
            "loss_std": float(self.values.std(ddof=1)) if count > 1 else None,
            "reference": self.reference,
            "failed": float(self.failed),
        }


def told(answers: Sequence[Answer], samples: int, ceiling: float | None, block: int = 1, least: int = 2) -> Told:
    """What can be used of a step's answers.

    Args:
        answers: of the samples, then of the reference mask if that was asked for.
        samples: how many samples there are.
        ceiling: takes the place of a loss that is not finite; if None, the sample is left out, with its block.
        block: samples in blocks of so many stand or fall together.
        least: samples without which there is nothing to learn.
    """
    if len(answers) not in (samples, samples + 1):
        raise EvopruneError(f"{len(answers)} answers to {samples} masks")
    losses = [finite(answer.loss) for answer in answers]
    known = sum(loss is not None for loss in losses[:samples])
    losses = [ceiling if loss is None else loss for loss in losses]
    usable = np.array([loss is not None for loss in losses[:samples]]).reshape(-1, block).all(axis=1).repeat(block)
    used = np.flatnonzero(usable)
    rows = [answers[index].windows for index in used.tolist()]
    whole = bool(rows) and all(row is not None and len(row) == len(rows[0] or ()) for row in rows)
    windows = np.array(rows, dtype=np.float64) if whole else None
    return Told(
        used,
        np.array([losses[index] for index in used], dtype=np.float64),
        windows if windows is not None and bool(np.isfinite(windows).all()) else None,
        losses[samples] if len(losses) > samples else None,
        sum(finite(answer.loss) is None for answer in answers),
        known >= 2 and len(used) >= least,
    )


def finite(loss: float | None) -> float | None:
    """The loss, None if it is none or not finite."""
    return float(loss) if loss is not None and math.isfinite(loss) else None
