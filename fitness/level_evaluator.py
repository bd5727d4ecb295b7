"""Score level vectors with one resident model: matrices rewritten and blocks run only where levels changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.resident_evaluator import ResidentEvaluator
from evoprune.fitness.resident_levels import Levels, ResidentLevels
from evoprune.fitness.samples import Sequences
from evoprune.fitness.teacher import Teacher
from evoprune.metrics.records import Site


class LevelEvaluator(ResidentEvaluator[Mapping[str, int], dict[str, int]]):
    """A dense model that level vectors are tried on: sparsities in steps of 1/256 by site name, see `Levels`.

    A site that is left out is dense, one at 256 is gone, its bias too.

    Args:
        language_model, windows, teacher, stride, max_prefix_bytes: see `ResidentEvaluator`.
        dense: safetensors file with the dense [out, in] weight of every site, by site name, in the model's dtype.
        database: of the same model.

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
        super().__init__(language_model, windows, teacher, stride=stride, max_prefix_bytes=max_prefix_bytes)
        self._resident = ResidentLevels(language_model, dense, database)

    @property
    def sites(self) -> list[Site]:
        """The prunable matrices, in model order."""
        return [bound.site for bound in self.language_model.sites]

    def complete(self, given: Mapping[str, int]) -> dict[str, int]:
        return self._resident.complete(given)

    def apply(self, given: Mapping[str, int]) -> None:
        self._resident.apply(given)

    def restore(self) -> None:
        self._resident.restore()

    def differing(self, one: dict[str, int], other: dict[str, int]) -> int | None:
        return min((site.block for site in self.sites if one[site.name] != other[site.name]), default=None)
