"""The steps of a joint search: ordinary runs in a folder of their own, metrics and allocations in turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evoprune.metrics.files import file_hash
from evoprune.search.config import validated
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.config_sections import SearchConfig
from evoprune.search.rundir import RunDirectory

FOLDER = "steps"
GENOME = {"metric": "expression", "allocation": "allocation"}
"""What the best of a run of each kind is called in its result."""


@dataclass(frozen=True)
class Step:
    """One of the runs that a joint search is made of.

    Attributes:
        number: from 0.
        folder: of the joint run.
    """

    number: int
    folder: Path

    @property
    def kind(self) -> str:
        """What it searches."""
        return ("metric", "allocation")[self.number % 2]

    @property
    def round(self) -> int:
        """Its round, from 1."""
        return self.number // 2 + 1

    @property
    def name(self) -> str:
        """Its folder below that of all steps, such as ``2-allocation``."""
        return f"{self.number + 1}-{self.kind}"

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.folder / FOLDER / self.name

    @property
    def exists(self) -> bool:
        """Whether its run was begun. A folder without ``run.json`` is one that was being made when all ended."""
        return (self.path / "run.json").exists()

    def export(self, name: str) -> Path:
        """A file that its winner is exported to, as an absolute path: the step may go on from another folder."""
        return (self.path / "export" / name).resolve()


def steps_of(folder: Path, rounds: int) -> list[Step]:
    """All steps, in their order."""
    return [Step(number, folder) for number in range(2 * rounds)]


def begun_runs(run: RunDirectory) -> list[RunDirectory]:
    """The runs of the steps that were begun, in their order."""
    return [RunDirectory(step.path) for step in steps_of(run.path, run.config["rounds"]) if step.exists]


def step_config(config: JointSearchConfig, step: Step, found: list[dict[str, Any]]) -> SearchConfig:
    """The configuration of a step.

    Args:
        config: of the joint search.
        step: which.
        found: results of the steps before, in their order.

    Raises:
        InvalidInput: the parts of the configuration do not go together.
    """
    before, two_before = (Step(step.number - back, step.folder) for back in (1, 2))
    if step.kind == "allocation":
        earlier = two_before.export("allocation.json") if step.round > 1 else None
        metric = found[-1]["best"]["expression"]
        return validated(config.allocation_values(step.number, metric=metric, seed_from=earlier))
    if step.round == 1:
        return validated(config.metric_values(step.number, seed_from=config.seed_from, allocation=None))
    metric, allocation = two_before.export("metric.json"), before.export("allocation.json")
    return validated(config.metric_values(step.number, seed_from=str(metric), allocation=allocation))


def history_line(step: Step, result: dict[str, Any]) -> dict[str, Any]:
    """What the history of the joint search has of a finished step: nothing that varies between machines."""
    best = result["best"]
    return {
        "step": step.name,
        "kind": step.kind,
        "round": step.round,
        "evaluations": result["evaluations"],
        "births": result["births"],
        "distinct": result["distinct"],
        "fitness": best["fitness"],
        "stderr": best["stderr"],
        GENOME[step.kind]: best[GENOME[step.kind]],
        "history": file_hash(step.path / "history.jsonl"),
    }
