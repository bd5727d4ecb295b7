"""Genomes between two budgets: what a search for a front is made of; and levels of matrices as such."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Collection, Sequence
from copy import copy

from evoprune.metrics.allocation import repair
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.ranks import GONE
from evoprune.metrics.records import LEVELS, Site, removed_count
from evoprune.search.spaces.ladder import Genome, LadderSpace
from evoprune.search.spaces.levels import Droppable, Granularity, LevelSpace

# Where whole blocks or kinds share a level, few budgets are met exactly: to this part of all weights will do.
_NEAR_ENOUGH = 200

# Of mutations: what is good at one budget tells much about the next, and most is to be gained at one budget.
MOVE_SHARE = 0.3
UNBALANCED_SHARE = 0.2


class Ranged(LadderSpace):
    """To be mixed into a space of one budget: genomes that remove between two fractions of all that there is.

    Attributes:
        whole: what fractions are of: weights, or what heads and MLPs cost.
        least, most: what goes, of that.
    """

    whole: int
    least: int
    most: int

    @abstractmethod
    def _moved(self, genome: Genome, rng: random.Random) -> Genome | None:
        """Brought to another budget, drawn from the range; None where the draw leads to none."""

    @abstractmethod
    def _step(self, options: list[int], sign: int, rng: random.Random, spans: Sequence[int]) -> None:
        """One gene loses more if `sign` is above 0, else less; nothing where none can."""

    def sparsity_of(self, genome: Genome) -> float:
        """The fraction of all that goes."""
        return self.removed(genome) / self.whole

    def holds(self, genome: Genome) -> bool:
        """Whether it removes neither too little nor too much."""
        return self.least - self.tolerance <= self.removed(genome) <= self.most + self.tolerance

    def switched(self, genome: Genome, rng: random.Random, spans: Sequence[int]) -> Genome | None:
        """A genome after switches at its own budget, or after unbalanced ones, or moved to another budget."""
        draw = rng.random()
        if draw < MOVE_SHARE:
            return self._moved(genome, rng)
        if draw < MOVE_SHARE + UNBALANCED_SHARE:
            return self._unbalanced(genome, rng, spans)
        return super().switched(genome, rng, spans)

    @abstractmethod
    def crossed(self, first: Genome, second: Genome, rng: random.Random) -> Genome | None:
        """Some of one genome and the rest of another.

        Returns:
            None where the draw is one of the two, or leads out of the range.
        """

    def _unbalanced(self, genome: Genome, rng: random.Random, spans: Sequence[int]) -> Genome | None:
        """One to three times: a gene loses more, another less, or only one of the two, each by a draw of its own."""
        options = list(genome)
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            for sign in rng.choice(((1, -1), (1,), (-1,))):
                self._step(options, sign, rng, spans)
        if tuple(options) == genome:
            return None
        settled = self._settled(options, rng, 0)
        return None if settled == genome else settled

    def _settled(
        self,
        options: list[int],
        rng: random.Random,
        most: int,
        first: Collection[int] = (),
        never: Collection[int] = (),
        between: Sequence[int] = (),
    ) -> Genome | None:
        """The genome as it is, if it is within the range: there is no budget to move it to."""
        genome = tuple(options)
        return genome if self.holds(genome) else None


class RangeSpace(Ranged, LevelSpace):
    """Genomes of levels that remove between two fractions of all weights, to half a step of the smallest gene.

    Args:
        sites: the matrices, in model order.
        sparsities: least and most that goes, as fractions of all weights in (0, 1).
        granularity, drop, only, stored: see `LevelSpace`.

    Raises:
        InvalidInput: see `LevelSpace`.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        sparsities: tuple[float, float],
        granularity: Granularity = "matrix",
        drop: Droppable = "none",
        *,
        only: bool = False,
        stored: Sequence[int] | None = None,
    ) -> None:
        self._fixed = LevelSpace(sites, sparsities[1], granularity, drop, only=only, stored=stored)
        super().__init__(sites, sum(sparsities) / 2, granularity, drop, only=only, stored=stored)
        self.whole = sum(site.weights for site in self.sites)
        self.least, self.most = (removed_count(sparsity, self.whole) for sparsity in sparsities)

    def near_budget(self, sparsities: Sequence[float], sparsity: float, rng: random.Random) -> Genome:
        """A genome near to these sparsities that removes `sparsity` of all weights: exactly, or to half a per cent.

        Args:
            sparsities: of every matrix, in model order.
            sparsity: within the range.

        Raises:
            InvalidInput: none is found, as where a few parts can only be dropped as a whole.
        """
        fixed = copy(self._fixed)
        fixed.budget = removed_count(sparsity, self.whole)
        try:
            return fixed.near(sparsities, rng)
        except InvalidInput:
            fixed.tolerance = max(fixed.tolerance, self.whole // _NEAR_ENOUGH)
            found = fixed.near(sparsities, rng)
        if not self.holds(found):
            raise InvalidInput(f"a sparsity of {self.sparsity_of(found):.4f} is outside the range")
        return found

    def _moved(self, genome: Genome, rng: random.Random) -> Genome | None:
        """Brought to another budget, drawn from the range: matrices move alike, or some parts go or come back."""
        sparsity = rng.uniform(self.least, self.most) / self.whole
        levels = self.levels(genome)
        asked = [level / LEVELS for level in levels]
        try:
            if self.only:
                chance = self.even(sparsity, rng)
                asked = [gone + share for gone, share in zip(asked, chance, strict=True)]
            else:
                there = [at for at, level in enumerate(levels) if level != GONE]
                sites = [self.sites[at] for at in there]
                weights = sum(site.weights for site in sites)
                share = (sparsity * self.whole - (self.whole - weights)) / max(weights, 1)
                for at, moved in zip(there, repair([asked[at] for at in there], sites, share), strict=True):
                    asked[at] = moved
            found = self.near_budget(asked, sparsity, rng)
        except InvalidInput:  # what is gone is too much for this budget
            return None
        return None if found == genome else found

    def _step(self, options: list[int], sign: int, rng: random.Random, spans: Sequence[int]) -> None:
        movable = [
            at
            for at, gene in enumerate(self.genes)
            if (gene.removed[options[at]] < gene.removed[-1] if sign > 0 else gene.removed[options[at]] > 0)
        ]
        if movable:
            self._move(options, rng.choice(movable), sign * rng.choice(spans))

    def crossed(self, first: Genome, second: Genome, rng: random.Random) -> Genome | None:
        """Every block from one of two genomes, or every gene where genes belong to no block of their own.

        Returns:
            None where the draw is one of the two, or leads out of the range.
        """
        places = [gene.block for gene in self.genes]
        if len(set(places)) == 1:
            places = list(range(len(self.genes)))
        takes = {place: rng.random() < 0.5 for place in sorted(set(places))}
        options = [a if takes[place] else b for place, a, b in zip(places, first, second, strict=True)]
        return self._settled(options, rng, 0) if tuple(options) not in (first, second) else None
