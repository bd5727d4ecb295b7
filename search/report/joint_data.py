"""What the report of a joint search says: no figures, no markup, nothing computed twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evoprune.metrics.emit import to_text
from evoprune.metrics.expression import parse
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.joint_steps import FOLDER, Step, steps_of
from evoprune.search.report.allocation_data import AllocationData, range_text
from evoprune.search.report.data import ReportData
from evoprune.search.report.run_data import RunData
from evoprune.search.rundir import RunDirectory


@dataclass(frozen=True)
class Part:
    """A step that was begun.

    Attributes:
        step: which.
        state: of its run.
        evaluations: of its candidates.
        before: evaluations of all steps before.
        course: (evaluations of this step, KL on text B) of whoever was best so far: among metrics that ran the whole
            ladder, or the parent of each generation on its windows.
        fitness: of its winner on all of text B; None before it is finished.
        found: its winner, in words.
    """

    step: Step
    state: str
    evaluations: int
    before: int
    course: tuple[tuple[int, float], ...]
    fitness: float | None
    found: str

    @property
    def page(self) -> str:
        """Its report, from the folder of the joint run."""
        return f"{FOLDER}/{self.step.name}/report.html"


class JointData(RunData[JointSearchConfig]):
    """A joint search's run as a report reads it.

    Args:
        run: finished or not.

    Raises:
        InvalidInput: not a joint search, or its files are damaged.
    """

    kind = "joint"

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run, JointSearchConfig)

    def what(self, values: Mapping[str, Any]) -> str:
        allocation = values["allocation"]
        return f"{values['expression']}, {'uniform' if allocation is None else range_text(allocation)}"

    @property
    def n_births(self) -> int:
        return sum(line["births"] for line in self.lines)

    @property
    def n_evaluations(self) -> int:
        return sum(part.evaluations for part in self.parts)

    @property
    def n_removed(self) -> int | None:
        return None if self.result is None else self.result["best"]["removed"]

    @property
    def final_tokens(self) -> int:
        """Tokens of text B that the pairs of all rounds are compared on."""
        return self.config.metric.racing.rungs[-1] * self.config.data.window

    @cached_property
    def parts(self) -> list[Part]:
        """The steps that were begun, in their order."""
        parts: list[Part] = []
        for step in steps_of(self.run.path, self.config.rounds):
            if step.exists:
                parts.append(_part(step, sum(part.evaluations for part in parts)))
        return parts


def _part(step: Step, before: int) -> Part:
    run = RunDirectory(step.path)
    data = ReportData(run) if step.kind == "metric" else AllocationData(run)
    best = None if data.result is None else data.result["best"]
    found = ""
    if best is not None:
        found = to_text(parse(best["expression"])) if step.kind == "metric" else range_text(best["allocation"])
    return Part(
        step,
        data.state,
        data.n_evaluations,
        before,
        tuple(_metrics_course(data) if isinstance(data, ReportData) else _allocations_course(data)),
        None if best is None else best["fitness"],
        found,
    )


def _metrics_course(data: ReportData) -> list[tuple[int, float]]:
    course: list[tuple[int, float]] = []
    for entry in data.finalists:
        if not course or entry.fitness < course[-1][1]:
            course.append((entry.number, entry.fitness))
    return course


def _allocations_course(data: AllocationData) -> list[tuple[int, float]]:
    seeds = [(line["birth"] + 1, line["kl"]) for line in data.parents[:1]]
    won = [(generation.evaluations, generation.winner["kl"]) for generation in data.generations if generation.winner]
    return [*seeds, *won]
