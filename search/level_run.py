"""What sessions of searches over level vectors share: the criterion inside, and the genomes that they start from."""

from __future__ import annotations

import random
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from evoprune.fitness.prepare import Summary
from evoprune.fitness.stored_levels import stored_bytes
from evoprune.metrics.allocation import Allocation, repair
from evoprune.metrics.allocation_file import read_allocation, to_json
from evoprune.metrics.allocation_formula import AllocationFormula, read_formula
from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.files import content_hash, derived_seed
from evoprune.metrics.records import Site, removed_count
from evoprune.search.breeders import breeder_of
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.engine.executor import Job
from evoprune.search.given import allocation_file
from evoprune.search.kinds.allocation import KIND
from evoprune.search.pooled_search import PooledSearch
from evoprune.search.result import failure
from evoprune.search.rundir import RunDirectory
from evoprune.search.search_run import SearchRun
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace
from evoprune.search.worker_session import Ask, First

GIVEN = "given"
"""Name of the seed that ``seed_from`` brings."""

Search = TypeVar("Search", bound=PooledSearch[Any])


class LevelRun(SearchRun[AllocationSearchConfig, Search]):
    """One session of a search over level vectors."""

    kind = KIND
    worker_factory = "evoprune.fitness.allocation_worker:build"
    pure_jobs: ClassVar[tuple[str, ...]] = ("allocate", "levels", "heldout", "replayed")
    _database = ""

    def tokens_of(self, job: Job) -> int:
        return (job.payload["last"] - job.payload["first"]) * self.context.window

    @abstractmethod
    def space(self, sites: list[Site]) -> LevelSpace:
        """The genomes that the configuration allows.

        Raises:
            InvalidInput: the budget is beyond the levels that there are.
        """

    @abstractmethod
    def place(self, space: Any, sparsities: list[float], budget: float, rng: random.Random) -> Genome:
        """The genome nearest to sparsities of every matrix that removes `budget` of all weights.

        Raises:
            InvalidInput: there is none.
        """

    def seeds_identity(self) -> dict[str, Any]:
        given = given_allocation(self.config)
        formula = given_formula(self.config)
        return {
            "allocators": list(self.config.seeds),
            "given": None if given is None else to_json(given),
            "formula": None if formula is None else formula.to_json(),
        }

    def before_preparing(self) -> dict[str, Any]:
        return {"compressor": self.config.target.compressor}

    def prepare(self, first: First, ask: Ask) -> Summary:
        prepared = super().prepare(first, ask)
        self.space(sites_of(prepared))  # what cannot be is refused before the work of hours
        payload = self._making(prepared)
        grid = payload["grid"]
        size = stored_bytes(sites_of(prepared), prepared.facts["identity"]["dtype"], grid)
        details = (
            f": {len(grid)} levels of every matrix by {payload['compressor']}, {size / 2**20:,.0f} MiB in the cache"
        )
        self.phase("building the level database", details if grid else "")
        built = first("database", payload)
        if grid:
            self.progress.line(f"its levels took {built['seconds']:.3g} s")
        self._database = built["database"]
        self._hold(database=self._database)
        # What levels are worth depends on the bits of the database.
        self.identity = content_hash([self.identity, self._database])
        return prepared

    @property
    def counted_by_loop(self) -> bool:
        return False

    def criterion(self) -> dict[str, Any]:
        """The criterion inside, as jobs spell it."""
        return criterion_json(self.config.target.metric, load_metric(self.config.target.metric))

    def job_payload(self, prepared: Summary) -> dict[str, Any]:
        """What every measurement of levels has to know."""
        return {**self._making(prepared), "database": self._database}

    def _making(self, prepared: Summary) -> dict[str, Any]:
        """What the level database is made from."""
        target = self.config.target
        return {
            "prepared": prepared.name,
            "criterion": self.criterion(),
            "compressor": target.compressor,
            "grid": list(target.stored or ()),
        }

    def start_genomes(self, space: LevelSpace, prepared: Summary, ask: Ask) -> dict[str, Genome]:
        """Genomes to start from, by name: what the allocators ask for at every budget, and what is given.

        Where parts only go as a whole, allocators rank them, and chance stands where uniform sparsity does otherwise.

        Raises:
            InvalidInput: what is given is of another model, or no budget can be met.
        """
        # What cannot be is refused before anybody works for it.
        given = self._given(space, prepared)
        budgets = self._possible(space)
        self.phase("asking the allocators")
        asked = [(name, budget) for name in self.config.seeds for budget in budgets]
        jobs = []
        for name, budget in asked:
            payload = {"criterion": self.criterion(), "allocator": name, "target": budget, "repaired": not space.only}
            key = content_hash([self.identity, "allocate", payload])
            jobs.append(Job(key, "allocate", {"prepared": prepared.name, **payload}))
        reference = self.config.target.reference
        references: dict[str, Genome] = {}
        if space.only:
            references = {self._seed_name(reference, budget): self._even(space, budget) for budget in budgets}
        others: dict[str, Genome] = {}
        for (name, budget), outcome in zip(asked, ask(jobs, limited=False), strict=True):
            seed = self._seed_name(name, budget)
            try:
                if outcome.status != "ok":
                    raise failure(outcome)
                genome = self._placed(space, seed, outcome.values["sparsities"], budget)
            except EvopruneError as error:
                if name == reference:
                    raise
                self.progress.line(f"warning: no seed by {seed}: {str(error).strip().splitlines()[-1]}")
                continue
            (references if name == reference else others)[seed] = genome
        # A budget of evaluations too small for all seeds is spent on the first of them.
        return {**references, **({} if given is None else {GIVEN: given}), **others}

    def _possible(self, space: LevelSpace) -> list[float]:
        """The budgets that the reference can be brought to.

        Raises:
            InvalidInput: there is none.
        """
        found, refused = [], []
        for budget in self.config.budgets:
            try:
                self._even(space, budget)
                found.append(budget)
            except InvalidInput as error:
                refused.append((budget, error))
        if not found:
            raise refused[0][1]
        for budget, reason in refused:
            self.progress.line(f"warning: no seeds at a sparsity of {budget:g}: {reason}")
        return found

    def _seed_name(self, name: str, budget: float) -> str:
        return name if len(self.config.budgets) == 1 else f"{name}@{budget:g}"

    def _given(self, space: LevelSpace, prepared: Summary) -> Genome | None:
        """The genome nearest to what `seed_from` names, at a budget of this run."""
        allocation = given_allocation(self.config)
        if allocation is None:
            return None
        try:
            allocation.check(prepared.facts["model_class"], space.sites)
        except InvalidInput as error:
            raise InvalidInput(f"{self.config.seed_from}: {error}") from None
        if doubt := allocation.doubt(prepared.facts["fingerprint"]):
            self.progress.line(f"warning: {doubt}")
        # Counted in whole columns, as the file means it, for `near` rounds what lies between two of them.
        asked = [site.removed / site.weights for site in allocation.sites]
        low, high = self.config.budgets[0], self.config.budgets[-1]
        budget = min(max(allocation.removed / allocation.weights, low), high)
        wanted = removed_count(budget, allocation.weights)
        if not space.only and abs(allocation.removed - wanted) > min(site.out_features for site in space.sites):
            asked = [*repair(asked, space.sites, budget)]
        return self._placed(space, GIVEN, asked, budget)

    def _even(self, space: LevelSpace, budget: float) -> Genome:
        """The reference at a budget; see `LevelSpace.even`."""
        rng = self._rng(self._seed_name(self.config.target.reference, budget))
        return self.place(space, space.even(budget, rng), budget, rng)

    def _placed(self, space: LevelSpace, seed: str, sparsities: list[float], budget: float) -> Genome:
        return self.place(space, sparsities, budget, self._rng(seed))

    def _rng(self, seed: str) -> random.Random:
        return random.Random(derived_seed(self.config.seed, f"seed-{seed}", 0))


def sites_of(prepared: Summary) -> list[Site]:
    """The matrices of a prepared model, in model order."""
    return [Site(**site) for site in prepared.facts["sites"]]


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
    if config.seed_from is None:
        return None
    file = allocation_file(config.seed_from)
    if read_formula(file) is None:
        return read_allocation(file)
    if not breeder_of(config.searcher.name).reads:
        raise InvalidInput(
            f"{config.seed_from} holds a formula, which only a search of formulas can start from: add "
            "--searcher formula"
        )
    return None
