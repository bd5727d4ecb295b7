"""The mask alone: removed weights become zero, kept weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS


class MaskOnly:
    """Zero what the mask removes and change nothing else."""

    needs: frozenset[str] = frozenset()
    keeps_mask = True

    def compress(self, weight: Tensor, mask: Tensor, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return weight.masked_fill(~mask, 0), mask  # a product would keep NaN and write -0


COMPRESSORS.add("mask", MaskOnly())
