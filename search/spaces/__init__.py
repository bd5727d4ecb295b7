"""Search spaces: what varies, and how it is drawn, changed and mixed."""

from __future__ import annotations

import random
from typing import Generic, Protocol, TypeVar

from evoprune.metrics.registry import Registry

G = TypeVar("G")


class SearchSpace(Protocol, Generic[G]):
    """A set of genomes. Every draw comes from the generator that is passed in."""

    def sample(self, rng: random.Random) -> G:
        """A genome drawn at random."""

    def mutate(self, genome: G, rng: random.Random) -> tuple[G, str]:
        """A changed copy, and the name of the change."""

    def crossover(self, first: G, second: G, rng: random.Random) -> tuple[G, str]:
        """A mixture of two genomes, and the name of how it was made."""

    def key(self, genome: G) -> str:
        """Equal for genomes that are known to be equivalent without evaluating them."""


# Each search has its own space, and no option chooses another.
SPACES: Registry[type] = Registry("space", "evoprune.search.spaces", extensible=False)
