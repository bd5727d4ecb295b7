"""Figures of how the search went. Every fitness in them is from text B: none of them shows a result.

Each function returns None when there is nothing to draw yet.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from evoprune.search.report import canvas
from evoprune.search.report.axes import columns, fit_scale, note_beyond, without_outliers
from evoprune.search.report.data import ReportData
from evoprune.search.report.lineage import ancestors
from evoprune.search.report.names import label, objective_text
from evoprune.search.report.numbers import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def origins(data: ReportData) -> Figure | None:
    """Fitness at the first rung by how candidates came about, best median first."""
    groups: dict[str, list[float]] = {}
    for entry in data.entries:
        groups.setdefault(entry.family, []).append(entry.rungs[0])
    if not groups:
        return None
    names = sorted(groups, key=lambda name: (median(groups[name]), name), reverse=True)
    figure = canvas.new_figure(0.9 + 0.3 * len(names))
    axes = figure.add_subplot()
    everything = [value for values in groups.values() for value in values]
    for row, name in enumerate(names):
        values = groups[name]
        # The golden ratio spreads neighbours; a random jitter would differ from one writing to the next.
        heights = [row + 0.5 * ((index * 0.618034) % 1 - 0.5) for index in range(len(values))]
        axes.scatter(values, heights, s=11, color=canvas.WINNER, alpha=0.4, linewidth=0)
        axes.plot([median(values)] * 2, [row - 0.34, row + 0.34], color=canvas.INK, linewidth=1.8)
    axes.set_yticks(range(len(names)), [f"{name}  (n = {len(groups[name])})" for name in names])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    fit_scale(axes, "x", everything)
    axes.set_xlabel(f"{objective_text(data.config)} on the first {count(data.rung_tokens[0])} tokens of text B")
    return figure


def rungs(data: ReportData) -> Figure | None:
    """Fitness at each rung against the next, for all that ran both; the few that are far worse lie beyond the axes."""
    if not any(len(entry.rungs) > 1 for entry in data.entries):
        return None
    panels = data.n_rungs - 1
    figure = canvas.new_figure(3.3, min(canvas.WIDTH, 3.5 * panels))
    for rung in range(panels):
        axes = figure.add_subplot(1, panels, rung + 1)
        pairs = [(entry.rungs[rung], entry.rungs[rung + 1]) for entry in data.entries if len(entry.rungs) > rung + 1]
        # What the race decides is among the good; to the scale of the worst, those are one dot.
        highest = max(without_outliers([value for pair in pairs for value in pair]), default=0.0)
        near = [pair for pair in pairs if max(pair) <= highest]
        both = [value for pair in near for value in pair]
        if both:
            ends = [min(both), max(both)]
            axes.plot(ends, ends, color=canvas.FAINT, linewidth=1, zorder=1)
            axes.scatter(*columns(near), s=16, color=canvas.WINNER, alpha=0.55, linewidth=0, zorder=2)
        fit_scale(axes, "x", both)
        fit_scale(axes, "y", both)
        axes.set_xlabel(f"at {count(data.rung_tokens[rung])} tokens")
        axes.set_ylabel(f"at {count(data.rung_tokens[rung + 1])} tokens")
        tau, n = data.correlations[rung]
        axes.set_title(f"τ {'not known' if tau is None else f'= {tau:.2f}'}, n = {n}".replace("-", "−"))
        note_beyond(axes, len(pairs) - len(near))
    return figure


def lineage(data: ReportData) -> Figure | None:
    """The winner's ancestors among all births, joined to their parents."""
    family = ancestors(data.best, data.by_birth) if data.best is not None else []
    if len(family) < 2:
        return None
    figure = canvas.new_figure(3.2)
    axes = figure.add_subplot()
    known = {entry.birth: entry for entry in family}
    heights = [entry.rungs[0] for entry in family]
    highest = max(heights)
    others = [entry for entry in data.entries if entry.birth not in known and entry.rungs[0] <= 1.1 * highest]
    axes.scatter(
        [entry.birth for entry in others],
        [entry.rungs[0] for entry in others],
        s=9,
        color=canvas.FAINT,
        linewidth=0,
        label="other candidates",
    )
    for child in family:
        for birth in child.parents:
            if birth in known:
                ends = [known[birth], child]
                axes.plot(
                    [entry.birth for entry in ends],
                    [entry.rungs[0] for entry in ends],
                    color=canvas.WINNER,
                    linewidth=0.9,
                    alpha=0.6,
                )
    axes.scatter(
        [entry.birth for entry in family], heights, s=20, color=canvas.WINNER, linewidth=0, zorder=3, label="ancestors"
    )
    roots = [entry for entry in family if not any(birth in known for birth in entry.parents)]
    for entry in (*roots, family[-1]):
        name = "winner" if entry is family[-1] else label(entry.origin.removeprefix("seed:"))
        axes.annotate(name, (entry.birth, entry.rungs[0]), (4, 4), textcoords="offset points", fontsize=8)
    fit_scale(axes, "y", heights)
    axes.set_xlabel("birth")
    axes.set_ylabel(f"{objective_text(data.config)} at the first rung")
    axes.legend(loc="upper right")
    return figure
