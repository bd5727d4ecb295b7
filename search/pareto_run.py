"""A search for a front of allocations, from configuration to result."""

from __future__ import annotations

import random

from evoprune.fitness.prepare import Summary
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import Site
from evoprune.search.costs import Cost, Latency, MultiplyAdds, Parameters, parts_of
from evoprune.search.engine.executor import Job
from evoprune.search.kinds.allocation import different
from evoprune.search.level_run import LevelRun, sites_of
from evoprune.search.pareto_result import ParetoComparison
from evoprune.search.pareto_search import ParetoSearch
from evoprune.search.result import failure
from evoprune.search.search_run import Plan, front_plan
from evoprune.search.spaces.ladder import Genome, by_genome
from evoprune.search.spaces.ranges import RangeSpace
from evoprune.search.worker_session import Ask


class ParetoRun(LevelRun[ParetoSearch[RangeSpace]]):
    """One session of a search for a front."""

    def place(self, space: RangeSpace, sparsities: list[float], budget: float, rng: random.Random) -> Genome:
        return space.near_budget(sparsities, budget, rng)

    def space(self, sites: list[Site]) -> RangeSpace:
        target = self.config.target
        assert target.sparsity_range is not None
        return RangeSpace(
            sites, target.sparsity_range, target.granularity, target.drop, only=target.drop_only, stored=target.stored
        )

    @property
    def measures_time(self) -> bool:
        return self.config.target.pareto == "latency"

    def plan(self) -> Plan:
        return front_plan(self.config, (self.config.budgets[0], self.config.budgets[-1]))

    def build_search(self, prepared: Summary, ask: Ask) -> ParetoSearch[RangeSpace]:
        config, target, sites = self.config, self.config.target, sites_of(prepared)
        space = self.space(sites)
        self._run.add_identity(genes=[gene.name for gene in space.genes], matrices=[site.name for site in sites])
        self._named = self.start_genomes(space, prepared, ask)
        payload = self.job_payload(prepared)
        return ParetoSearch(
            space,
            [self._cost(sites, ask)],
            by_genome(self._named),
            target=target.sparsity,
            windows=config.front.windows,
            final_windows=config.searcher.windows,
            population=config.searcher.offspring,
            crossover=config.front.crossover,
            seed=config.seed,
            evaluations=config.evaluations,
            identity=content_hash([self.identity, payload["criterion"]]),
            payload=payload,
        )

    def comparison(self, prepared: Summary, search: ParetoSearch[RangeSpace], ask: Ask) -> ParetoComparison:
        seeds = [(name.partition("@")[0], genome) for name, genome in self._named.items()]
        model_class, distinct = self._run.identity["model_class"], different(self._run.history())
        comparison = ParetoComparison(self.config, self.identity, search, seeds, model_class, distinct)
        if self.config.target.pareto == "latency":
            # While nothing else runs, as the parts were.
            self.phase("measuring members end to end")
            (outcome,) = ask([comparison.timing_job()], limited=False, alone=True)
            if outcome.status != "ok":
                raise failure(outcome)
            comparison.take_times(outcome.values["nanoseconds"])
        return comparison

    def _cost(self, sites: list[Site], ask: Ask) -> Cost:
        """The cost that the configuration names; latencies are measured once, and an interrupted run keeps them."""
        name, window = self.config.target.pareto, self.config.data.window
        if name == "parameters":
            return Parameters(sites)
        if name == "flops":
            return MultiplyAdds(sites, window)
        self.phase("measuring how long parts take")
        parts = parts_of(sites)
        payload = {"parts": list(parts.values()), "window": window}
        (outcome,) = ask(
            [Job(content_hash([self.identity, "latency", payload]), "latency", payload)], limited=False, alone=True
        )
        if outcome.status != "ok":
            raise failure(outcome)
        return Latency(sites, outcome.values["rest"], dict(zip(parts, outcome.values["parts"], strict=True)))
