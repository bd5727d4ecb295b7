"""Score candidates with one resident model, doing only what changed: weights rewritten, blocks run.

Whatever is left out, the numbers are those of making the whole model anew and running it from the first block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.prefix import PrefixCache
from evoprune.fitness.samples import Samples, Sequences, first_batch, n_tokens
from evoprune.fitness.teacher import BATCH, Teacher, WindowLosses, linear_head, window_losses
from evoprune.metrics.errors import InvalidCandidate

Given = TypeVar("Given", contravariant=True)
"""A candidate as jobs spell it."""
Whole = TypeVar("Whole")
"""A candidate of which every part is said and checked."""


class ResidentEvaluator(ABC, Generic[Given, Whole]):
    """A dense model that candidates are tried on.

    Args:
        language_model: dense when it is handed over; it is changed, `restore` brings it back.
        windows: of text; of samples each batch is one.
        teacher: of the same windows; None leaves out the KL.
        stride: the parent's hidden states are kept at the inputs of every so-many-th block.
        max_prefix_bytes: what these states may take; None sets no limit.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        windows: Sequences,
        teacher: Teacher | None,
        *,
        stride: int = 1,
        max_prefix_bytes: int | None = None,
    ) -> None:
        self.language_model = language_model
        self.windows = windows
        self.teacher = teacher
        self._per_pass = 1 if isinstance(windows, Samples) else BATCH
        self.head = linear_head(language_model.model, windows)
        self.prefix = PrefixCache(language_model, first_batch(windows), stride=stride, max_bytes=max_prefix_bytes)
        self._n_blocks = len(language_model.blocks())
        self._parent: Whole | None = None

    @abstractmethod
    def complete(self, given: Given) -> Whole:
        """Every part of a candidate, checked; nothing has changed yet.

        Raises:
            InvalidInput: it is no candidate of this model.
        """

    @abstractmethod
    def apply(self, given: Given) -> None:
        """Leave the model as the candidate, for whoever wants to run it.

        Raises:
            InvalidInput: see `complete`.
        """

    @abstractmethod
    def restore(self) -> None:
        """Make the model dense again; the parent and what is remembered of it stay.

        Raises:
            AuditFailed: the restored model differs from the one that was handed over.
        """

    @abstractmethod
    def differing(self, one: Whole, other: Whole) -> int | None:
        """The first block in which two candidates differ; None if they do not."""

    def evaluate(self, given: Given, first: int, last: int) -> WindowLosses:
        """Losses of a candidate; those blocks run that come after the first difference to the adopted parent.

        Args:
            given: the candidate.
            first, last: the windows, `last` excluded. Those that `adopt` has seen in the same batches of `BATCH`,
                counted from `first`, are quicker.

        Returns:
            [last - first] values each; the fitness is the mean of ``kl``.

        Raises:
            InvalidInput: see `complete`.
            InvalidCandidate: NONFINITE, a loss is.
        """
        return self._losses(given, self.complete(given), first, last, remember=())

    def adopt(self, given: Given, first: int, last: int) -> WindowLosses:
        """`evaluate`, and from now on `given` is the parent, whose hidden states on these windows are remembered.

        What is remembered of other windows of the same parent is kept, what is remembered of another is forgotten.
        """
        whole = self.complete(given)
        if whole != self._parent:
            self.prefix.clear()
            self._parent = whole
        remember = self.prefix.spread(n_tokens(self.windows[first:last]))
        return self._losses(given, whole, first, last, remember)

    def _losses(self, given: Given, whole: Whole, first: int, last: int, remember: tuple[int, ...]) -> WindowLosses:
        self.apply(given)
        differing = 0 if self._parent is None else self.differing(whole, self._parent)
        block = self._n_blocks if differing is None else differing
        parts = []
        for begin in range(first, last, self._per_pass):
            batch = begin, min(begin + self._per_pass, last)
            teacher = None if self.teacher is None else self.teacher[slice(*batch)]
            with self.prefix.started(batch, block, remember):
                parts.append(window_losses(self.language_model.model, self.head, self.windows[slice(*batch)], teacher))
        nll = torch.cat([part.nll for part in parts])
        kl = None if self.teacher is None else torch.cat([part.kl for part in parts if part.kl is not None])
        return finite(WindowLosses(kl, nll))


def finite(losses: WindowLosses) -> WindowLosses:
    """These losses of a candidate.

    Raises:
        InvalidCandidate: NONFINITE, one is not.
    """
    if not all(torch.isfinite(values).all() for values in (losses.nll, losses.kl) if values is not None):
        raise InvalidCandidate("NONFINITE", "the pruned model's loss is not finite")
    return losses
