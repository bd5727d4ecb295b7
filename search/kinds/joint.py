"""Joint searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.search.kinds import Kind, kind_of
from evoprune.search.spaces.levels import span_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from evoprune.search.config_joint import JointSearchConfig
    from evoprune.search.kinds import Session
    from evoprune.search.rundir import RunDirectory

_HALVES = ("metric", "allocation")


class JointKind:
    """A metric, and how much each matrix loses by it."""

    name = "joint"
    winner = "metric"
    endings: tuple[str, ...] = (".py", ".json", ".tex", ".txt")

    def session(self, config: JointSearchConfig) -> type[Session]:
        from evoprune.search.joint_run import JointRun

        return JointRun

    def steps(self, run: RunDirectory) -> list[RunDirectory]:
        from evoprune.search.joint_steps import begun_runs

        return begun_runs(run)

    def progress_of(self, run: RunDirectory) -> dict[str, Any]:
        """The best is that of the last step that has one, beside what the step before found."""
        from evoprune.search.joint_steps import GENOME

        evaluations = distinct = 0
        best: dict[str, Any] | None = None
        for step in self.steps(run):
            known = step.result or kind_of(step.kind).progress_of(step)
            evaluations += known["evaluations"]
            distinct += known["distinct"]
            if (found := known["best"]) is not None:
                genome = GENOME[step.kind]
                halves = {name: best[name] for name in GENOME.values() if best is not None and name in best}
                best = {
                    "step": step.path.name,
                    **halves,
                    genome: found[genome],
                    "fitness": found["fitness"],
                    "stderr": found["stderr"],
                    "heldout": None,
                }
        return {"evaluations": evaluations, "distinct": distinct, "best": best}

    def words(self, best: Mapping[str, Any]) -> str:
        parts = [str(best["expression"])] if "expression" in best else []
        return ", ".join([*parts, *([span_text(best["allocation"].values())] if best.get("allocation") else [])])

    def table(self, result: Mapping[str, Any]) -> Table:
        from evoprune.search.tables import heldout_table

        return heldout_table(result)

    def result_view(self, result: Mapping[str, Any], run: Path) -> list[RenderableType]:
        from evoprune.search.tables_joint import result_view

        return result_view(result, run)

    def unfinished_facts(
        self, config: JointSearchConfig, document: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> dict[str, RenderableType]:
        best = document["best"]
        facts: dict[str, RenderableType] = {"steps": f"{len(history)} of {2 * config.rounds} finished"}
        return facts if best is None else {"from": f"steps/{best['step']}", **facts}

    def exported(self, target: Path) -> str:
        return f"{_half(target)}{target.suffix}"

    def check_export(self, file: Path, result: Mapping[str, Any]) -> None:
        kind_of(_half(file)).check_export(file, result)

    def write_report(self, run: RunDirectory) -> Path:
        from evoprune.search.report.joint_page import write_page

        return write_page(run)

    def check_names(self, config: JointSearchConfig) -> None:
        """What its steps would refuse, as far as it is known before they find anything."""
        from evoprune.search.config import validated

        metric = config.metric_values(0, seed_from=config.seed_from, allocation=None)
        allocation = config.allocation_values(1, metric="magnitude", seed_from=None)
        for values in (metric, allocation):
            kind_of(values["kind"]).check_names(validated(values))


def _half(file: Path) -> str:
    """Which of the two winners a file is of: a .json is the metric's unless it is named after the allocation."""
    allocation = file.suffix == ".txt" or (file.suffix == ".json" and file.name.startswith("allocation"))
    return _HALVES[allocation]


KIND: Kind = JointKind()
