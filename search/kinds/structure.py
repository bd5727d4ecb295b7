"""Structure searches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.search.engine.trial_record import Range
from evoprune.search.kinds import BoardKind, files_of, generation_facts
from evoprune.search.trials_generation import StructureTrials

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from evoprune.search.config_structure import StructureSearchConfig
    from evoprune.search.kinds import Session
    from evoprune.search.pooled_search import PooledSearch
    from evoprune.search.rundir import RunDirectory


class StructureKind:
    """How many heads and neurons every block keeps."""

    name = "structure"
    winner = "shape"
    endings: tuple[str, ...] = (".json",)
    descriptors: Mapping[str, Range] = StructureTrials.ranges

    def session(self, config: StructureSearchConfig) -> type[Session]:
        if config.target.pareto is not None:
            from evoprune.search.structure_front_run import StructureFrontRun

            return StructureFrontRun
        from evoprune.search.structure_run import StructureRun

        return StructureRun

    def steps(self, run: RunDirectory) -> list[RunDirectory]:
        return []

    def prices(self, config: StructureSearchConfig) -> Sequence[str]:
        return (config.target.cost, *_beside(config))

    def trials(self, config: StructureSearchConfig) -> StructureTrials:
        # A front has one stage, for its populations must be comparable.
        steps = len(config.searcher.stages) if config.target.pareto is None else 1
        return StructureTrials(steps, _beside(config))

    def counters(self, search: PooledSearch[Any], evaluations: int, steps: Sequence[int]) -> dict[str, int | str]:
        return {"generation": search.generation, "by stage": " → ".join(map(str, steps))}

    def searching_note(
        self, config: StructureSearchConfig, search: PooledSearch[Any], evaluations: int, steps: Sequence[int]
    ) -> str:
        from evoprune.search.board_note import searching_generations_note

        return searching_generations_note(config, search, evaluations, steps)

    def finished_note(self, result: Mapping[str, Any], artifacts: Sequence[str]) -> str:
        from evoprune.search.board_note import finished_front_note, finished_structure_note

        if result.get("pareto") is not None:
            return finished_front_note(result, artifacts)
        return finished_structure_note(result, artifacts)

    def artifacts(self, folder: Path, result: Mapping[str, Any]) -> Iterator[Path]:
        return files_of(folder, self.winner)

    def progress_of(self, run: RunDirectory) -> dict[str, Any]:
        history = list(run.history())
        best = None
        state = run.peek()
        if state is not None and state["search"]["best"] is not None:
            member = state["search"]["best"]
            best = {
                "birth": member["birth"],
                "generation": member["generation"],
                "origin": member["origin"],
                "fitness": member["kl"],
                "stderr": member["stderr"],
                "shape": state["search"]["shape"],
                "heldout": None,
            }
        return {
            "evaluations": sum(line["counted"] for line in history),
            "distinct": len({tuple(line["genome"]) for line in history}),
            "best": best,
        }

    def words(self, best: Mapping[str, Any]) -> str:
        from evoprune.search.spaces.structure import shape_text

        return shape_text(best["shape"])

    def table(self, result: Mapping[str, Any]) -> Table:
        from evoprune.search.tables import heldout_table
        from evoprune.search.tables_front import front_table

        return heldout_table(result) if result.get("pareto") is None else front_table(result)

    def result_view(self, result: Mapping[str, Any], run: Path) -> list[RenderableType]:
        from evoprune.search import tables_front, tables_structure

        shown = tables_structure if result.get("pareto") is None else tables_front
        return shown.result_view(result, run)

    def unfinished_facts(
        self, config: StructureSearchConfig, document: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> dict[str, RenderableType]:
        return generation_facts(self.trials(config), document, history)

    def exported(self, target: Path) -> str:
        return f"{self.winner}{target.suffix}"

    def check_export(self, file: Path, result: Mapping[str, Any]) -> None:
        from evoprune.fitness.unit_costs import kept_by
        from evoprune.metrics.shape_file import read_shape

        if [list(kept_by(block)) for block in read_shape(file).blocks] != result["best"]["shape"]:
            raise InvalidInput(f"{file} does not hold the run's winner: it was changed")

    def write_report(self, run: RunDirectory) -> Path:
        from evoprune.search.report import structure_front_page, structure_page

        page = structure_page if run.config["target"].get("pareto") is None else structure_front_page
        return page.write_page(run)

    def check_names(self, config: StructureSearchConfig) -> None:
        from evoprune.fitness.allocators import ALLOCATORS
        from evoprune.fitness.unit_criteria import UNIT_CRITERIA
        from evoprune.search.given import given_shape
        from evoprune.search.structure_result import LEAST_ERROR, UNIFORM

        for name in config.allocators:
            if name in (UNIFORM, LEAST_ERROR):
                raise InvalidInput(f"{name} is a seed of every structure search: leave it out of searcher.seeds")
            if name not in ALLOCATORS:
                raise UnknownName("unit criterion or allocator", name, [*UNIT_CRITERIA, *ALLOCATORS])
        given_shape(config.seed_from)
        if config.target.table is not None:
            from evoprune.fitness.latency_table import read_table

            read_table(config.target.table)


def _beside(config: StructureSearchConfig) -> Sequence[str]:
    """Costs of a front beside the one that its range is of."""
    return ("latency",) if config.target.pareto == "latency" else ()


KIND: BoardKind = StructureKind()
