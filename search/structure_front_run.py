"""A search for a front of shapes, from configuration to result."""

from __future__ import annotations

from evoprune.fitness.prepare import Summary
from evoprune.search.costs import ShapeCost
from evoprune.search.pareto_search import ParetoSearch
from evoprune.search.result import failure
from evoprune.search.search_run import Plan, front_plan
from evoprune.search.spaces.ladder import by_genome
from evoprune.search.spaces.structure import StructureSpace
from evoprune.search.spaces.structure_range import StructureRange
from evoprune.search.structure_front import StructureFrontComparison
from evoprune.search.structure_result import spelled_widths
from evoprune.search.structure_run import ShapesRun
from evoprune.search.worker_session import Ask


class StructureFrontRun(ShapesRun[ParetoSearch[StructureRange]]):
    """One session of a search for a front of shapes."""

    def spaces(self) -> list[tuple[str, StructureSpace]]:
        space, ends = self.space(), self.config.target.sparsity_range
        assert ends is not None
        return [(f"@{fraction:g}", space.at(fraction)) for fraction in self.config.front.spread(ends)]

    def space_at(self, fraction: float) -> StructureSpace:
        ends = self.config.target.sparsity_range
        assert ends is not None
        return self.space().at(min(max(fraction, ends[0]), ends[1]))

    def space(self) -> StructureRange:
        """The shapes of all budgets.

        Raises:
            InvalidInput: the highest is out of reach.
        """
        ends = self.config.target.sparsity_range
        assert ends is not None
        return StructureRange(self._costs, ends, **self.options)

    def plan(self) -> Plan:
        ends = self.config.target.sparsity_range
        assert ends is not None
        return front_plan(self.config, ends)

    def build_search(self, prepared: Summary, ask: Ask) -> ParetoSearch[StructureRange]:
        config = self.config
        assert config.target.sparsity is not None
        self._run.add_identity(widths=spelled_widths(self._costs))
        payload = self.job_payload(prepared)
        self._named = self.start_genomes(prepared, payload, ask)
        costs = [ShapeCost(self._costs)]
        if self._table is not None:
            # As measured: what the front says of a member is what its parts took.
            costs.append(ShapeCost(self._table.costs))
        return ParetoSearch(
            self.space(),
            costs,
            by_genome(self._named),
            target=config.target.sparsity,
            windows=config.front.windows,
            final_windows=config.searcher.windows,
            population=config.searcher.offspring,
            crossover=config.front.crossover,
            seed=config.seed,
            evaluations=config.evaluations,
            identity=self.identity,
            payload=payload,
        )

    def comparison(self, prepared: Summary, search: ParetoSearch[StructureRange], ask: Ask) -> StructureFrontComparison:
        seeds = [(name.partition("@")[0], genome) for name, genome in self._named.items()]
        comparison = StructureFrontComparison(self.config, self.identity, search, seeds, self._run, self._table)
        if self._table is not None:
            # While nothing else runs, as the parts were.
            self.phase("measuring members end to end")
            (outcome,) = ask([comparison.timing_job()], limited=False, alone=True)
            if outcome.status != "ok":
                raise failure(outcome)
            comparison.take_times(outcome.values["nanoseconds"])
        return comparison
