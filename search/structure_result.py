"""What a structure search found: winner, seeds and published methods on held-out text, and the winner's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evoprune.fitness.latency_table import LatencyTable, write_table
from evoprune.fitness.part_merges import Merged
from evoprune.fitness.structure_weights import Method, RefitRecipe, with_merges
from evoprune.fitness.unit_costs import UnitCosts
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import content_hash
from evoprune.metrics.shape import BlockShape, BlockWidths, Shape
from evoprune.metrics.shape_file import from_rows, read_shape, write_shape
from evoprune.search.calibration import calibration_facts
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.generation_search import GenerationSearch
from evoprune.search.objective_words import objective_facts
from evoprune.search.pooled_search import Member, PooledSearch
from evoprune.search.replaying import REFITTED
from evoprune.search.result import failure, paired_difference, summary
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.structure import StructureSpace

UNIFORM = "uniform"
"""The seed that loses the same fraction everywhere."""
LEAST_ERROR = "dp"
"""The seed with the least sum of the output errors of all parts."""
TRAINED = " trained"
"""Behind a name: the same shape after the training of training-aware selection."""
ALONE = " alone"
"""Behind a criterion's name: its own choice of units, as its authors make it, without the refit of the database."""


def choice(counted: UnitCosts, fraction: float, criterion: str, spread: str | None) -> dict[str, Any]:
    """How jobs ask for a criterion's choice of units.

    Args:
        counted: costs that follow from shapes alone.
        fraction: of these that goes.
        criterion: its name.
        spread: where its scores are compared; None where its authors do.
    """
    return {"criterion": criterion, "spread": spread, "costs": counted.to_json(), "fraction": fraction}


def spelled_widths(costs: UnitCosts) -> list[list[int]]:
    """What the dense blocks have, as [KV groups, query heads in all of them, neurons]."""
    return [[width.groups, width.heads, width.neurons] for width in costs.widths]


def heldout_job(identity: str, payload: Mapping[str, Any], entrant: Mapping[str, Any]) -> Job:
    """Measures an entrant on held-out text.

    Args:
        identity: hash of everything that this depends on beside the entrant.
        payload: what every job says.
        entrant: ``shape`` (None: the dense model), or a `choice`.
    """
    return Job(content_hash([identity, "heldout", entrant]), "heldout", {**payload, **entrant})


def units_job(identity: str, payload: Mapping[str, Any], entrant: Mapping[str, Any]) -> Job:
    """Asks which units stay of an entrant; arguments as of `heldout_job`."""
    return Job(content_hash([identity, "units", entrant]), "units", {**payload, **entrant})


def units_of(outcome: Outcome) -> tuple[BlockShape, ...]:
    """What `units_job` found.

    Raises:
        EvopruneError: it failed.
    """
    if outcome.status != "ok":
        raise failure(outcome)
    return tuple(BlockShape(*(tuple(kept) for kept in block)) for block in outcome.values["blocks"])


def run_facts(
    config: StructureSearchConfig, search: PooledSearch[Any], run: RunDirectory, costs: UnitCosts, evaluations: int
) -> dict[str, Any]:
    """What ``result.json`` says of the search as a whole."""
    return {
        "run": run.run_id,
        "kind": "structure",
        "model": config.model.name,
        "cost": config.target.cost,
        "accumulation": config.target.accumulation,
        "selection": config.searcher.selection,
        **objective_facts(config),
        "seed": config.seed,
        "evaluations": evaluations,
        "births": search.births,
        "distinct": len({tuple(line["genome"]) for line in run.history()}),
        "generations": search.last_generation,
        "reasons": dict(sorted(search.reasons.items())),
        "final_tokens": config.searcher.windows * config.data.window,
        "window": config.data.window,
        "data": config.data.source,
        "calibration": calibration_facts(config.data),
        "widths": spelled_widths(costs),
        "dense_cost": costs.dense,
        "rest_cost": costs.rest,
    }


def refit_recipe(config: StructureSearchConfig) -> RefitRecipe:
    """How the weights that the search measures are made, before anything is rebuilt."""
    method: Method = "path-refit" if config.searcher.selection == "path-refit" else "database"
    data = calibration_facts(config.data)
    correction = config.target.correction
    return RefitRecipe(
        method, config.first_accumulation, **data, seed=config.seed, threads=config.threads, correction=correction
    )


def write_whole(
    blocks: Sequence[BlockShape],
    recipe: RefitRecipe,
    config: StructureSearchConfig,
    run: RunDirectory,
    widths: Sequence[BlockWidths],
    target: Mapping[str, Any],
    file: Path,
    merging: Sequence[Merged] = (),
) -> None:
    """Write a shape as a file that `prune` takes, and read it back.

    Args:
        blocks: which units stay.
        recipe: how the weights are made.
        widths: of the dense blocks.
        target: what was asked for.
        merging: of every block, whether its attention and its MLP are merged; none says of none.

    Raises:
        EvopruneError: the file does not give it back.
    """
    identity = run.identity
    target = {**target, "cost": config.target.cost, "run": run.run_id}
    model, fingerprint = identity["model_class"], identity["model_fingerprint"]
    weights = with_merges(recipe.to_json(), merging)
    shape = Shape(model, fingerprint, tuple(blocks), tuple(widths), weights, target)
    write_shape(shape, file)
    if read_shape(file) != shape:
        raise EvopruneError(f"{file} does not give the shape back")


class StructureComparison:
    """The winner of a search beside its seeds, and beside what the criteria of units do by themselves.

    Args:
        config: of the run.
        identity: hash of everything that an evaluation depends on beside its candidate.
        search: at its end.
        seeds: genomes to start from, by name; equal ones are one candidate of the search.
        run: what it is a run of.
        counted: costs by which criteria of units choose; those of the space, unless these are times.
        training_tokens: that a candidate was trained on before it was selected.

    Raises:
        InvalidInput: no candidate has a fitness.
    """

    def __init__(
        self,
        config: StructureSearchConfig,
        identity: str,
        search: GenerationSearch[StructureSpace],
        seeds: Mapping[str, Genome],
        run: RunDirectory,
        counted: UnitCosts,
        training_tokens: int = 0,
    ) -> None:
        if search.best is None:
            raise InvalidInput("no candidate could be evaluated; `evoprune show` counts the reasons")
        self._config = config
        self._identity = identity
        self._search = search
        self._best: Member = search.best
        self._seeds = seeds
        self._run = run
        self._counted = counted
        self._training_tokens = training_tokens
        self._table: LatencyTable | None = None
        self._times: dict[str, Any] = {}
        self._blocks: tuple[BlockShape, ...] = ()
        self._fitness = {genome: search.seed_fitness.get(name) for name, genome in search.seeds.items()}

    def timing_job(self, table: LatencyTable) -> Job:
        """The dense model and the winner, end to end."""
        shapes = [None, self._search.space.spelled(self._best.genome)]
        payload = {"pass": table.work.to_json(), "shapes": shapes}
        return Job(content_hash([self._identity, "whole-latency", payload]), "whole-latency", payload)

    def take_times(self, table: LatencyTable, nanoseconds: Sequence[int]) -> None:
        """What `timing_job` found; the result then says it beside the sums of parts, as these were measured."""
        costs, (dense, winner) = table.costs, nanoseconds
        kept = self._search.space.shape(self._best.genome)
        predicted = {"dense": costs.rest + costs.dense, "winner": costs.rest + costs.of(kept)}
        self._table = table
        self._times = {
            **table.work.to_json(),
            "device": table.place["device"],
            "predicted": {**predicted, "speedup": predicted["dense"] / predicted["winner"]},
            "measured": {"dense": dense, "winner": winner, "speedup": dense / winner},
            "gap": winner / predicted["winner"] - 1,
        }

    def jobs(self) -> list[Job]:
        """Every entrant on held-out text, and the winner's units."""
        space, payload = self._search.space, self._search.payload
        method, selection = self._config.searcher.selection, self._search.selection
        shapes = {name: space.spelled(genome) for name, genome in {"winner": self._best.genome, **self._seeds}.items()}
        # A path refit can be done again by whoever has the shape; what a training has made is thrown away.
        refit = {"selection": selection} if method == "path-refit" else {}
        entrants: dict[str, dict[str, Any]] = {"dense": {"shape": None}}
        entrants |= {name: {"shape": shape, **refit} for name, shape in shapes.items()}
        for name in self._config.criteria:
            if space.costs.quantity != "kv_bytes":
                entrants[name + ALONE] = choice(self._counted, space.fraction, name, None)
        if method == "training-aware":
            entrants |= {name + TRAINED: {"shape": shape, "selection": selection} for name, shape in shapes.items()}
        elif method == "one-shot" and not any(map(any, self._merged())):
            entrants[REFITTED] = {"shape": shapes["winner"], "selection": self._config.path_refit}
        self._entrants = list(entrants)
        # Seeds were measured before anything was rebuilt, and are compared as they were.
        rebuilt = {"database": self._search.payload_of(self._best)["database"]} if self._best.rebuild else {}
        for name in entrants.keys() & {"winner", "winner" + TRAINED, REFITTED}:
            entrants[name] |= rebuilt
        jobs = [heldout_job(self._identity, payload, entrant) for entrant in entrants.values()]
        return [*jobs, units_job(self._identity, payload, {"shape": shapes["winner"], **rebuilt})]

    def result(self, run_id: str, evaluations: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        *measured, units = outcomes
        losses: dict[str, Mapping[str, Any]] = {}
        for name, outcome in zip(self._entrants, measured, strict=True):
            if outcome.status == "ok":
                losses[name] = outcome.values
            elif name in ("dense", "winner"):
                raise failure(outcome)
        self._blocks = units_of(units)
        config, search, best, space = self._config, self._search, self._best, self._search.space
        genomes: dict[str, Genome | None] = {
            **self._seeds,
            **{name: None for name in losses if name.endswith(ALONE)},
        }
        return {
            **run_facts(config, search, self._run, space.costs, evaluations),
            "target": f"{space.fraction:g}",
            **({} if self._table is None else {"speedup": config.target.speedup, "latency": self._times}),
            **({} if search.selection is None else {"recovered": self._recovered()}),
            **({"rebuilds": len(search.rebuilds)} if config.target.accumulation == "path" else {}),
            "stage_tokens": [stage.windows * config.data.window for stage in config.searcher.stages],
            "dense": {"heldout": summary(losses["dense"])},
            "baselines": [
                {
                    "name": name,
                    "fitness": None if genome is None else self._fitness.get(genome),
                    "shape": losses[name]["kept"] if genome is None else space.spelled(genome),
                    "cost": space.costs.of(losses[name]["kept"] if genome is None else space.shape(genome)),
                    "heldout": summary(losses[name]),
                    **_trained(losses, name),
                    "winner_minus_this": paired_difference(losses["winner"], losses[name]),
                }
                for name, genome in genomes.items()
                if name in losses
            ],
            "best": {
                "birth": best.birth,
                "generation": best.generation,
                "origin": best.origin,
                "fitness": best.kl,
                "stderr": best.stderr,
                "shape": space.spelled(best.genome),
                "cost": space.costs.of(space.shape(best.genome)),
                "removed": space.removed(best.genome),
                "heldout": summary(losses["winner"]),
                **_trained(losses, "winner"),
                **(_refitted(losses) if REFITTED in self._entrants else {}),
            },
            "front": [],
        }

    def _merged(self) -> list[Merged]:
        """Whether attention and MLP of every block of the winner are merged."""
        return self._search.space.merging(self._best.genome)

    def _recovered(self) -> dict[str, int]:
        """How many candidates went through what selection asks for, and what they were trained on."""
        lines = (line for line in self._run.history() if line["stage"] in self._search.recovered)
        # The same shape on another database is another candidate.
        count = len({(tuple(line["genome"]), line.get("recovered")) for line in lines})
        tokens = {"tokens_each": self._training_tokens, "tokens": count * self._training_tokens}
        return {"candidates": count, **(tokens if self._training_tokens else {})}

    def export(self, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Write the winner as ``shape.json``, and read it back.

        Raises:
            EvopruneError: it does not give the winner back.
        """
        folder = run.path / "export"
        folder.mkdir(exist_ok=True)
        config, widths = self._config, self._search.space.costs.widths
        asked = {"sparsity": config.target.sparsity, "speedup": config.target.speedup}
        target = {name: value for name, value in asked.items() if value is not None}
        recipe = refit_recipe(config)
        if self._best.rebuild and recipe.method == "database":
            path = from_rows(self._search.rebuilds[self._best.rebuild - 1]["path"], widths)
            recipe = replace(recipe, accumulation="path", path=path)
        merging = self._merged()
        write_whole(self._blocks, recipe, config, run, widths, target, folder / "shape.json", merging)
        if self._table is not None:
            write_table(self._table, folder / "latency.json")


def _refitted(losses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What held-out text says of the winner after a path refit; nothing but None where it failed."""
    if REFITTED not in losses:
        return {"refitted": None}
    difference = paired_difference(losses["winner"], losses[REFITTED])
    return {"refitted": summary(losses[REFITTED]), "winner_minus_refitted": difference}


def _trained(losses: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """What held-out text says of an entrant after training, if it was trained."""
    return {"trained": summary(losses[name + TRAINED])} if name + TRAINED in losses else {}
