"""What a search for a front of allocations found, and a file for each of its members."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evoprune.metrics.allocation_file import write_allocation
from evoprune.metrics.files import content_hash
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.costs import is_gone, parts_of
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.front_result import FrontComparison
from evoprune.search.level_result import (
    allocation_of_row,
    heldout_jobs,
    provenance,
    run_facts,
    sparsities_of,
    write_whole,
)
from evoprune.search.pareto_search import ParetoSearch
from evoprune.search.result import member_name
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.ranges import RangeSpace

ALLOCATOR = "nsga2"
"""Who made the exported allocations."""


class ParetoComparison(FrontComparison[AllocationSearchConfig, RangeSpace]):
    """The front of a search beside the allocators that it started from, and beside the reference at its own costs.

    Args:
        config, identity, search, seeds: see `FrontComparison`.
        model_class: what the allocations are of.
        distinct: different genomes among all births.

    Raises:
        InvalidInput: no candidate has a fitness.
    """

    def __init__(
        self,
        config: AllocationSearchConfig,
        identity: str,
        search: ParetoSearch[RangeSpace],
        seeds: Sequence[tuple[str, Genome]],
        model_class: str,
        distinct: int,
    ) -> None:
        self.reference = config.target.reference
        super().__init__(config, identity, search, seeds)
        self._model_class = model_class
        self._distinct = distinct

    def timing_job(self) -> Job:
        """The dense model and the members that held-out text is for, end to end, without the parts that they drop."""
        space, parts = self._search.space, parts_of(self._search.space.sites)
        absent: list[list[list[int]]] = [[]]
        for at in self._chosen:
            levels = space.levels(self._search.front[at].member.genome)
            absent.append([places for places in parts.values() if is_gone(places, levels)])
        payload = {"absent": absent, "window": self._config.data.window}
        return Job(content_hash([self._identity, "whole-latency", payload]), "whole-latency", payload)

    def heldout_jobs(self, genomes: Iterable[Genome | None]) -> list[Job]:
        return heldout_jobs(self._identity, self._search, genomes)

    def described(self, genome: Genome) -> dict[str, Any]:
        return {"allocation": sparsities_of(self._search.space, genome)}

    def reference_near(self, sparsity: float) -> Genome:
        """Uniform sparsity, or parts that chance drops where parts only go as a whole."""
        space, rng = self._search.space, random.Random(0)
        return space.near_budget(space.even(sparsity, rng), sparsity, rng)

    def result(self, run_id: str, evaluations: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The content of ``result.json``, from the outcomes of `jobs`; see `FrontComparison.rows`."""
        config = self._config
        return {
            **run_facts(config, self._search, run_id, evaluations, self._distinct),
            "stage_tokens": [config.front.windows * config.data.window],
            **self.rows(outcomes),
        }

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
            write_whole(allocation(row), folder / "front" / f"{member_name(row)}.json")
        best = allocation(result["best"])
        write_whole(best, folder / "allocation.json")
        write_allocation(best, folder / "allocation.txt")
