"""Level switches of the present parent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from evoprune.search.breeders import BREEDERS, BreederPlugin, Plain
from evoprune.search.spaces.ladder import Genome, LadderSpace

_ATTEMPTS_PER_CHILD = 20


class Switches(Plain):
    """Evolution: one to three matrices or parts lose more, as many lose less, and the best child is the next parent.

    Source: Sieberling et al. 2025 (EvoPress, arXiv:2410.14649), section 3.
    """

    origin = "switch"
    redraw = True
    crosses = True

    def __init__(self, space: LadderSpace, seed: int) -> None:
        self._space = space

    def children(self, parent: Genome, count: int, rng: random.Random) -> Sequence[Genome]:
        found: dict[Genome, None] = {}
        for _ in range(_ATTEMPTS_PER_CHILD * count):
            if len(found) == count:
                break
            made = self._space.switched(parent, rng, self._space.spans)
            if made is not None and made != parent:
                found[made] = None
        return list(found)

    def tell(self, genome: Genome, kl: float | None) -> None:
        """What it needs to know is who the next parent is."""

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        """There is nothing to restore."""


BREEDERS.add(
    "evolution",
    BreederPlugin("one to three matrices or parts lose more, as many lose less; the best child is next", Switches),
)
