"""What results of searches for a front share: members on held-out text beside a reference at the same costs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from evoprune.metrics.errors import InvalidInput
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.costs import saved_percent
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.front import Point
from evoprune.search.pareto_search import ParetoSearch, RangedSpace
from evoprune.search.result import failure, paired_difference, summary
from evoprune.search.spaces.ladder import Genome

FrontConfig = TypeVar("FrontConfig", AllocationSearchConfig, StructureSearchConfig)

# Halvings of the range of sparsities in search of the reference at a member's cost.
_HALVINGS = 12


class FrontComparison(Generic[FrontConfig, RangedSpace]):
    """The front of a search beside the seeds that it started from, and beside the reference at its own costs.

    Args:
        config: of the run.
        identity: hash of everything that an evaluation depends on beside its candidate.
        search: at its end.
        seeds: name and genome of every seed, once for every budget.

    Attributes:
        reference: what members are compared with, by name.

    Raises:
        InvalidInput: no candidate has a fitness.
    """

    reference: str

    def __init__(
        self,
        config: FrontConfig,
        identity: str,
        search: ParetoSearch[RangedSpace],
        seeds: Sequence[tuple[str, Genome]],
    ) -> None:
        if search.best is None:
            raise InvalidInput("no candidate could be evaluated; `evoprune show` counts the reasons")
        self._config: FrontConfig = config
        self._identity = identity
        self._search = search
        self._seeds = seeds
        self._fitness = {genome: search.seed_fitness.get(name) for name, genome in search.seeds.items()}
        places = [point.member.genome for point in search.front]
        self._best = places.index(search.best.genome)
        self._chosen = spread(len(search.front), config.front.members, self._best)
        self._beside = {at: found for at in self._chosen if (found := self._reference_at(search.front[at])) is not None}
        self._entrants: dict[tuple[str, Any], Genome | None] = {("dense", None): None}
        self._entrants |= {("front", at): places[at] for at in self._chosen}
        self._entrants |= {("beside", at): genome for at, genome in self._beside.items()}
        self._entrants |= {("seed", at): genome for at, (_, genome) in enumerate(seeds)}
        self._times: dict[int | None, int] = {}  # nanoseconds by place in the front; None is the dense model

    @abstractmethod
    def timing_job(self) -> Job:
        """The dense model and the members that held-out text is for, end to end."""

    @abstractmethod
    def heldout_jobs(self, genomes: Iterable[Genome | None]) -> list[Job]:
        """Jobs that measure genomes on held-out text; None is the dense model."""

    @abstractmethod
    def described(self, genome: Genome) -> dict[str, Any]:
        """What a row of the result says of a genome itself."""

    @abstractmethod
    def reference_near(self, sparsity: float) -> Genome:
        """The reference at a budget.

        Raises:
            InvalidInput: it cannot be met.
        """

    def take_times(self, nanoseconds: Sequence[int]) -> None:
        """What `timing_job` found, in its order; the result then says it beside the sums of parts."""
        self._times = dict(zip([None, *self._chosen], nanoseconds, strict=True))

    def jobs(self) -> list[Job]:
        """Every entrant on held-out text."""
        return self.heldout_jobs(self._entrants.values())

    def rows(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """``pareto``, ``dense``, ``baselines``, ``best`` and ``front`` of the result, from the outcomes of `jobs`.

        Raises:
            EvopruneError: the dense model or the best could not be measured.
        """
        losses = {}
        for entrant, outcome in zip(self._entrants, outcomes, strict=True):
            if outcome.status == "ok":
                losses[entrant] = outcome.values
            elif entrant in (("dense", None), ("front", self._best)):
                raise failure(outcome)
        search = self._search
        first, *others = search.costs
        front = [self._row(at, point, losses) for at, point in enumerate(search.front)]
        return {
            "pareto": {
                **first.to_json(),
                **({"others": [cost.to_json() for cost in others]} if others else {}),
                **self._measured(),
                "range": list(self._config.target.sparsity_range or ()),
            },
            "dense": {"heldout": summary(losses["dense", None])},
            "baselines": [
                {
                    "name": name,
                    "sparsity": search.space.sparsity_of(genome),
                    **self._costs(genome),
                    "fitness": self._fitness.get(genome),
                    **self.described(genome),
                    "heldout": summary(losses["seed", at]),
                }
                for at, (name, genome) in enumerate(self._seeds)
                if ("seed", at) in losses
            ],
            "best": front[self._best],
            "front": front,
        }

    def _measured(self) -> dict[str, Any]:
        """What `take_times` was told; members of the front are equal for equal seeds, and so say nothing of it."""
        if not self._times:
            return {}
        front = [self._times.get(at) for at in range(len(self._search.front))]
        return {"measured": {"dense": self._times[None], "front": front}}

    def _costs(self, genome: Genome) -> dict[str, int]:
        """``cost``, and the other costs by name."""
        spelled = self._search.space.spelled(genome)
        first, *others = self._search.costs
        return {"cost": first.of(spelled), **{cost.name: cost.of(spelled) for cost in others}}

    def _row(self, at: int, point: Point, losses: Mapping[tuple[str, Any], Mapping[str, Any]]) -> dict[str, Any]:
        search, member = self._search, point.member
        space, measured = search.space, losses.get(("front", at))
        saved = [saved_percent(cost, dense.dense) for cost, dense in zip(point.costs, search.costs, strict=True)]
        row = {
            "saved": saved[0],
            **({"name": "-".join(map(str, saved))} if len(saved) > 1 else {}),
            **self._costs(member.genome),
            "sparsity": space.sparsity_of(member.genome),
            "removed": space.removed(member.genome),
            "birth": member.birth,
            "generation": member.generation,
            "origin": member.origin,
            "fitness": member.kl,
            "stderr": member.stderr,
            **self.described(member.genome),
            "heldout": None if measured is None else summary(measured),
            self.reference: None,
        }
        if measured is not None and ("beside", at) in losses:
            genome, beside = self._beside[at], losses["beside", at]
            row[self.reference] = {
                **self._costs(genome),
                "sparsity": space.sparsity_of(genome),
                "heldout": summary(beside),
                "member_minus_this": paired_difference(measured, beside),
            }
        return row

    def _reference_at(self, point: Point) -> Genome | None:
        """The reference at about the first cost of a member; None where there is none to a hundredth of the dense."""
        space, cost = self._search.space, self._search.costs[0]
        low, high = space.least / space.whole, space.most / space.whole
        best: tuple[int, Genome] | None = None
        sparsity = space.sparsity_of(point.member.genome)
        for _ in range(_HALVINGS):
            try:
                found = self.reference_near(sparsity)
            except InvalidInput:
                break
            beyond = cost.of(space.spelled(found)) - point.cost
            if best is None or abs(beyond) < best[0]:
                best = abs(beyond), found
            if 1000 * abs(beyond) <= cost.dense:
                break
            low, high = (sparsity, high) if beyond > 0 else (low, sparsity)
            sparsity = (low + high) / 2
        if best is None or 100 * best[0] > cost.dense:
            return None
        return best[1]


def spread(count: int, most: int, always: int) -> list[int]:
    """At most so many of `count` places, evenly spread from the first to the last, `always` among them."""
    if count <= most:
        return list(range(count))
    chosen = [(at * (count - 1) + (most - 1) // 2) // (most - 1) for at in range(most)]
    if always not in chosen:
        inner = chosen[1:-1] or chosen
        chosen[chosen.index(min(inner, key=lambda place: abs(place - always)))] = always
    return sorted(chosen)
