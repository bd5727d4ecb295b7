"""The page of a joint search: its figures and its words."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from evoprune.metrics.expression import parse
from evoprune.search.joint_steps import FOLDER
from evoprune.search.removal import in_brackets
from evoprune.search.report import document, figures_joint, figures_result
from evoprune.search.report.joint_data import JointData
from evoprune.search.report.page import score
from evoprune.search.rundir import RunDirectory
from evoprune.search.tables_joint import prune_command

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[JointData], Figure | None]] = {
    "course": figures_joint.course,
    "baselines": figures_result.baselines,
}


def write_page(run: RunDirectory) -> Path:
    """See `evoprune.search.report.write_report`."""
    data = JointData(run)
    drawn = document.draw(FIGURES, data)
    return document.write_files(run.path, FIGURES, drawn, render(data, drawn))


def render(data: JointData, drawn: dict[str, str]) -> str:
    """The page with these figures inlined."""
    best, target = None if data.result is None else data.result["best"], data.config.target
    return document.fill(
        _environment(),
        "joint_page.html.jinja",
        data,
        drawn,
        f"{100 * target.sparsity:g} % of all prunable weights{in_brackets(target.compressor)}",
        "Pair",
        best=best,
        metric=None if best is None else parse(best["expression"]),
        verdicts=verdicts(data),
        commands=commands(data),
    )


@cache
def _environment() -> Environment:
    environment = document.new_environment()
    environment.filters |= {"score": score}
    return environment


def verdicts(data: JointData) -> list[str]:
    """How the winner's held-out loss compares with each half alone and with neither, in words."""
    halves = ("metric-uniform", "wanda-allocated", "magnitude-allocated", "wanda", "magnitude")
    return [document.beside(name, data) for name in halves if data.contender(name) is not None]


def commands(data: JointData) -> dict[str, str]:
    """Command lines to go on from here, by what they do."""
    run = shlex.quote(str(data.run.path))
    with_winner: dict[str, str] = {}
    if data.result is not None:
        command = prune_command(data.result, data.run.path)
        with_winner |= document.pruning(data, "Prune the model with both winners", command)
        last = shlex.quote(str(data.run.path / FOLDER / data.result["steps"][-1]["step"]))
        with_winner["See what the last step found"] = f"evoprune show {last}"
        with_winner["Write the metric to a file"] = f"evoprune export {run} --to metric.py"
    return document.commands(data, with_winner)
