"""Fronts of quality against costs: NSGA-II's selection as DEAP has it, and an archive with one genome for each cost.

Source: Deb et al. 2002, A fast and elitist multiobjective genetic algorithm: NSGA-II; layerwise sparsity allocation,
section 5.5.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deap import base, tools

from evoprune.metrics.files import content_hash
from evoprune.search.costs import saved_percent
from evoprune.search.pooled_search import Member
from evoprune.search.spaces.trees import seeded_deap


class FrontFitness(base.Fitness):
    """DEAP's view of a point: lower KL and lower costs are better, however many these are."""

    def __init__(self, values: Sequence[float] = ()) -> None:
        self.weights = (-1.0,) * len(values)
        super().__init__(values)


@dataclass(frozen=True, eq=False)
class Point:
    """A measured member with its costs.

    Attributes:
        member: has a KL.
        costs: one or more, each of them to be low.
    """

    member: Member
    costs: tuple[int, ...]
    fitness: FrontFitness = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fitness", FrontFitness((self.kl, *self.costs)))

    @property
    def cost(self) -> int:
        """The first of the costs, which the range of a search is of."""
        return self.costs[0]

    @property
    def kl(self) -> float:
        """Of the member, in nats per token."""
        assert self.member.kl is not None
        return self.member.kl

    @property
    def rank(self) -> tuple[float, tuple[int, ...], str]:
        """Sorts points of about the same costs, the best first; by content where all else is equal."""
        return self.kl, self.costs, content_hash(list(self.member.genome))


def survivors(points: Sequence[Point], count: int) -> list[Point]:
    """NSGA-II's choice of `count` points: by non-dominated fronts, within the last by crowding distance."""
    chosen: list[Point] = tools.selNSGA2(list(points), count)
    return chosen


def mates(points: Sequence[Point], count: int, rng: random.Random) -> list[Point]:
    """Parents by DEAP's tournament on dominance and crowding.

    Args:
        points: what `survivors` gave, at least one.
        count: how many; the same point may be drawn more than once.
        rng: decides; the global generator, from which DEAP draws, is put back.
    """
    whole = len(points) - len(points) % 4
    if whole == 0:  # too few for a tournament of fours
        return [rng.choice(points) for _ in range(count)]
    chosen: list[Point] = []
    with seeded_deap(rng):
        while len(chosen) < count:
            # Of points beyond a multiple of four the tournament draws those that compete.
            chosen += tools.selTournamentDCD(list(points), whole)
    return chosen[:count]


def nondominated(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats in KL and all costs, the dearest first; one of those with the same values."""
    distinct: dict[tuple[float, tuple[int, ...]], Point] = {}
    for point in points:
        distinct.setdefault((point.kl, point.costs), point)
    if not distinct:
        return []
    (front,) = tools.sortNondominated([*distinct.values()], len(distinct), first_front_only=True)
    return sorted(front, key=lambda point: point.costs, reverse=True)


class Buckets:
    """The best point for each hundredth of the dense costs, whatever population the search has.

    Args:
        dense: costs of the model before pruning.
    """

    def __init__(self, dense: Sequence[int]) -> None:
        self._dense = tuple(dense)
        self._best: dict[tuple[int, ...], Point] = {}

    @property
    def points(self) -> list[Point]:
        """One a bucket, the dearest first."""
        return [self._best[saved] for saved in sorted(self._best)]

    def add(self, point: Point) -> bool:
        """Take in a point; whether it is now the best of its bucket and no other bucket's beats it."""
        saved = tuple(saved_percent(cost, dense) for cost, dense in zip(point.costs, self._dense, strict=True))
        known = self._best.get(saved)
        if known is not None and known.rank <= point.rank:
            return False
        self._best[saved] = point
        return not any(other.fitness.dominates(point.fitness) for other in self._best.values())
