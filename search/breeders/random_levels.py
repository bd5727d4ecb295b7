"""Levels drawn at random, whatever was found before: the control."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from evoprune.search.breeders import BREEDERS, BreederPlugin, Plain
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace

_SPREAD = 0.15
"""Standard deviation of sparsities around that of the whole model: the range that published allocators use."""
_ATTEMPTS_PER_CHILD = 20


class RandomLevels(Plain):
    """Random search: every matrix draws its sparsity around the model's, or every part its rank; the budget is met."""

    origin = "random"
    redraw = True

    def __init__(self, space: LevelSpace, seed: int) -> None:
        self._space = space

    def children(self, parent: Genome, count: int, rng: random.Random) -> Sequence[Genome]:
        space = self._space
        mean = space.budget / sum(site.weights for site in space.sites)
        found: dict[Genome, None] = {}
        for _ in range(_ATTEMPTS_PER_CHILD * count):
            if len(found) == count:
                break
            if space.only:
                wanted = space.even(mean, rng)
            else:
                wanted = [min(max(rng.gauss(mean, _SPREAD), 0.0), 1.0) for _ in space.sites]
            made = space.near(wanted, rng)
            if made != parent:
                found[made] = None
        return list(found)

    def tell(self, genome: Genome, kl: float | None) -> None:
        """Nothing is learned."""

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        """There is nothing to restore."""


BREEDERS.add("random", BreederPlugin("independent draws around the model's sparsity", RandomLevels))
