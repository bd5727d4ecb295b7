"""A structure search from configuration to result, and what all searches over shapes share."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from evoprune.fitness.latency_table import LatencyTable, read_table
from evoprune.fitness.prepare import Summary
from evoprune.fitness.structure_weights import merging_in
from evoprune.fitness.unit_costs import UnitCosts, kept_by
from evoprune.fitness.units import PARTS
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import content_hash, derived_seed
from evoprune.metrics.shape import Shape
from evoprune.metrics.shape_file import to_json
from evoprune.search.breeders.switches import Switches
from evoprune.search.config_structure import ALLOCATED_BY, StructureSearchConfig
from evoprune.search.dynamic_program import Spdy, least_error_genome
from evoprune.search.engine.executor import Job
from evoprune.search.generation_search import GenerationSearch, Stage
from evoprune.search.given import given_shape
from evoprune.search.kinds.structure import KIND
from evoprune.search.level_run import GIVEN, sites_of
from evoprune.search.pooled_search import PooledSearch
from evoprune.search.result import failure
from evoprune.search.search_run import Plan, SearchRun, generation_plan
from evoprune.search.spaces.ladder import Genome, by_genome
from evoprune.search.spaces.structure import StructureSpace, ladders, part_sparsities
from evoprune.search.structure_result import (
    LEAST_ERROR,
    UNIFORM,
    StructureComparison,
    choice,
    spelled_widths,
)
from evoprune.search.tables import COUNTED
from evoprune.search.worker_session import Ask, First

METHOD = " method"
"""Ends the name of a seed that a method makes, which a criterion of units may share its name with."""

Search = TypeVar("Search", bound=PooledSearch[Any])


COARSE = 0.01
"""By how much of all costs more may go than was asked for before that is worth a word."""


class ShapesRun(SearchRun[StructureSearchConfig, Search]):
    """One session of a search over shapes: costs, the database, and the genomes that it starts from."""

    kind = KIND
    worker_factory = "evoprune.fitness.structure_worker:build"
    pure_jobs: ClassVar[tuple[str, ...]] = (
        "costs", "block", "choose", "method", "allocate", "errors", "shape", "recovered", "units", "heldout",
    )  # fmt: skip
    _database = ""
    _training_tokens = 0
    _costs: UnitCosts
    _counted: UnitCosts
    _table: LatencyTable | None = None
    _given: Shape | None
    _errors: Sequence[Any]
    _spaces: list[tuple[str, StructureSpace]]

    def seeds_identity(self) -> dict[str, Any]:
        given = given_shape(self.config.seed_from)
        return {"criteria": list(self.config.seeds), "given": None if given is None else to_json(given)}

    def prepare(self, first: First, ask: Ask) -> Summary:
        prepared = super().prepare(first, ask)
        target = self.config.target
        # Criteria of units choose by what follows from shapes alone.
        quantity = "flops" if target.cost == "latency" else target.cost
        asked = {"quantity": quantity, "batch": target.batch, "sequence": target.sequence}
        self._costs = self._counted = UnitCosts.from_json(first("costs", asked))
        if target.timed:
            self._table = self._measured(ask)
            if target.cost == "latency":
                self._costs = self._table.budget()
        # What cannot be is refused before the work of hours.
        self._spaces = self._possible()
        self._given = self._checked(prepared)
        if self.config.searcher.selection == "training-aware":
            training = self.config.searcher.training.resolved()
            self.phase("running the dense model over the text to train on", f": {training.tokens:,} tokens")
            self._training_tokens = first("training", training.to_json())["tokens"]
        self._build_database(first, ask)
        return prepared

    def _build_database(self, first: First, ask: Ask) -> None:
        """Have the database built; by all workers, where blocks do not depend on each other."""
        accumulation = self.config.first_accumulation
        self.phase("building the structured database", f": {accumulation} accumulation")
        if accumulation == "dense":
            jobs = [
                Job(content_hash([self.identity, "block", block]), "block", {"block": block})
                for block in range(len(self._costs.widths))
            ]
            for outcome in ask(jobs, limited=False):
                if outcome.status != "ok":
                    raise failure(outcome)
        self._database = first("database", {"accumulation": accumulation})["database"]
        self._hold(database=self._database)
        if self.config.target.accumulation == "path":
            # What sessions before this one had built is found where it was, unless the cache was emptied since.
            for values in [outcome.values for outcome in self._log.outcomes() if "path" in outcome.values]:
                asked = {"path": values["path"], "correction": self.config.target.correction}
                first("database", {"accumulation": "path", **asked})
        # What shapes are worth depends on the bits of the database.
        self.identity = content_hash([self.identity, self._database])

    @property
    def counted_by_loop(self) -> bool:
        return False

    @property
    def measures_time(self) -> bool:
        return self.config.target.timed

    @abstractmethod
    def spaces(self) -> list[tuple[str, StructureSpace]]:
        """The budgets that seeds are made for: what stands behind a seed's name, and the shapes of that budget.

        Raises:
            InvalidInput: a budget is out of reach.
        """

    @abstractmethod
    def space_at(self, fraction: float) -> StructureSpace:
        """The shapes of the budget that is nearest to this one."""

    @property
    def options(self) -> dict[str, Any]:
        """What every space of this run is told beside costs and budget."""
        target = self.config.target
        served = {"multiple": target.multiple, "residual": False} if target.serving_safe else {}
        return {"heads": target.heads, "drop": target.drop, "merge": target.merge, "step": target.step, **served}

    def job_payload(self, prepared: Summary) -> dict[str, Any]:
        """What every measurement of a shape has to know."""
        return {
            "prepared": prepared.name,
            "accumulation": self.config.first_accumulation,
            "database": self._database,
            "correction": self.config.target.correction,
        }

    def _measured(self, ask: Ask) -> LatencyTable:
        """The table that the configuration names, or one that is measured once; an interrupted run keeps it."""
        target = self.config.target
        given = None if target.table is None else read_table(target.table).to_json()
        payload = {
            **{name: getattr(target, name) for name in ("batch", "sequence", "decode")},
            "neurons": ladders(self._counted, target.step, target.multiple),
            "table": given,
        }
        self.phase("measuring how long parts take")
        (outcome,) = ask(
            [Job(content_hash([self.identity, "latency", payload]), "latency", payload)], limited=False, alone=True
        )
        if outcome.status != "ok":
            raise failure(outcome)
        self._hold(latencies=content_hash(outcome.values["costs"]))
        return LatencyTable.from_json(outcome.values)

    def _possible(self) -> list[tuple[str, StructureSpace]]:
        """Those of `spaces` whose budget can be met.

        Raises:
            InvalidInput: there is none.
        """
        found, refused = [], []
        for suffix, space in self.spaces():
            try:
                self._even(space)
                found.append((suffix, space))
            except InvalidInput as error:
                refused.append((space.fraction, error))
        if not found:
            raise refused[0][1]
        for fraction, reason in refused:
            self.progress.line(f"warning: no seeds at a budget of {fraction:g}: {reason}")
        return found

    def start_genomes(self, prepared: Summary, payload: dict[str, Any], ask: Ask) -> dict[str, Genome]:
        """Genomes to start from, by name: the same everywhere, what is given, and what others keep at every budget."""
        asked = {"database": self._database}
        (outcome,) = ask([Job(content_hash([self.identity, "errors"]), "errors", asked)], limited=False)
        if outcome.status != "ok":
            raise failure(outcome)
        self._errors = outcome.values["errors"]
        spaces = self._spaces
        found = {UNIFORM + suffix: self._even(space) for suffix, space in spaces}
        if self._given is not None:
            shape = [kept_by(block) for block in self._given.blocks]
            removed = 1 - self._costs.of(shape) / self._costs.dense
            space = self.space_at(removed)
            found[GIVEN] = space.merged_as(space.near_shape(shape, self._rng(GIVEN)), merging_in(self._given))
        for suffix, space in spaces:
            errors = errors_of_choices(space, self._errors)
            found[LEAST_ERROR + suffix] = least_error_genome(space, errors, self._rng(LEAST_ERROR))
        found |= self._by_methods(spaces, ask)
        return found | self._by_criteria(spaces, payload, ask) | self._by_allocators(spaces, prepared, ask)

    def _by_methods(self, spaces: Sequence[tuple[str, StructureSpace]], ask: Ask) -> dict[str, Genome]:
        """What methods keep of every block, by their names and `METHOD`; the database refits it."""
        if not self.config.searcher.methods:
            return {}
        self.phase("asking the methods")
        entrants = [(name + METHOD, suffix, space) for name in self.config.searcher.methods for suffix, space in spaces]
        jobs = []
        for name, _, space in entrants:
            asked = {"method": name.removesuffix(METHOD), "sparsity": space.fraction}
            jobs.append(Job(content_hash([self.identity, "method", asked]), "method", asked))
        return self._kept_by(entrants, jobs, ask)

    def _checked(self, prepared: Summary) -> Shape | None:
        """What ``seed_from`` names.

        Raises:
            InvalidInput: it is of another model.
        """
        given = given_shape(self.config.seed_from)
        if given is None:
            return None
        try:
            given.check(prepared.facts["model_class"], self._costs.widths)
        except InvalidInput as error:
            raise InvalidInput(f"{self.config.seed_from}: {error}") from None
        if given.fingerprint != prepared.facts["fingerprint"]:
            self.progress.line("warning: the shape was found on other weights of this class")
        return given

    def _by_criteria(
        self, spaces: Sequence[tuple[str, StructureSpace]], payload: dict[str, Any], ask: Ask
    ) -> dict[str, Genome]:
        """What criteria of units keep of every block, by their names.

        They are compared between blocks here, whatever their authors do: the same fraction everywhere is a seed of its
        own.
        """
        if not self.config.criteria:
            return {}
        if self._costs.quantity == "kv_bytes":
            self.progress.line("no seeds by criteria of units: these count neurons, which have no keys and values")
            return {}
        self.phase("asking the criteria of units")
        entrants = [(name, suffix, space) for name in self.config.criteria for suffix, space in spaces]
        jobs = [
            Job(content_hash([self.identity, "choose", asked]), "choose", {**payload, **asked})
            for asked in (choice(self._counted, space.fraction, name, "global") for name, _, space in entrants)
        ]
        return self._kept_by(entrants, jobs, ask)

    def _kept_by(
        self, entrants: Sequence[tuple[str, str, StructureSpace]], jobs: Sequence[Job], ask: Ask
    ) -> dict[str, Genome]:
        """Genomes near to what jobs say is kept, by name; without those that fail, which is said."""
        found = {}
        for (name, suffix, space), outcome in zip(entrants, ask(jobs, limited=False), strict=True):
            try:
                if outcome.status != "ok":
                    raise failure(outcome)
                kept = [(groups, heads, neurons) for groups, heads, neurons in outcome.values["kept"]]
                found[name + suffix] = space.near_shape(kept, self._rng(name))
            except EvopruneError as error:
                self._no_seed(name + suffix, error)
        return found

    def _by_allocators(
        self, spaces: Sequence[tuple[str, StructureSpace]], prepared: Summary, ask: Ask
    ) -> dict[str, Genome]:
        """What allocators want of matrices, as shapes: attentions and MLPs lose what theirs would on average."""
        if not self.config.allocators:
            return {}
        self.phase("asking the allocators")
        sites = sites_of(prepared)
        entrants = [(name, suffix, space) for name in self.config.allocators for suffix, space in spaces]
        jobs = []
        for name, _, space in entrants:
            payload = {
                "criterion": {"name": ALLOCATED_BY}, "allocator": name, "target": space.fraction, "repaired": True,
            }  # fmt: skip
            key = content_hash([self.identity, "allocate", payload])
            jobs.append(Job(key, "allocate", {"prepared": prepared.name, **payload}))
        found = {}
        for (name, suffix, space), outcome in zip(entrants, ask(jobs, limited=False), strict=True):
            try:
                if outcome.status != "ok":
                    raise failure(outcome)
                wanted = part_sparsities(sites, outcome.values["sparsities"])
                found[name + suffix] = space.near(wanted, self._rng(name))
            except EvopruneError as error:
                self._no_seed(name + suffix, error)
        return found

    def _no_seed(self, name: str, error: EvopruneError) -> None:
        """Say why a seed is missing; the search goes on without it."""
        self.progress.line(f"warning: no seed by {name}: {str(error).strip().splitlines()[-1]}")

    def _even(self, space: StructureSpace) -> Genome:
        """What loses the same everywhere, as near as it can be."""
        return space.near(space.even(), self._rng(UNIFORM))

    def _rng(self, seed: str) -> random.Random:
        return random.Random(derived_seed(self.config.seed, f"seed-{seed}", 0))


class StructureRun(ShapesRun[GenerationSearch[StructureSpace]]):
    """One session of a search for a shape."""

    def spaces(self) -> list[tuple[str, StructureSpace]]:
        return [("", self.space())]

    def space_at(self, fraction: float) -> StructureSpace:
        return self.space()

    def space(self) -> StructureSpace:
        """The shapes that the configuration allows.

        Raises:
            InvalidInput: the budget is out of reach.
        """
        target = self.config.target
        if target.speedup is not None:
            return StructureSpace.at_speedup(self._costs, target.speedup, **self.options)
        assert target.sparsity is not None
        return StructureSpace(self._costs, target.sparsity, **self.options)

    def plan(self) -> Plan:
        searcher = self.config.searcher
        plan = generation_plan(searcher, self.config.data.window)
        # The parent's recovery is known from when it was a child.
        recovered = searcher.stages[-2].survivors * self._recovery_tokens / searcher.offspring
        return replace(plan, per_candidate=plan.per_candidate + recovered)

    @property
    def _recovery_tokens(self) -> int:
        """Of what selection asks for; see `_recovery`."""
        selection = self.config.searcher.selection
        return 0 if selection == "one-shot" else self._recovery(selection)

    def _recovery(self, method: str) -> int:
        """Tokens of forward passes that the recovery of one candidate, and its measurement, cost."""
        data = self.config.data
        # Backwards through a pass takes twice as long; a refit goes through each block for its two outputs, and on, and
        # through the dense one for what it makes up for.
        refit = data.calibration_sequences * data.calibration_window
        passes = 3 + bool(self.config.target.correction)
        recovery = 3 * self._training_tokens if method == "training-aware" else passes * refit
        return recovery + self.config.searcher.windows * data.window

    def tokens_of(self, job: Job) -> int:
        return self._recovery_tokens if job.kind == "recovered" else super().tokens_of(job)

    def tokens_asked(self, job: Job) -> int:
        selection = job.payload.get("selection")
        return super().tokens_asked(job) + (0 if selection is None else self._recovery(selection["method"]))

    def deadline_of(self, job: Job) -> float | None:
        # Orders of removal take what they take, as before the search.
        return None if job.kind == "rebuilt" else super().deadline_of(job)

    def build_search(self, prepared: Summary, ask: Ask) -> GenerationSearch[StructureSpace]:
        config, space = self.config, self.space()
        removed = space.removed(self._even(space))
        if removed - space.budget > space.costs.dense * COARSE:
            self.progress.line(
                f"warning: steps are coarse here: {removed / space.costs.dense:.4g} of the "
                f"{COUNTED[config.target.cost]} of heads and MLPs goes, where {space.fraction:.4g} was asked for"
            )
        self._run.add_identity(widths=spelled_widths(self._costs))
        payload = self.job_payload(prepared)
        self._named = self.start_genomes(prepared, payload, ask)
        return GenerationSearch(
            space,
            by_genome(self._named),
            Switches(space, config.seed),
            [Stage(stage.windows, stage.survivors) for stage in config.searcher.stages],
            windows=config.searcher.windows,
            final_windows=config.searcher.windows,
            offspring=config.searcher.offspring,
            crossover=config.searcher.crossover,
            surrogate=config.searcher.surrogate,
            seed=config.seed,
            evaluations=config.evaluations,
            identity=self.identity,
            payload=payload,
            spdy=Spdy(space, errors_of_choices(space, self._errors), config.seed) if config.searcher.spdy else None,
            spdy_evaluations=config.searcher.spdy,
            selection=config.selection,
            rebuild_every=config.searcher.rebuild if config.target.accumulation == "path" else None,
        )

    def comparison(self, prepared: Summary, search: GenerationSearch[StructureSpace], ask: Ask) -> StructureComparison:
        seeds = {**self._named, **search.found_seeds}
        comparison = StructureComparison(
            self.config, self.identity, search, seeds, self._run, self._counted, self._training_tokens
        )
        if self._table is not None:
            # While nothing else runs, as the parts were.
            self.phase("measuring the winner end to end")
            (outcome,) = ask([comparison.timing_job(self._table)], limited=False, alone=True)
            if outcome.status != "ok":
                raise failure(outcome)
            comparison.take_times(self._table, outcome.values["nanoseconds"])
        return comparison


def errors_of_choices(space: StructureSpace, errors: Sequence[Any]) -> list[list[float]]:
    """Output errors of every gene at each of its choices.

    Args:
        space: of shapes of the model.
        errors: by widths, of the attention and the MLP of each block in turn; see `StructureDatabase.errors`.
    """
    tables = [errors[2 * gene.block + PARTS.index(gene.part)] for gene in space.parts]
    return [
        [_entry(table, gene.kept[option]) for option in gene.choices]
        for gene, table in zip(space.parts, tables, strict=True)
    ]


def _entry(table: Any, kept: tuple[int, ...]) -> float:
    """The entry of a table by widths; see `StructureDatabase.errors`."""
    for width in kept:
        table = table[width]
    return float(table)
