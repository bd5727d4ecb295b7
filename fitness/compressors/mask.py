"""The mask alone: removed weights become zero, kept weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Goal


class MaskOnly:
    """Zero what the mask removes and change nothing else."""

    needs: frozenset[str] = frozenset()
    reads_criterion = True
    keeps_mask = True
    keeps_weights = True

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for goal in goals:
            assert goal.mask is not None
            yield weight.masked_fill(~goal.mask, 0), goal.mask  # a product would keep NaN and write -0


COMPRESSORS.add("mask", MaskOnly())
