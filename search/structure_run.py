"""A structure search from configuration to result."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from evoprune.fitness.latency_table import LatencyTable, read_table
from evoprune.fitness.prepare import Summary
from evoprune.fitness.structure_database import PARTS
from evoprune.fitness.unit_costs import UnitCosts, kept_by
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import content_hash, derived_seed
from evoprune.metrics.shape import Shape
from evoprune.metrics.shape_file import to_json
from evoprune.search.breeders.switches import Switches
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.dynamic_program import least_error_genome
from evoprune.search.engine.executor import Job
from evoprune.search.generation_search import GenerationSearch, Stage
from evoprune.search.given import given_shape
from evoprune.search.kinds.structure import KIND
from evoprune.search.level_run import GIVEN
from evoprune.search.result import failure
from evoprune.search.search_run import Plan, SearchRun, generation_plan
from evoprune.search.spaces.ladder import Genome, by_genome
from evoprune.search.spaces.structure import StructureSpace, ladders
from evoprune.search.structure_result import (
    LEAST_ERROR,
    UNIFORM,
    StructureComparison,
    choice,
    spelled_widths,
)
from evoprune.search.worker_session import Ask, First


class StructureRun(SearchRun[StructureSearchConfig, GenerationSearch[StructureSpace]]):
    """One session of a search for a shape."""

    kind = KIND
    worker_factory = "evoprune.fitness.structure_worker:build"
    pure_jobs: ClassVar[tuple[str, ...]] = (
        "costs", "block", "choose", "errors", "shape", "recovered", "units", "heldout",
    )  # fmt: skip
    _database = ""
    _training_tokens = 0
    _costs: UnitCosts
    _counted: UnitCosts
    _table: LatencyTable | None = None
    _given: Shape | None

    def seeds_identity(self) -> dict[str, Any]:
        given = given_shape(self.config.seed_from)
        return {"criteria": list(self.config.seeds), "given": None if given is None else to_json(given)}

    def prepare(self, first: First, ask: Ask) -> Summary:
        prepared = super().prepare(first, ask)
        target = self.config.target
        quantity = "flops" if target.cost == "latency" else target.cost
        asked = {"quantity": quantity, "batch": target.batch, "sequence": target.sequence}
        self._costs = self._counted = UnitCosts.from_json(first("costs", asked))
        if target.cost == "latency":
            self._table = self._measured(ask)
            self._costs = self._table.budget()
        # What cannot be is refused before the work of hours.
        self._even(self.space())
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
                first("database", {"accumulation": "path", "path": values["path"]})
        # What shapes are worth depends on the bits of the database.
        self.identity = content_hash([self.identity, self._database])

    @property
    def counted_by_loop(self) -> bool:
        return False

    def space(self) -> StructureSpace:
        """The shapes that the configuration allows.

        Raises:
            InvalidInput: the budget is out of reach.
        """
        target = self.config.target
        options: dict[str, Any] = {"heads": target.heads, "drop": target.drop, "step": target.step}
        if target.speedup is not None:
            return StructureSpace.at_speedup(self._costs, target.speedup, **options)
        assert target.sparsity is not None
        return StructureSpace(self._costs, target.sparsity, **options)

    def plan(self) -> Plan:
        searcher = self.config.searcher
        plan = generation_plan(searcher, self.config.data.window)
        # The parent's recovery is known from when it was a child.
        recovered = searcher.stages[-2].survivors * self._recovery_tokens / searcher.offspring
        return replace(plan, per_candidate=plan.per_candidate + recovered)

    @property
    def _recovery_tokens(self) -> int:
        """Tokens of forward passes that the recovery of one candidate, and its measurement, cost."""
        selection, data = self.config.searcher.selection, self.config.data
        if selection == "one-shot":
            return 0
        # Backwards through a pass takes twice as long; a refit goes through each block for its two outputs, and on.
        refit = data.calibration_sequences * data.calibration_window
        recovery = 3 * (self._training_tokens if selection == "training-aware" else refit)
        return recovery + self.config.searcher.windows * data.window

    def tokens_of(self, job: Job) -> int:
        return self._recovery_tokens if job.kind == "recovered" else super().tokens_of(job)

    def tokens_asked(self, job: Job) -> int:
        return super().tokens_asked(job) + (self._recovery_tokens if "selection" in job.payload else 0)

    def deadline_of(self, job: Job) -> float | None:
        # Orders of removal take what they take, as before the search.
        return None if job.kind == "rebuilt" else super().deadline_of(job)

    def build_search(self, prepared: Summary, ask: Ask) -> GenerationSearch[StructureSpace]:
        config, space = self.config, self.space()
        self._run.add_identity(widths=spelled_widths(self._costs))
        payload = {
            "prepared": prepared.name,
            "accumulation": config.first_accumulation,
            "database": self._database,
        }
        self._named = self._seeds(space, payload, ask)
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
            selection=config.selection,
            rebuild_every=config.searcher.rebuild if config.target.accumulation == "path" else None,
        )

    def comparison(self, prepared: Summary, search: GenerationSearch[StructureSpace], ask: Ask) -> StructureComparison:
        comparison = StructureComparison(
            self.config, self.identity, search, self._named, self._run, self._counted, self._training_tokens
        )
        if self._table is not None:
            # While nothing else runs, as the parts were.
            self.phase("measuring the winner end to end")
            (outcome,) = ask([comparison.timing_job(self._table)], limited=False)
            if outcome.status != "ok":
                raise failure(outcome)
            comparison.take_times(self._table, outcome.values["nanoseconds"])
        return comparison

    def _measured(self, ask: Ask) -> LatencyTable:
        """The table that the configuration names, or one that is measured once; an interrupted run keeps it."""
        target = self.config.target
        given = None if target.table is None else read_table(target.table).to_json()
        payload = {
            **{name: getattr(target, name) for name in ("batch", "sequence", "decode")},
            "neurons": ladders(self._counted, target.step),
            "table": given,
        }
        self.phase("measuring how long parts take")
        (outcome,) = ask([Job(content_hash([self.identity, "latency", payload]), "latency", payload)], limited=False)
        if outcome.status != "ok":
            raise failure(outcome)
        self._hold(latencies=content_hash(outcome.values["costs"]))
        return LatencyTable.from_json(outcome.values)

    def _seeds(self, space: StructureSpace, payload: dict[str, Any], ask: Ask) -> dict[str, Genome]:
        """Genomes to start from, by name: the same everywhere, what the criteria of units keep, and what is given."""
        found = {UNIFORM: self._even(space)}
        if self._given is not None:
            found[GIVEN] = space.near_shape([kept_by(block) for block in self._given.blocks], self._rng(GIVEN))
        asked = {"database": self._database}
        (outcome,) = ask([Job(content_hash([self.identity, "errors"]), "errors", asked)], limited=False)
        if outcome.status != "ok":
            raise failure(outcome)
        errors = errors_of_choices(space, outcome.values["errors"])
        found[LEAST_ERROR] = least_error_genome(space, errors, self._rng(LEAST_ERROR))
        return found | self._by_criteria(space, payload, ask)

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

    def _by_criteria(self, space: StructureSpace, payload: dict[str, Any], ask: Ask) -> dict[str, Genome]:
        """What criteria of units keep of every block, by their names.

        They are compared between blocks here, whatever their authors do: the same fraction everywhere is a seed of its
        own.
        """
        if space.costs.quantity == "kv_bytes":
            self.progress.line("no seeds by criteria of units: these count neurons, which have no keys and values")
            return {}
        self.phase("asking the criteria of units")
        jobs = [
            Job(content_hash([self.identity, "choose", asked]), "choose", {**payload, **asked})
            for asked in (choice(self._counted, space.fraction, name, "global") for name in self.config.seeds)
        ]
        found = {}
        for name, outcome in zip(self.config.seeds, ask(jobs, limited=False), strict=True):
            try:
                if outcome.status != "ok":
                    raise failure(outcome)
                kept = [(groups, heads, neurons) for groups, heads, neurons in outcome.values["kept"]]
                found[name] = space.near_shape(kept, self._rng(name))
            except EvopruneError as error:
                self.progress.line(f"warning: no seed by {name}: {str(error).strip().splitlines()[-1]}")
        return found

    def _even(self, space: StructureSpace) -> Genome:
        """What loses the same everywhere, as near as it can be."""
        return space.near(space.even(), self._rng(UNIFORM))

    def _rng(self, seed: str) -> random.Random:
        return random.Random(derived_seed(self.config.seed, f"seed-{seed}", 0))


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
