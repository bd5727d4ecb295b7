"""Recovery as `prune` takes it: what was asked for, checked before long work, done, measured, and said in words."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from evoprune.calibration import HELD_OUT_TOKENS, Progress, default_window
from evoprune.fitness.card import public_name
from evoprune.fitness.checkpoint import check_out_dir
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.recoveries import Recovery, check_packages, configured
from evoprune.fitness.recovery import LOSSES, check_folder, recover, remove_folder, training_windows
from evoprune.fitness.recovery_checkpoint import last_checkpoint
from evoprune.fitness.text import token_windows, training_side
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.metrics.parameters import check_choice, parameters_of
from evoprune.outcomes import MeasuredRecovery, measured_summary

DEFAULT_TOKENS = 300_000


@dataclass(frozen=True)
class GivenRecovery:
    """A recovery that was asked for.

    Attributes:
        name: one of `RECOVERIES`.
        tokens: budget.
        loss: one of `LOSSES`.
        parameters: of the recovery.
        source: text that it learns from, and, another side of it, that it is measured on.
        seed: of all that is drawn.
        out: where the checkpoint will be; None if none was asked for, and then an interrupted training is lost.

    Raises:
        InvalidInput: something of it cannot be, or needs a package that is not there.
    """

    name: str
    tokens: int
    loss: str
    parameters: Mapping[str, Any]
    source: str
    seed: int
    out: str | Path | None

    def __post_init__(self) -> None:
        check_packages(self.name, self.recovery)
        check_choice("loss of a recovery", self.loss, LOSSES)
        if self.tokens < 1:
            raise InvalidInput(f"{self.tokens} tokens of recovery are too few: give such as {DEFAULT_TOKENS}")
        if self.folder is not None:
            check_folder(self.folder)

    @cached_property
    def recovery(self) -> Recovery:
        """The plug-in with these parameters."""
        return configured(self.name, self.parameters)

    def started(self, language_model: LanguageModel) -> Begun:
        """What the recovery needs of the dense model, before that is pruned.

        Raises:
            InvalidInput: the budget holds no window of what the model reads, or the text is too short.
        """
        windows = training_windows(language_model, self.source, self.tokens, self.seed)
        width = default_window(language_model, None)
        held_out = token_windows(language_model.tokenizer, self.source, "C", window=width)
        dense = deepcopy(language_model.model) if self.loss == "distill" else None
        return Begun(self, windows, held_out[: max(HELD_OUT_TOKENS // width, 1)], dense)

    def recipe(self, learning_rate: float) -> dict[str, Any]:
        """What a checkpoint says of how it was recovered.

        Args:
            learning_rate: the one that it came to.
        """
        return {
            "method": self.name,
            "source": self.recovery.source,
            "parameters": parameters_of(self.recovery) | {"learning_rate": learning_rate},
            "loss": self.loss,
            "tokens": self.tokens,
            "text": public_name(self.source),
            "side": training_side(self.source),
            "seed": self.seed,
        }

    def finish(self) -> None:
        """Delete the checkpoints of the training, now that its result is on the disk."""
        if self.folder is not None:
            remove_folder(self.folder)

    @cached_property
    def folder(self) -> Path | None:
        """Where checkpoints of the training go: beside the folder that will be renamed into place."""
        if self.out is None:
            return None
        out = check_out_dir(self.out)
        return out.with_name(f"{out.name}.recovery")


@dataclass(frozen=True)
class Begun:
    """A recovery whose model is about to be pruned.

    Attributes:
        given: what was asked for.
        windows: what it learns from.
        held_out: what it is measured on.
        dense: the model to learn from; None where it learns the text.
    """

    given: GivenRecovery
    windows: Tensor
    held_out: Tensor
    dense: PreTrainedModel | None

    def run(self, language_model: LanguageModel, progress: Progress) -> MeasuredRecovery:
        """Train the pruned model, in place, and measure it before and after.

        Raises:
            Interrupted: a signal came, and there is a checkpoint to go on from.
        """
        before = self._measured(language_model, "before recovery", progress)
        what = f"recovering by {self.given.name} on {self.windows.numel():,} tokens"
        folder = self.given.folder
        try:
            done = recover(
                language_model,
                self.given.recovery,
                self.windows,
                dense=self.dense,
                seed=self.given.seed,
                folder=folder,
                progress=lambda step, steps: progress(what, step, steps),
            )
        except KeyboardInterrupt:
            if folder is None or last_checkpoint(folder) is None:
                raise
            raise Interrupted(f"stopped; the same command goes on from the last checkpoint in {folder}") from None
        after = self._measured(language_model, "after recovery", progress)
        return MeasuredRecovery(self.given.name, self.given.loss, done, before, after)

    def _measured(self, language_model: LanguageModel, when: str, progress: Progress) -> dict[str, Any]:
        what = f"measuring on {self.held_out.numel():,} tokens {when}"
        progress(what, 0, 1)
        found = measured_summary(language_model, self.held_out, self.dense)
        progress(what, 1, 1)
        return found


def given_recovery(
    name: str | None,
    tokens: int | None,
    loss: str | None,
    parameters: Mapping[str, Any] | None,
    *,
    source: str,
    seed: int,
    out: str | Path | None,
) -> GivenRecovery | None:
    """The recovery that was asked for, if one was.

    Raises:
        InvalidInput: there is none, and something says how it shall be; or `GivenRecovery` refuses.
    """
    if name is not None:
        budget = DEFAULT_TOKENS if tokens is None else tokens
        return GivenRecovery(name, budget, loss or LOSSES[0], parameters or {}, source, seed, out)
    beside = {"tokens": tokens, "loss": loss, "parameters": parameters or None}
    for what, value in beside.items():
        if value is not None:
            raise InvalidInput(f"recovery {what} without a recovery: give --recovery too, such as lora")
    return None
