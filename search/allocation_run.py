"""An allocation search from configuration to result."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from evoprune.fitness.prepare import Summary
from evoprune.metrics.allocation import Allocation, repair
from evoprune.metrics.allocation_file import read_allocation, to_json
from evoprune.metrics.allocation_formula import AllocationFormula, Statistics, read_formula
from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.files import content_hash, derived_seed
from evoprune.metrics.records import Site
from evoprune.search.allocation_result import AllocationComparison
from evoprune.search.allocation_search import AllocationSearch, Stage
from evoprune.search.breeders import Breeder, breeder_of
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.engine.executor import Job
from evoprune.search.kinds.allocation import KIND, different
from evoprune.search.result import failure
from evoprune.search.rundir import RunDirectory
from evoprune.search.search_run import Ask, Plan, SearchRun
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace

GIVEN = "given"
"""Name of the seed that ``seed_from`` brings."""


class AllocationRun(SearchRun[AllocationSearchConfig, AllocationSearch]):
    """One session of an allocation search."""

    kind = KIND
    worker_factory = "evoprune.fitness.allocation_worker:build"
    _statistics: Statistics | None = None
    pure_jobs = ("allocate", "describe", "levels", "heldout")

    def seeds_identity(self) -> dict[str, Any]:
        given = given_allocation(self.config)
        formula = given_formula(self.config)
        return {
            "allocators": list(self.config.seeds),
            "given": None if given is None else to_json(given),
            "formula": None if formula is None else formula.to_json(),
        }

    def prepare_payload(self) -> dict[str, Any]:
        return {"criterion": self._criterion()}

    @property
    def counted_by_loop(self) -> bool:
        return False

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
        database = self.prepared_values["database"]
        self._named = self._seeds(space, prepared, ask)
        distinct: dict[Genome, str] = {}
        for name, genome in self._named.items():
            distinct.setdefault(genome, name)
        payload = {"prepared": prepared.name, "criterion": self._criterion(), "database": database}
        return AllocationSearch(
            space,
            {name: genome for genome, name in distinct.items()},
            self._breeder(space, prepared, ask),
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
        asked = {"criterion": self._criterion(), "terminals": terminals, "target": config.target.sparsity}
        key = content_hash([self.identity, "describe", asked])
        (outcome,) = ask([Job(key, "describe", {"prepared": prepared.name, **asked})], limited=False)
        if outcome.status != "ok":
            raise failure(outcome)
        self._statistics = outcome.values["statistics"]
        for name, fault in outcome.values["faults"].items():
            self.progress.line(f"warning: no formula reads {name}: {fault}")
        return plugin.make(space, config.seed, self._statistics, given_formula(config))

    def _seeds(self, space: LevelSpace, prepared: Summary, ask: Ask) -> dict[str, Genome]:
        """Genomes to start from, by name: what the allocators ask for, and what is given.

        Raises:
            InvalidInput: what is given is of another model.
        """
        config = self.config
        # What cannot be is refused before anybody works for it.
        given = self._given(space, prepared)
        self._genome(space, "uniform", [config.target.sparsity] * len(space.sites))
        self.phase("asking the allocators")
        seeds: dict[str, Genome] = {}
        jobs = []
        for name in config.seeds:
            asked = {"criterion": self._criterion(), "allocator": name, "target": config.target.sparsity}
            key = content_hash([self.identity, "allocate", asked])
            jobs.append(Job(key, "allocate", {"prepared": prepared.name, **asked}))
        for name, outcome in zip(config.seeds, ask(jobs, limited=False), strict=True):
            try:
                if outcome.status != "ok":
                    raise failure(outcome)
                seeds[name] = self._genome(space, name, outcome.values["sparsities"])
            except EvopruneError as error:
                if name == "uniform":
                    raise
                self.progress.line(f"warning: no seed by {name}: {str(error).strip().splitlines()[-1]}")
        # A budget too small for all seeds is spent on the first of them.
        first = {} if given is None else {"uniform": seeds["uniform"], GIVEN: given}
        return {**first, **seeds}

    def _given(self, space: LevelSpace, prepared: Summary) -> Genome | None:
        """The genome nearest to what `seed_from` names, at this run's budget."""
        allocation = given_allocation(self.config)
        if allocation is None:
            return None
        try:
            allocation.check(prepared.facts["model_class"], space.sites)
        except InvalidInput as error:
            raise InvalidInput(f"{self.config.seed_from}: {error}") from None
        # Counted in whole columns, as the file means it, for `near` rounds what lies between two of them.
        asked = [site.removed / site.weights for site in allocation.sites]
        if abs(allocation.removed - space.budget) > min(site.out_features for site in space.sites):
            asked = [*repair(asked, space.sites, self.config.target.sparsity)]
        return self._genome(space, GIVEN, asked)

    def _genome(self, space: LevelSpace, name: str, sparsities: list[float]) -> Genome:
        return space.near(sparsities, random.Random(derived_seed(self.config.seed, f"seed-{name}", 0)))

    def _criterion(self) -> dict[str, Any]:
        return criterion_json(self.config.target.metric, load_metric(self.config.target.metric))


def criterion_json(given: str, criterion: Criterion) -> dict[str, Any]:
    """A criterion as jobs spell it.

    Args:
        given: its name, or its text.
    """
    if given in CRITERIA or not isinstance(criterion, Metric):
        return {"name": given}
    return {"expression": criterion.expression.to_json()}


def given_formula(config: AllocationSearchConfig) -> AllocationFormula | None:
    """The formula that ``seed_from`` names, where formulas are searched: a file, or the best one of another run."""
    source = config.seed_from
    if source is None or not breeder_of(config.searcher.name).reads:
        return None
    path = Path(source)
    if path.suffix == ".json" and not path.is_dir():
        return read_formula(path)
    return read_formula(RunDirectory.open(source).path / "export" / "formula.json")


def given_allocation(config: AllocationSearchConfig) -> Allocation | None:
    """The allocation that ``seed_from`` names: a file, or the winner of another run; None too if it is a formula.

    Raises:
        InvalidInput: neither, or the run is not finished.
    """
    source = config.seed_from
    if source is None:
        return None
    path = Path(source)
    if path.suffix in (".json", ".txt") and not path.is_dir():
        if path.suffix == ".txt":
            raise InvalidInput(f"{source} is no .json: EvoPress's text says neither its budget nor its model")
        if read_formula(path) is None:
            return read_allocation(path)
        if not breeder_of(config.searcher.name).reads:
            raise InvalidInput(
                f"{source} holds a formula, which only a search of formulas can start from: add --searcher formula"
            )
        return None
    run = RunDirectory.open(source)
    if run.kind != KIND.name:
        raise InvalidInput(
            f"run {source} searched {run.kind}s: a run that searched allocations is needed to start from"
        )
    if run.result is None:
        raise InvalidInput(f"run {source} is not finished: resume it first")
    return read_allocation(run.path / "export" / "allocation.json")
