"""Metric searches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.trial_record import Range
from evoprune.search.kinds import BoardKind, files_of
from evoprune.search.removal import PLAIN
from evoprune.search.trials_metric import DESCRIPTORS, MetricTrials

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from evoprune.search.config_metric import MetricSearchConfig
    from evoprune.search.kinds import Session
    from evoprune.search.metric_search import MetricSearch
    from evoprune.search.rundir import RunDirectory


class MetricKind:
    """Expressions that score weights."""

    name = "metric"
    winner = "metric"
    endings: tuple[str, ...] = (".py", ".json", ".tex")
    descriptors: Mapping[str, Range] = DESCRIPTORS

    def session(self, config: MetricSearchConfig) -> type[Session]:
        from evoprune.search.metric_run import MetricRun

        return MetricRun

    def steps(self, run: RunDirectory) -> list[RunDirectory]:
        return []

    def prices(self, config: MetricSearchConfig) -> Sequence[str]:
        return ("complexity",)

    def trials(self, config: MetricSearchConfig) -> MetricTrials:
        return MetricTrials(len(config.racing.rungs))

    def counters(self, search: MetricSearch, evaluations: int, steps: Sequence[int]) -> dict[str, int | str]:
        return {
            "births": search.births,
            "without a forward pass": search.births - evaluations,
            "by rung": " → ".join(map(str, steps)),
        }

    def searching_note(
        self, config: MetricSearchConfig, search: MetricSearch, evaluations: int, steps: Sequence[int]
    ) -> str:
        from evoprune.search.board_note import searching_note

        return searching_note(config, search.best, evaluations, search.births, steps)

    def finished_note(self, result: Mapping[str, Any], artifacts: Sequence[str]) -> str:
        from evoprune.metrics.expression import parse
        from evoprune.search.board_note import finished_note

        return finished_note(result, parse(result["best"]["expression"]), artifacts)

    def artifacts(self, folder: Path, result: Mapping[str, Any]) -> Iterator[Path]:
        """What a finished run leaves, after a picture of the winner's formula."""
        from evoprune.metrics.emit import latex, to_text
        from evoprune.metrics.expression import parse
        from evoprune.metrics.files import write_atomically
        from evoprune.search.report.formula import formula_picture

        winner = parse(result["best"]["expression"])
        picture = formula_picture(f"S = {latex(winner)}", f"S = {to_text(winner)}")
        if picture is not None and (folder / "plots").is_dir():
            write_atomically(folder / "plots" / "formula.svg", picture)
        yield from files_of(folder, self.winner)

    def progress_of(self, run: RunDirectory) -> dict[str, Any]:
        history = list(run.history())
        return {
            "evaluations": _evaluated(history),
            "distinct": len({line["signature"] for line in history if line.get("signature")}),
            "best": _best(history),
        }

    def words(self, best: Mapping[str, Any]) -> str:
        return str(best["expression"])

    def table(self, result: Mapping[str, Any]) -> Table:
        from evoprune.search.tables import heldout_table

        return heldout_table(result)

    def result_view(self, result: Mapping[str, Any], run: Path) -> list[RenderableType]:
        from evoprune.search.tables import result_view

        return result_view(result, run)

    def unfinished_facts(
        self, config: MetricSearchConfig, document: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> dict[str, RenderableType]:
        target = config.target
        facts: dict[str, RenderableType] = {} if target.allocation is None else {"allocation": target.allocation}
        if target.compressor != PLAIN:
            facts["compressor"] = target.compressor
        if (best := document["best"]) is not None:
            facts["from"] = f"birth {best['birth']} ({best['origin']}), complexity {best['complexity']}"
        if history:
            answered = len(history) - _evaluated(history)
            facts["births"] = f"{len(history)}, {answered} of them answered without a forward pass"
            reached = [len(line.get("rungs") or ()) for line in history]
            rungs = range(len(config.racing.rungs))
            facts["by rung"] = " → ".join(str(sum(count > rung for count in reached)) for rung in rungs)
        return facts

    def exported(self, target: Path) -> str:
        return f"{self.winner}{target.suffix}"

    def check_export(self, file: Path, result: Mapping[str, Any]) -> None:
        if file.suffix == ".tex":
            return
        from evoprune.metrics.criterion import Metric
        from evoprune.metrics.exported import load_metric_file

        winner, found = result["best"]["expression"], load_metric_file(file)
        if not isinstance(found, Metric) or found.expression.text != winner:
            raise InvalidInput(f"{file} does not hold the run's winner {winner}: it was changed")

    def write_report(self, run: RunDirectory) -> Path:
        from evoprune.search.report.page import write_page

        return write_page(run)

    def check_names(self, config: MetricSearchConfig) -> None:
        from evoprune.fitness.objectives import OBJECTIVES
        from evoprune.metrics.criterion import CRITERIA
        from evoprune.search.metric_run import seeds_from
        from evoprune.search.racing import RACING_RULES
        from evoprune.search.searchers import SEARCHERS

        _ = SEARCHERS[config.searcher.name], OBJECTIVES[config.objective], RACING_RULES[config.racing.rule]
        for name in config.searcher.seeds or ():
            _ = CRITERIA[name]
        seeds_from(config.seed_from)
        config.target.given()
        _check_compressor(config.target.compressor)


def _check_compressor(spelled: str) -> None:
    from evoprune.fitness.compressors import COMPRESSORS, AtRunTime, compressor_of

    plugin = compressor_of(spelled)
    if isinstance(plugin, AtRunTime):
        raise InvalidInput(
            f"{spelled} removes no weights, so there is nothing for a metric to say: search with another compressor"
        )
    if not plugin.reads_criterion:
        others = ", ".join(name for name in COMPRESSORS if COMPRESSORS[name].reads_criterion)
        raise InvalidInput(
            f"{spelled} chooses by itself what goes and reads no metric: give one that does ({others}), or search how "
            f"much each matrix loses, `evoprune search allocation --compressor {spelled}`"
        )


def _evaluated(history: Sequence[Mapping[str, Any]]) -> int:
    """Births that cost a forward pass; one that was answered without names the one that it is like, or None."""
    return sum("same_as" not in line for line in history)


def _best(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The birth that got furthest and lost least there."""
    measured = [line for line in history if line.get("rungs")]
    best = min(measured, key=lambda line: (-len(line["rungs"]), line["rungs"][-1], line["birth"]), default=None)
    if best is None:
        return None
    return {
        "birth": best["birth"],
        "expression": best["expression"],
        "fitness": best["rungs"][-1],
        "stderr": best["stderr"],
        "rungs": best["rungs"],
        "complexity": best["complexity"],
        "origin": best["origin"],
        "parents": best["parents"],
        "heldout": None,
    }


KIND: BoardKind = MetricKind()
