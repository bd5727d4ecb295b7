"""What a search for a front found: its members on held-out text beside the reference at the same costs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from evoprune.metrics.allocation_file import write_allocation
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.costs import Cost, is_gone, parts_of, saved_percent
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.front import Point
from evoprune.search.level_result import (
    allocation_of_row,
    heldout_jobs,
    provenance,
    run_facts,
    sparsities_of,
    write_whole,
)
from evoprune.search.pareto_search import ParetoSearch
from evoprune.search.result import failure, paired_difference, summary
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.ranges import RangeSpace

ALLOCATOR = "nsga2"
"""Who made the exported allocations."""

# Halvings of the range of sparsities in search of the reference at a member's cost.
_HALVINGS = 12


class ParetoComparison:
    """The front of a search beside the allocators that it started from, and beside the reference at its own costs.

    Args:
        config: of the run.
        identity: hash of everything that an evaluation depends on beside its candidate.
        search: at its end.
        seeds: name and genome of what allocators ask for, once for every budget.
        model_class: what the allocations are of.
        distinct: different genomes among all births.

    Raises:
        InvalidInput: no candidate has a fitness.
    """

    def __init__(
        self,
        config: AllocationSearchConfig,
        identity: str,
        search: ParetoSearch,
        seeds: Sequence[tuple[str, Genome]],
        model_class: str,
        distinct: int,
    ) -> None:
        if search.best is None:
            raise InvalidInput("no candidate could be evaluated; `evoprune show` counts the reasons")
        self._config = config
        self._identity = identity
        self._search = search
        self._seeds = seeds
        self._model_class = model_class
        self._distinct = distinct
        self._fitness = {genome: search.seed_fitness.get(name) for name, genome in search.seeds.items()}
        places = [point.member.genome for point in search.front]
        self._best = places.index(search.best.genome)
        chosen = spread(len(search.front), config.front.members, self._best)
        self._beside = {
            at: found
            for at in chosen
            if (found := reference_at(search.space, search.cost, search.front[at])) is not None
        }
        self._entrants: dict[tuple[str, Any], Genome | None] = {("dense", None): None}
        self._entrants |= {("front", at): places[at] for at in chosen}
        self._entrants |= {("beside", at): genome for at, genome in self._beside.items()}
        self._entrants |= {("seed", at): genome for at, (_, genome) in enumerate(seeds)}
        self._chosen = chosen
        self._times: dict[int | None, int] = {}  # nanoseconds by place in the front; None is the dense model

    def timing_job(self) -> Job:
        """The dense model and the members that held-out text is for, end to end, without the parts that they drop."""
        space, parts = self._search.space, parts_of(self._search.space.sites)
        absent: list[list[list[int]]] = [[]]
        for at in self._chosen:
            levels = space.levels(self._search.front[at].member.genome)
            absent.append([places for places in parts.values() if is_gone(places, levels)])
        payload = {"absent": absent, "window": self._config.data.window}
        return Job(content_hash([self._identity, "whole-latency", payload]), "whole-latency", payload)

    def take_times(self, nanoseconds: Sequence[int]) -> None:
        """What `timing_job` found, in its order; the result then says it beside the sums of parts."""
        self._times = dict(zip([None, *self._chosen], nanoseconds, strict=True))

    def jobs(self) -> list[Job]:
        """Every entrant on held-out text."""
        return heldout_jobs(self._identity, self._search, self._entrants.values())

    def result(self, run_id: str, evaluations: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The content of ``result.json``, from the outcomes of `jobs`.

        Raises:
            EvopruneError: the dense model or the best could not be measured.
        """
        losses = {}
        for entrant, outcome in zip(self._entrants, outcomes, strict=True):
            if outcome.status == "ok":
                losses[entrant] = outcome.values
            elif entrant in (("dense", None), ("front", self._best)):
                raise failure(outcome)
        config, search = self._config, self._search
        front = [self._row(at, point, losses) for at, point in enumerate(search.front)]
        return {
            **run_facts(config, search, run_id, evaluations, self._distinct),
            "stage_tokens": [config.front.windows * config.data.window],
            "pareto": {
                **search.cost.to_json(),
                **self._measured(),
                "range": list(config.target.sparsity_range or ()),
            },
            "dense": {"heldout": summary(losses["dense", None])},
            "baselines": [
                {
                    "name": name,
                    "sparsity": search.space.sparsity_of(genome),
                    "cost": search.cost.of(search.space.levels(genome)),
                    "fitness": self._fitness.get(genome),
                    "allocation": sparsities_of(search.space, genome),
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

    def _row(self, at: int, point: Point, losses: Mapping[tuple[str, Any], Mapping[str, Any]]) -> dict[str, Any]:
        space, cost, member = self._search.space, self._search.cost, point.member
        measured, reference = losses.get(("front", at)), self._config.target.reference
        row = {
            "saved": saved_percent(point.cost, cost.dense),
            "cost": point.cost,
            "sparsity": space.sparsity_of(member.genome),
            "removed": space.removed(member.genome),
            "birth": member.birth,
            "generation": member.generation,
            "origin": member.origin,
            "fitness": member.kl,
            "stderr": member.stderr,
            "allocation": sparsities_of(space, member.genome),
            "heldout": None if measured is None else summary(measured),
            reference: None,
        }
        if measured is not None and ("beside", at) in losses:
            genome, beside = self._beside[at], losses["beside", at]
            row[reference] = {
                "cost": cost.of(space.levels(genome)),
                "sparsity": space.sparsity_of(genome),
                "heldout": summary(beside),
                "member_minus_this": paired_difference(measured, beside),
            }
        return row

    def export(self, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Write every member as ``front/SAVED.json``, the best as ``allocation.json`` and ``.txt``, and read them back.

        Raises:
            EvopruneError: a file does not give its member back.
        """
        folder = run.path / "export"
        (folder / "front").mkdir(parents=True, exist_ok=True)
        parameters = provenance(self._config, result)

        def allocation(row: Mapping[str, Any]) -> Any:
            space, fingerprint = self._search.space, run.identity["model_fingerprint"]
            return allocation_of_row(row, space, self._model_class, None, ALLOCATOR, parameters, fingerprint)

        for row in result["front"]:
            write_whole(allocation(row), folder / "front" / f"{row['saved']}.json")
        best = allocation(result["best"])
        write_whole(best, folder / "allocation.json")
        write_allocation(best, folder / "allocation.txt")


def spread(count: int, most: int, always: int) -> list[int]:
    """At most so many of `count` places, evenly spread from the first to the last, `always` among them."""
    if count <= most:
        return list(range(count))
    chosen = [(at * (count - 1) + (most - 1) // 2) // (most - 1) for at in range(most)]
    if always not in chosen:
        inner = chosen[1:-1] or chosen
        chosen[chosen.index(min(inner, key=lambda place: abs(place - always)))] = always
    return sorted(chosen)


def reference_at(space: RangeSpace, cost: Cost, point: Point) -> Genome | None:
    """Uniform sparsity, or parts that chance drops where parts only go as a whole, at about the cost of a member.

    None where there is none to within a hundredth of the dense cost.
    """
    low, high = space.least / space.weights, space.most / space.weights
    best: tuple[int, Genome] | None = None
    sparsity = space.sparsity_of(point.member.genome)
    for _ in range(_HALVINGS):
        try:
            rng = random.Random(0)
            found = space.near_budget(space.even(sparsity, rng), sparsity, rng)
        except InvalidInput:
            break
        beyond = cost.of(space.levels(found)) - point.cost
        if best is None or abs(beyond) < best[0]:
            best = abs(beyond), found
        if 1000 * abs(beyond) <= cost.dense:
            break
        low, high = (sparsity, high) if beyond > 0 else (low, sparsity)
        sparsity = (low + high) / 2
    if best is None or 100 * best[0] > cost.dense:
        return None
    return best[1]
