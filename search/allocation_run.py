"""A search for one allocation, from configuration to result."""

from __future__ import annotations

import random

from evoprune.fitness.prepare import Summary
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import Site
from evoprune.search.allocation_result import AllocationComparison
from evoprune.search.allocation_search import AllocationSearch, Stage
from evoprune.search.breeders import breeder_of
from evoprune.search.kinds.allocation import different
from evoprune.search.level_run import LevelRun
from evoprune.search.search_run import Ask, Plan
from evoprune.search.spaces.ladder import Genome, by_genome
from evoprune.search.spaces.levels import LevelSpace


class AllocationRun(LevelRun[AllocationSearch]):
    """One session of a search for an allocation."""

    def place(self, space: LevelSpace, sparsities: list[float], budget: float, rng: random.Random) -> Genome:
        return space.near(sparsities, rng)

    def plan(self) -> Plan:
        searcher, window = self.config.searcher, self.config.data.window
        per_generation, entrants = 0, searcher.offspring
        for stage in searcher.stages:
            per_generation += entrants * stage.windows * window
            entrants = stage.survivors
        return Plan(
            [stage.windows * window for stage in searcher.stages],
            "stage",
            per_generation / searcher.offspring,
            searcher.offspring,
            lambda workers: (
                f"{searcher.offspring} offspring: some will wait; --population {2 * workers} keeps them busy (it is "
                "part of the run's identity)"
            ),
        )

    def build_search(self, prepared: Summary, ask: Ask) -> AllocationSearch:
        config = self.config
        sites = [Site(**site) for site in prepared.facts["sites"]]
        target = config.target
        space = LevelSpace(sites, target.sparsity, target.granularity, target.drop, only=target.drop_only)
        self._run.add_identity(genes=[gene.name for gene in space.genes], matrices=[site.name for site in sites])
        self._named = self.start_genomes(space, prepared, ask)
        payload = self.job_payload(prepared)
        return AllocationSearch(
            space,
            by_genome(self._named),
            breeder_of(config.searcher.name).make(space, config.seed),
            [Stage(stage.windows, stage.survivors) for stage in config.searcher.stages],
            windows=config.searcher.windows,
            final_windows=config.searcher.windows,
            offspring=config.searcher.offspring,
            seed=config.seed,
            evaluations=config.evaluations,
            identity=content_hash([self.identity, payload["criterion"]]),
            payload=payload,
        )

    def comparison(self, prepared: Summary, search: AllocationSearch, ask: Ask) -> AllocationComparison:
        model_class, distinct = self._run.identity["model_class"], different(self._run.history())
        return AllocationComparison(self.config, self.identity, search, self._named, model_class, distinct)
