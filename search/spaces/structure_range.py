"""Shapes of models between two budgets: what a search for a front of shapes is made of."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from copy import copy
from typing import Any

from evoprune.fitness.unit_costs import UnitCosts
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import removed_count
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.parts import PartSpace
from evoprune.search.spaces.ranges import Ranged
from evoprune.search.spaces.structure import StructureSpace


class StructureRange(Ranged, StructureSpace):
    """Genomes of shapes that remove between two fractions of what heads and MLPs cost; children stand on rungs.

    Args:
        costs: of every block, but no times: budgets are of what follows from shapes alone.
        fractions: least and most that goes, in (0, 1).
        options: see `StructureSpace`.

    Raises:
        InvalidInput: see `StructureSpace`.
    """

    def __init__(self, costs: UnitCosts, fractions: tuple[float, float], **options: Any) -> None:
        super().__init__(costs, sum(fractions) / 2, **options)
        # The genes are the same at all budgets, and what cannot be is refused at the highest.
        self._one_budget = StructureSpace(costs, fractions[1], **options)
        self.whole = costs.dense
        self.least, self.most = (removed_count(fraction, costs.dense) for fraction in fractions)

    def at(self, fraction: float) -> StructureSpace:
        """The space of one budget, whose genomes are of this range if the budget is."""
        found = copy(self._one_budget)
        found.fraction, found.budget = fraction, removed_count(fraction, self.whole)
        return found

    def holds(self, genome: Genome) -> bool:
        return self.least <= self.removed(genome) <= self.most + self.tolerance

    def crossed(self, first: Genome, second: Genome, rng: random.Random) -> Genome | None:
        return PartSpace.crossed(self, first, second, rng)

    def _moved(self, genome: Genome, rng: random.Random) -> Genome | None:
        fraction = rng.uniform(self.least, self.most) / self.whole
        try:
            found = self.at(fraction).repaired(genome, rng)
        except InvalidInput:  # where units are few, not every budget can be met
            return None
        settled = self._settled([*found], rng, 0)
        return None if settled == genome else settled

    def _step(self, options: list[int], sign: int, rng: random.Random, spans: Sequence[int]) -> None:
        gone = self._dropped(options)
        ways = [
            (at, way)
            for at, gene in enumerate(self.parts)
            if at not in gone
            for way in gene.ways(gene.rung(gene.removed[options[at]]), losing=sign > 0)
        ]
        if ways:
            at, way = rng.choice(ways)
            options[at] = way[min(rng.choice(spans), len(way)) - 1]

    def _settled(
        self,
        options: list[int],
        rng: random.Random,
        most: int,
        first: Collection[int] = (),
        never: Collection[int] = (),
        between: Sequence[int] = (),
    ) -> Genome | None:
        self._to_rungs(options)
        return super()._settled(options, rng, most, first, never, between)
