"""Allocation searches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.records import LEVELS
from evoprune.search.engine.trial_record import Range
from evoprune.search.kinds import BoardKind, files_of, generation_facts
from evoprune.search.spaces.levels import span_text
from evoprune.search.trials_generation import AllocationTrials

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from evoprune.search.config_allocation import AllocationSearchConfig
    from evoprune.search.kinds import Session
    from evoprune.search.pooled_search import PooledSearch
    from evoprune.search.rundir import RunDirectory


class AllocationKind:
    """How much each matrix loses."""

    name = "allocation"
    winner = "allocation"
    endings: tuple[str, ...] = (".json", ".txt", ".py")
    descriptors: Mapping[str, Range] = AllocationTrials.ranges

    def session(self, config: AllocationSearchConfig) -> type[Session]:
        if config.target.pareto is not None:
            from evoprune.search.pareto_run import ParetoRun

            return ParetoRun
        from evoprune.search.allocation_run import AllocationRun

        return AllocationRun

    def steps(self, run: RunDirectory) -> list[RunDirectory]:
        return []

    def prices(self, config: AllocationSearchConfig) -> Sequence[str]:
        return (config.target.pareto or "complexity",)

    def trials(self, config: AllocationSearchConfig) -> AllocationTrials:
        return AllocationTrials(steps_of(config))

    def counters(self, search: PooledSearch[Any], evaluations: int, steps: Sequence[int]) -> dict[str, int | str]:
        return {"generation": search.generation, "by stage": " → ".join(map(str, steps))}

    def searching_note(
        self, config: AllocationSearchConfig, search: PooledSearch[Any], evaluations: int, steps: Sequence[int]
    ) -> str:
        from evoprune.search.board_note import searching_generations_note

        return searching_generations_note(config, search, evaluations, steps)

    def finished_note(self, result: Mapping[str, Any], artifacts: Sequence[str]) -> str:
        from evoprune.search.board_note import finished_allocation_note, finished_front_note

        if result.get("pareto") is not None:
            return finished_front_note(result, artifacts)
        return finished_allocation_note(result, artifacts)

    def artifacts(self, folder: Path, result: Mapping[str, Any]) -> Iterator[Path]:
        yield from files_of(folder, self.winner)
        yield from (folder / "export").glob("formula.json")

    def progress_of(self, run: RunDirectory) -> dict[str, Any]:
        history = list(run.history())
        return {
            "evaluations": sum(line["counted"] for line in history),
            "distinct": different(history),
            "best": _best(run.peek(), run.identity.get("matrices", [])),
        }

    def words(self, best: Mapping[str, Any]) -> str:
        return span_text(best["allocation"].values())

    def table(self, result: Mapping[str, Any]) -> Table:
        from evoprune.search.tables import heldout_table
        from evoprune.search.tables_front import front_table

        return heldout_table(result) if result.get("pareto") is None else front_table(result)

    def result_view(self, result: Mapping[str, Any], run: Path) -> list[RenderableType]:
        from evoprune.search import tables_allocation, tables_front

        shown = tables_allocation if result.get("pareto") is None else tables_front
        return shown.result_view(result, run)

    def unfinished_facts(
        self, config: AllocationSearchConfig, document: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> dict[str, RenderableType]:
        return generation_facts(self.trials(config), document, history)

    def exported(self, target: Path) -> str:
        return f"{self.winner}{target.suffix}"

    def check_export(self, file: Path, result: Mapping[str, Any]) -> None:
        from evoprune.metrics.allocation_file import read_allocation
        from evoprune.metrics.evopress import to_evopress
        from evoprune.metrics.files import file_hash

        if file.suffix == ".py":
            if not file.exists():
                raise InvalidInput("this run leaves no .py: only a search of formulas does, see --searcher formula")
            document = json.loads(file.with_name("formula.json").read_text(encoding="utf-8"))
            if document["provenance"]["allocation.py"] != file_hash(file):
                raise InvalidInput(f"{file} does not hold the run's formula: it was changed")
            return
        allocation = read_allocation(file.with_suffix(".json"))
        changed = allocation.by_name() != result["best"]["allocation"]
        if changed or (file.suffix == ".txt" and file.read_text() != to_evopress(allocation)):
            raise InvalidInput(f"{file} does not hold the run's winner: it was changed")

    def write_report(self, run: RunDirectory) -> Path:
        from evoprune.search.report import allocation_page, front_page

        page = allocation_page if run.config["target"].get("pareto") is None else front_page
        return page.write_page(run)

    def check_names(self, config: AllocationSearchConfig) -> None:
        from evoprune.fitness.allocators import ALLOCATORS
        from evoprune.metrics.exported import load_metric
        from evoprune.metrics.site_terminals import SITE_TERMINALS
        from evoprune.search.breeders import breeder_of
        from evoprune.search.level_run import given_allocation

        breeder, target = breeder_of(config.searcher.name), config.target
        if breeder.reads and (target.granularity != "matrix" or target.drop != "none"):
            raise InvalidInput("a formula gives each matrix a level: leave --granularity at matrix and --drop at none")
        for name in config.searcher.terminals or ():
            if name not in SITE_TERMINALS:
                raise UnknownName("terminal", name, SITE_TERMINALS)
        if breeder.reads and not config.terminals:
            raise InvalidInput(
                "formulas that may read nothing say nothing: name some of searcher.terminals, or leave it out"
            )
        self._check_compressor(config)
        for name in config.searcher.seeds or ():
            _ = ALLOCATORS[name]
        load_metric(config.target.metric)
        given_allocation(config)

    def _check_compressor(self, config: AllocationSearchConfig) -> None:
        from evoprune.fitness.compressors import AtRunTime, compressor_of
        from evoprune.search.breeders import breeder_of

        name, target = config.target.compressor, config.target
        if isinstance(compressor_of(name), AtRunTime):
            raise InvalidInput(
                f"{name} removes no weights, so there is nothing to allocate: search with another compressor, and give "
                f"the result thresholds by `evoprune prune --compressor {name}`"
            )
        if target.stored is None:
            if target.grid != type(target).model_fields["grid"].default:
                raise InvalidInput(f"{name} has every level without storing it: leave out target.grid")
            return
        if target.drop_only:
            raise InvalidInput(f"where parts only go as a whole there is nothing for {name} to compress: leave it out")
        if breeder_of(config.searcher.name).reads:
            raise InvalidInput(
                f"a formula asks for levels that are not stored for {name}: leave out --compressor, or choose another "
                "--searcher"
            )


def steps_of(config: AllocationSearchConfig) -> int:
    """Stages of a generation; a front has one, for its populations must be comparable."""
    return len(config.searcher.stages) if config.target.pareto is None else 1


def different(history: Iterable[Mapping[str, Any]]) -> int:
    """Different genomes among all births."""
    return len({tuple(line["genome"]) for line in history})


def _best(state: Mapping[str, Any] | None, matrices: Sequence[str]) -> dict[str, Any] | None:
    """The present parent, which won the last generation that came to its end, or is the best seed.

    Args:
        state: the last committed one.
        matrices: their names, in model order.
    """
    if state is None or (best := state["search"]["best"]) is None:
        return None
    return {
        "birth": best["birth"],
        "generation": best["generation"],
        "allocation": {name: level / LEVELS for name, level in zip(matrices, state["search"]["levels"], strict=True)},
        "fitness": best["kl"],
        "stderr": best["stderr"],
        "origin": best["origin"],
        "heldout": None,
    }


KIND: BoardKind = AllocationKind()
