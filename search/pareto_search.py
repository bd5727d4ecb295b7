"""Search for a front: quality against one or more costs, by NSGA-II.

A generation has as many children as the population has members. They are measured on the same windows of text as all
before them, so that populations of different generations can be compared, and NSGA-II keeps the best of both. Beside
the population an archive keeps the best genome of each hundredth of the dense costs. At the end all of the archive, or
a hundred of it by NSGA-II's choice, are measured on more text, and those that no other beats are the front.
Source: Deb et al. 2002 (NSGA-II), as DEAP has it; layerwise sparsity allocation, section 5.5.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from evoprune.metrics.files import content_hash, derived_seed
from evoprune.search.costs import Cost
from evoprune.search.front import Buckets, Point, mates, nondominated, survivors
from evoprune.search.loop import Birth
from evoprune.search.pooled_search import Member, PooledSearch
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.ranges import Ranged

FINALISTS = 100
"""The most of the archive that are measured at the end; with one cost it has hardly more."""

_ATTEMPTS_PER_CHILD = 20

RangedSpace = TypeVar("RangedSpace", bound=Ranged)


class ParetoSearch(PooledSearch[RangedSpace], Generic[RangedSpace]):
    """Births of genomes between two budgets, by generations.

    Args:
        space, seeds, seed, evaluations, identity, payload: see `PooledSearch`.
        costs: what quality is bought with; the first is the one that the space is a range of, or follows from it.
        target: the sparsity to which the best of the front is the nearest.
        windows: of text B that candidates are measured on, from the first.
        final_windows: the same for the archive at the end.
        population: members, and children of a generation: a multiple of 4.
        crossover: share of children that have two parents.

    Attributes:
        front: of all that were measured at the end, the dearest first; empty before.
    """

    def __init__(
        self,
        space: RangedSpace,
        costs: Sequence[Cost],
        seeds: Mapping[str, Genome],
        *,
        target: float,
        windows: int,
        final_windows: int,
        population: int,
        crossover: float,
        seed: int,
        evaluations: int | None,
        identity: str,
        payload: Mapping[str, Any],
    ) -> None:
        self.costs = tuple(costs)
        self.front: list[Point] = []
        self._target = target
        self._windows = windows
        self._final_windows = final_windows
        self._size = population
        self._crossover = crossover
        self._population: list[Point] = []
        self._archive = Buckets([cost.dense for cost in costs])
        super().__init__(space, seeds, seed=seed, evaluations=evaluations, identity=identity, payload=payload)

    @property
    def leader(self) -> tuple[float, str] | None:
        """KL of the member of the front that is nearest to the target, and what the front is."""
        if self.best is None or self.best.kl is None:
            return None
        front = nondominated(self._archive.points)
        low, high = (self.space.sparsity_of(front[at].member.genome) for at in (0, -1))
        return (
            self.best.kl,
            f"{self.space.sparsity_of(self.best.genome):.1%} of a front of {len(front)}, {low:.0%}–{high:.0%}",
        )

    def _span(self) -> tuple[int, int]:
        return 0, self._final_windows if self._phase == "final" else self._windows

    def _stage_name(self) -> int | str:
        return 0 if self._phase == "generation" else self._phase

    def _counts(self, member: Member) -> bool:
        return self._phase != "final"

    def _origins(self, member: Member) -> tuple[str, list[int], Genome]:
        if self._phase != "generation":
            return member.origin, [], member.genome
        first = next(point.member for point in self._population if point.member.birth == member.parents[0])
        return member.origin, list(member.parents), first.genome

    def _take_in(self, member: Member, birth: Birth) -> dict[str, Any]:
        costs = self._costs_of(member)
        joined = False
        if birth.counted and member.kl is not None:
            joined = self._archive.add(Point(member, costs))
            self.best = self._nearest(nondominated(self._archive.points))
        beside = {cost.name: value for cost, value in zip(self.costs[1:], costs[1:], strict=True)}
        return {"cost": costs[0], **beside, "front": joined}

    def _advance(self) -> None:
        measured = self._points(self._measured)
        if self._phase == "final":
            self.front = nondominated(measured)
            self.best = self._nearest(self.front)
            self._enter([])
            return
        if self._phase == "seeds":
            self._seeds_measured(self._measured)
        self._population = survivors([*self._population, *measured], self._size)
        self._breed()

    def _breed(self) -> None:
        """The next generation, or the finals if the budget is spent or nothing new is found."""
        left = self._size if self._evaluations is None else self._evaluations - self._counted
        self._known |= {content_hash(list(member.genome)) for member in self._measured}
        self.generation += 1
        children = [] if self._concluded or not self._population else self._children(min(self._size, left))
        if children:
            self._phase = "generation"
            self._enter(children)
        else:
            self._finish()

    def _children(self, count: int) -> list[Member]:
        rng = random.Random(derived_seed(self._seed, "generation", self.generation))
        found: dict[Genome, Member] = {}
        for _ in range(_ATTEMPTS_PER_CHILD):
            if len(found) >= count:  # at once, where the budget is spent
                break
            drawn = mates(self._population, 2 * count, rng)
            for first, second in zip(drawn[::2], drawn[1::2], strict=True):
                child = self._child(first.member, second.member, rng)
                if child is not None and content_hash(list(child.genome)) not in self._known:
                    found.setdefault(child.genome, child)
        # Neighbours of one parent can share what a worker remembers of it.
        return sorted([*found.values()][:count], key=lambda child: child.parents[0])

    def _child(self, first: Member, second: Member, rng: random.Random) -> Member | None:
        """What two parents have together, or one of them alone; None where the draw leads to nobody new."""
        parents = [first]
        if first.genome != second.genome and rng.random() < self._crossover:
            parents.append(second)
            genome = self.space.crossed(first.genome, second.genome, rng)
        else:
            genome = self.space.switched(first.genome, rng, self.space.spans)
        if genome is None:
            return None
        births = tuple(parent.birth for parent in parents if parent.birth is not None)
        origin = "crossover" if len(parents) > 1 else "switch"
        return Member(genome, origin, generation=self.generation, parents=births)

    def _finish(self) -> None:
        """The finals: the archive on one long text."""
        self._phase = "final"
        points = self._archive.points
        chosen = points if len(points) <= FINALISTS else survivors(points, FINALISTS)
        self._enter([point.member for point in chosen])

    def _points(self, members: Iterable[Member]) -> list[Point]:
        """Those that have a fitness, with their costs."""
        return [Point(member, self._costs_of(member)) for member in members if member.kl is not None]

    def _costs_of(self, member: Member) -> tuple[int, ...]:
        spelled = self.space.spelled(member.genome)
        return tuple(cost.of(spelled) for cost in self.costs)

    def _nearest(self, front: Iterable[Point]) -> Member | None:
        """The member of a front that is nearest to the target, the better of two that are as near."""

        def distance(point: Point) -> tuple[float, float]:
            return abs(self.space.sparsity_of(point.member.genome) - self._target), point.kl

        nearest = min(front, key=distance, default=None)
        return None if nearest is None else nearest.member

    def conclude(self) -> bool:
        if not self._concluded:
            self._concluded = True
            if self._phase == "generation" and self._break_off():
                self._advance()
        return True

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "population": [point.member.to_json() for point in self._population],
            "archive": [point.member.to_json() for point in self._archive.points],
            "front": [point.member.to_json() for point in self.front],
        }

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        # Crowding distances are no part of the state: a selection stands before all that reads them.
        self._population, archive, self.front = (
            self._points(Member.from_json(values) for values in state[name])
            for name in ("population", "archive", "front")
        )
        for point in archive:
            self._archive.add(point)
