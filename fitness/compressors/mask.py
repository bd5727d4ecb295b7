"""The mask alone: removed weights become zero, kept weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal
from evoprune.metrics.records import Group


@dataclass(frozen=True)
class MaskOnly:
    """Zero what the mask removes and change nothing else."""

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_criterion: ClassVar[bool] = True
    keeps_mask: ClassVar[bool] = True
    keeps_weights: ClassVar[bool] = True
    groups: ClassVar[frozenset[Group]] = frozenset()
    cost: ClassVar[Cost] = "mask"
    source: ClassVar[str] = "that of the criterion"

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for goal in goals:
            assert goal.mask is not None
            yield weight.masked_fill(~goal.mask, 0), goal.mask  # a product would keep NaN and write -0


COMPRESSORS.add("mask", MaskOnly())
