"""A search for one allocation, from configuration to result."""

from __future__ import annotations

import random

from evoprune.fitness.prepare import Summary
from evoprune.metrics.allocation_formula import Statistics
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import Site
from evoprune.search.allocation_result import AllocationComparison
from evoprune.search.breeders import Breeder, breeder_of
from evoprune.search.engine.executor import Job
from evoprune.search.generation_search import GenerationSearch, Stage
from evoprune.search.kinds.allocation import different
from evoprune.search.level_run import LevelRun, given_formula, sites_of
from evoprune.search.result import failure
from evoprune.search.search_run import Plan, generation_plan
from evoprune.search.spaces.ladder import Genome, by_genome
from evoprune.search.spaces.levels import LevelSpace
from evoprune.search.worker_session import Ask


class AllocationRun(LevelRun[GenerationSearch[LevelSpace]]):
    """One session of a search for an allocation."""

    pure_jobs = (*LevelRun.pure_jobs, "describe")
    _statistics: Statistics | None = None

    def place(self, space: LevelSpace, sparsities: list[float], budget: float, rng: random.Random) -> Genome:
        return space.near(sparsities, rng)

    def space(self, sites: list[Site]) -> LevelSpace:
        target = self.config.target
        return LevelSpace(
            sites, target.sparsity, target.granularity, target.drop, only=target.drop_only, stored=target.stored
        )

    def plan(self) -> Plan:
        return generation_plan(self.config.searcher, self.config.data.window)

    def build_search(self, prepared: Summary, ask: Ask) -> GenerationSearch[LevelSpace]:
        config, sites = self.config, sites_of(prepared)
        space = self.space(sites)
        self._run.add_identity(genes=[gene.name for gene in space.genes], matrices=[site.name for site in sites])
        self._named = self.start_genomes(space, prepared, ask)
        payload = self.job_payload(prepared)
        return GenerationSearch(
            space,
            by_genome(self._named),
            self._breeder(space, prepared, ask),
            [Stage(stage.windows, stage.survivors) for stage in config.searcher.stages],
            windows=config.searcher.windows,
            final_windows=config.searcher.windows,
            offspring=config.searcher.offspring,
            crossover=config.searcher.crossover,
            surrogate=config.searcher.surrogate,
            seed=config.seed,
            evaluations=config.evaluations,
            identity=content_hash([self.identity, payload["criterion"]]),
            payload=payload,
        )

    def comparison(self, prepared: Summary, search: GenerationSearch[LevelSpace], ask: Ask) -> AllocationComparison:
        model_class, distinct = self._run.identity["model_class"], different(self._run.history())
        return AllocationComparison(
            self.config, self.identity, search, self._named, model_class, distinct, self._statistics
        )

    def _breeder(self, space: LevelSpace, prepared: Summary, ask: Ask) -> Breeder:
        """Who breeds, told of the matrices what it can make use of."""
        config = self.config
        plugin, terminals = breeder_of(config.searcher.name), config.terminals
        if not terminals:
            return plugin.make(space, config.seed)
        self.phase("measuring the matrices")
        asked = {"criterion": self.criterion(), "terminals": terminals, "target": config.target.sparsity}
        key = content_hash([self.identity, "describe", asked])
        (outcome,) = ask([Job(key, "describe", {"prepared": prepared.name, **asked})], limited=False)
        if outcome.status != "ok":
            raise failure(outcome)
        self._statistics = outcome.values["statistics"]
        for name, fault in outcome.values["faults"].items():
            self.progress.line(f"warning: no formula reads {name}: {fault}")
        return plugin.make(space, config.seed, self._statistics, given_formula(config))
