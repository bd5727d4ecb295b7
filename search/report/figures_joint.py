"""The figure of a joint search: the objective over all steps. Every fitness in it is from text B."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evoprune.search.report import canvas
from evoprune.search.report.axes import ceiling, columns, limit, note_beyond
from evoprune.search.report.joint_data import JointData
from evoprune.search.report.names import objective_text
from evoprune.search.report.numbers import nats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"metric": canvas.WINNER, "allocation": canvas.POWER}


def course(data: JointData) -> Figure | None:
    """KL of the best so far in every step, one after the other, and of each step's winner at its end."""
    parts = [part for part in data.parts if part.course]
    if not parts:
        return None
    figure = canvas.new_figure(3.6)
    axes = figure.add_subplot()
    ends = [(part, part.before + part.evaluations, part.fitness) for part in parts if part.fitness is not None]
    values = [value for part in parts for _, value in part.course] + [fitness for *_, fitness in ends]
    # The first of a step may be dreadful: to its scale, all steps would be one line.
    beyond = limit(axes, min(values), ceiling(values, keep=[part.course[-1][1] for part in parts]), values)
    told = set()
    for part in parts:
        points = [(part.before + at, value) for at, value in part.course]
        kind = part.step.kind
        axes.step(
            *columns([*points, (part.before + part.evaluations, points[-1][1])]),
            where="post",
            color=_COLOURS[kind],
            linewidth=1.3,
            label=None
            if kind in told
            else {"metric": "metrics: best so far", "allocation": "allocations: parent"}[kind],
        )
        told.add(kind)
        axes.axvline(part.before, color=canvas.FAINT, linewidth=0.8, zorder=0)
    for part, at, fitness in ends:
        axes.scatter([at], [fitness], s=28, marker="D", color=_COLOURS[part.step.kind], zorder=3)
        axes.annotate(nats(fitness), (at, fitness), (-4, 5), textcoords="offset points", ha="right", fontsize=7.5)
    axes.set_xlim(0, data.n_evaluations * 1.01 + 1)
    axes.set_xlabel("evaluations, all steps")
    axes.set_ylabel(f"{objective_text(data.config)}, nats per token")
    note_beyond(axes, beyond)
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.6, columnspacing=1.5)
    return figure
