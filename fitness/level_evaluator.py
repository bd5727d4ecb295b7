"""Score level vectors with one resident model, doing only what changed: matrices rewritten, blocks run.

Whatever is left out, the numbers are those of masking every matrix and running the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.prefix import PrefixCache
from evoprune.fitness.resident_levels import Levels, ResidentLevels
from evoprune.fitness.samples import Samples, Sequences, first_batch, n_tokens
from evoprune.fitness.teacher import BATCH, Teacher, WindowLosses, linear_head, window_losses
from evoprune.metrics.errors import InvalidCandidate
from evoprune.metrics.records import Site


class LevelEvaluator:
    """A dense model that level vectors are tried on: sparsities in steps of 1/256 by site name, see `Levels`.

    Args:
        language_model: dense when it is handed over; its site weights are overwritten, `restore` brings them back.
        dense: safetensors file with the dense [out, in] weight of every site, by site name, in the model's dtype.
        database: of the same model.
        windows: of text; of samples each batch is one.
        teacher: of the same windows; None leaves out the KL.
        stride: the parent's hidden states are kept at the inputs of every so-many-th block.
        max_prefix_bytes: what these states may take; None sets no limit.

    Raises:
        InvalidInput: the database is of another model.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        dense: Path,
        database: Levels,
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
        self._resident = ResidentLevels(language_model, dense, database)
        self._n_blocks = len(language_model.blocks())
        self._parent = self._resident.complete({})

    @property
    def sites(self) -> list[Site]:
        """The prunable matrices, in model order."""
        return [bound.site for bound in self.language_model.sites]

    def evaluate(self, levels: Mapping[str, int], first: int, last: int) -> WindowLosses:
        """Losses of the model at `levels`; those blocks run that come after the first difference to the adopted parent.

        Args:
            levels: 0 to 256 by site name; a site left out is dense, one at 256 is gone, its bias too.
            first, last: the windows, `last` excluded. Those that `adopt` has seen in the same batches of `BATCH`,
                counted from `first`, are quicker.

        Returns:
            [last - first] values each; the fitness is the mean of ``kl``.

        Raises:
            InvalidInput: a level outside its range, or an unknown site; nothing has changed then.
            InvalidCandidate: NONFINITE, a loss is.
        """
        return self._losses(self._resident.complete(levels), first, last, remember=())

    def adopt(self, levels: Mapping[str, int], first: int, last: int) -> WindowLosses:
        """`evaluate`, and from now on `levels` are the parent, whose hidden states on these windows are remembered.

        What is remembered of other windows of the same parent is kept, what is remembered of another is forgotten.
        """
        complete = self._resident.complete(levels)
        if complete != self._parent:
            self.prefix.clear()
            self._parent = complete
        remember = self.prefix.spread(n_tokens(self.windows[first:last]))
        return self._losses(complete, first, last, remember)

    def apply(self, levels: Mapping[str, int]) -> None:
        """Leave the model at `levels`, for whoever wants to run it.

        Raises:
            InvalidInput: see `evaluate`.
        """
        self._resident.apply(levels)

    def restore(self) -> None:
        """Write the dense weights back; the parent and what is remembered of it stay.

        Raises:
            AuditFailed: the restored model differs from the one that was handed over.
        """
        self._resident.restore()

    def _losses(self, levels: dict[str, int], first: int, last: int, remember: tuple[int, ...]) -> WindowLosses:
        self._resident.apply(levels)
        block = self._first_difference(levels)
        parts = []
        for begin in range(first, last, self._per_pass):
            batch = begin, min(begin + self._per_pass, last)
            teacher = None if self.teacher is None else self.teacher[slice(*batch)]
            with self.prefix.started(batch, block, remember):
                parts.append(window_losses(self.language_model.model, self.head, self.windows[slice(*batch)], teacher))
        nll = torch.cat([part.nll for part in parts])
        kl = None if self.teacher is None else torch.cat([part.kl for part in parts if part.kl is not None])
        if not all(torch.isfinite(values).all() for values in (nll, kl) if values is not None):
            raise InvalidCandidate("NONFINITE", "the pruned model's loss is not finite")
        return WindowLosses(kl, nll)

    def _first_difference(self, levels: Mapping[str, int]) -> int:
        """The first block in which `levels` and the parent's differ; the number of blocks if they do not."""
        differing = (site.block for site in self.sites if levels[site.name] != self._parent[site.name])
        return min(differing, default=self._n_blocks)
