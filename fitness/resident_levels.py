"""The levels of a resident model: a change of levels rewrites the matrices that it concerns and no others."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from evoprune.fitness.levels import Write
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.resident import ResidentWeights
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.ranks import GONE


class Levels(Protocol):
    """A level database: `LevelDatabase` of ranks, or `StoredLevels` of weights."""

    @property
    def name(self) -> str:
        """Names the content, on every node."""

    @property
    def manifest(self) -> dict[str, Any]:
        """What it was built from; its ``fingerprint`` is the model's."""

    def check(self, site: str, level: int) -> None:
        """Refuse a level that there is not.

        Raises:
            InvalidInput: says which there are.
        """

    def opened(self) -> AbstractContextManager[Write]:
        """What brings a matrix to a level between 0 and 256."""


class ResidentLevels:
    """The levels of a resident model: a change of levels rewrites the matrices that it concerns and no others.

    Args:
        language_model: dense when it is handed over; its site weights are overwritten.
        dense: as `ResidentWeights` takes it.
        database: of the same model.

    Raises:
        InvalidInput: the database is of another model.
    """

    def __init__(self, language_model: LanguageModel, dense: Path, database: Levels) -> None:
        if database.manifest["fingerprint"] != language_model.fingerprint:
            raise InvalidInput(
                f"the level database {database.name} is of the model with fingerprint "
                f"{database.manifest['fingerprint'][:12]}, not of the one with {language_model.fingerprint[:12]}"
            )
        self._bound = {bound.site.name: bound for bound in language_model.sites}
        self._weights = ResidentWeights(language_model, dense)
        self._database = database
        self._levels: dict[str, int | None] = dict.fromkeys(self._bound, 0)

    def complete(self, levels: Mapping[str, int]) -> dict[str, int]:
        """The level of every site in model order: those that `levels` leaves out are dense, at level 0.

        Raises:
            InvalidInput: a level that the database does not have, or a site that the model does not.
        """
        for name, level in levels.items():
            if name not in self._bound:
                raise InvalidInput(f"no site {name[:80]!r} in this model; the first is {next(iter(self._bound))!r}")
            self._database.check(name, level)
        return {name: levels.get(name, 0) for name in self._bound}

    @torch.no_grad()
    def apply(self, levels: Mapping[str, int]) -> int:
        """Bring the model to `levels`, sites left out to the dense weight; the number of matrices rewritten.

        Raises:
            InvalidInput: see `complete`; nothing is changed then.
        """
        changed = {name: level for name, level in self.complete(levels).items() if level != self._levels[name]}
        with self._database.opened() as write:
            for name, level in changed.items():
                bound, before = self._bound[name], self._levels[name]
                # An interrupted write leaves a matrix that is at no level.
                self._levels[name] = None
                if level == GONE:
                    self._weights.empty(bound)
                elif level:
                    write(self._weights, bound, level)
                else:
                    self._weights.write_dense(bound)
                if level != GONE and before in (GONE, None):
                    self._weights.write_bias(bound)
                self._levels[name] = level
        return len(changed)

    def restore(self) -> None:
        """Bring every site to level 0, by writing the dense weights back.

        Raises:
            AuditFailed: the restored model differs from the one that was handed over.
        """
        self._levels = dict.fromkeys(self._bound, None)
        self._weights.restore()
        self._levels = dict.fromkeys(self._bound, 0)
