"""Levels of matrices: sparsities in steps of 1/256, one for each matrix, each block or each kind of matrix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.ranks import LEVELS
from evoprune.metrics.records import Site, removed_count
from evoprune.search.spaces.ladder import Gene, Genome, LadderSpace

Granularity = Literal["matrix", "block", "kind"]


class LevelSpace(LadderSpace):
    """Genomes of levels that remove `sparsity` of all weights.

    Args:
        sites: the matrices, in model order.
        sparsity: fraction of all their weights that goes, in (0, 1).
        granularity: what has a level of its own.

    Raises:
        InvalidInput: the budget is beyond the highest level, or there is no matrix.
    """

    def __init__(self, sites: Sequence[Site], sparsity: float, granularity: Granularity = "matrix") -> None:
        self.sites = tuple(sites)
        groups: dict[str, list[int]] = {}
        for at, site in enumerate(self.sites):
            name = {"matrix": site.name, "block": f"block {site.block}", "kind": site.kind}[granularity]
            groups.setdefault(name, []).append(at)
        self._groups = list(groups.values())
        genes = []
        for name, members in groups.items():
            matrices = [self.sites[at] for at in members]
            removed = tuple(
                sum(site.out_features * removed_count(level / LEVELS, site.in_features) for site in matrices)
                for level in range(LEVELS)
            )
            genes.append(Gene(name, removed, min(site.block for site in matrices)))
        super().__init__(genes, removed_count(sparsity, sum(site.weights for site in self.sites)))

    @property
    def matrices(self) -> list[list[str]]:
        """Names of the matrices of each gene."""
        return [[self.sites[at].name for at in members] for members in self._groups]

    def levels(self, genome: Genome) -> list[int]:
        """The level of every matrix, in model order."""
        found = [0] * len(self.sites)
        for members, level in zip(self._groups, genome, strict=True):
            for at in members:
                found[at] = level
        return found

    def near(self, sparsities: Sequence[float], rng: random.Random) -> Genome:
        """A genome near to these sparsities that meets the budget.

        Args:
            sparsities: of every matrix, in model order; matrices that share a level get their mean, by weights.

        Raises:
            InvalidInput: see `nearest`.
        """
        if len(sparsities) != len(self.sites):
            raise InvalidInput(f"{len(sparsities)} sparsities for {len(self.sites)} matrices")
        removed = [sparsity * site.weights for sparsity, site in zip(sparsities, self.sites, strict=True)]
        return self.nearest([sum(removed[at] for at in members) for members in self._groups], rng)
