"""Figures of how the search went. Every fitness in them is from text B: none of them shows a result.

Each function returns None when there is nothing to draw yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING

from evoprune.search.report import canvas
from evoprune.search.report.data import Entry, ReportData
from evoprune.search.report.lineage import ancestors
from evoprune.search.report.labels import annotate_points, spread
from evoprune.search.report.names import label, objective_text
from evoprune.search.report.numbers import compact, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def convergence(data: ReportData) -> Figure | None:
    """Best fitness so far over evaluations: the top rung with the levels of known metrics, the lower rungs below it."""
    if not data.entries:
        return None
    top = data.n_rungs - 1 if data.finalists else max(len(entry.rungs) for entry in data.entries) - 1
    figure = canvas.new_figure(3.4 if top == 0 else 5.2)
    grid = figure.add_gridspec(2 if top else 1, max(top, 1), height_ratios=[1.8, 1] if top else [1])
    axes = figure.add_subplot(grid[0, :])
    levels = data.levels if top == data.n_rungs - 1 else {}
    beyond = _progress(axes, data, top, list(levels.values()))
    _mark_levels(axes, levels, beyond)
    for rung in range(top):
        lower = figure.add_subplot(grid[1, rung])
        _note_beyond(lower, _progress(lower, data, rung))
    return figure


def front(data: ReportData) -> Figure | None:
    """Fitness against complexity of all that reached the top rung; the front numbered as in its table."""
    if not data.front:
        return None
    figure = canvas.new_figure(3.9)
    axes = figure.add_subplot()
    shown = data.finalists or data.front
    values = [entry.fitness for entry in shown]
    ceiling = _ceiling(values, keep=[entry.fitness for entry in data.front])
    visible = [entry for entry in shown if entry.fitness <= ceiling]
    for needs, colour in canvas.NEEDS_COLOURS.items():
        if some := [entry for entry in visible if entry.needs == needs]:
            axes.scatter(
                *zip(*map(_place, some), strict=True),
                s=22,
                marker=canvas.NEEDS_MARKERS[needs],
                color=colour,
                alpha=0.65,
                linewidth=0,
                label=needs,
            )
    axes.set_xlabel("complexity: weighted nodes, plus a price for the dearest statistic")
    axes.set_ylabel(f"{objective_text(data.config.objective)} on text B")
    canvas.plain_numbers(axes.xaxis)
    canvas.plain_numbers(axes.yaxis)
    axes.margins(x=0.06)
    _note_beyond(axes, _limit(axes, min(values), ceiling, values))
    figure.legend(loc="outside lower center", ncols=len(canvas.NEEDS_COLOURS), handletextpad=0.2, columnspacing=1.5)
    numbered = _front_line(axes, data.front)
    seeds = [(label(entry.origin.removeprefix("seed:")), *_place(entry)) for entry in visible if entry.family == "seed"]
    annotate_points(axes, seeds, [*map(_place, visible), *numbered], size=7.5, color=canvas.MUTED)
    return figure


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
    canvas.fit_scale(axes, "x", everything)
    axes.set_xlabel(
        f"{objective_text(data.config.objective)} on the first {count(data.rung_tokens[0])} tokens of text B"
    )
    return figure


def rungs(data: ReportData) -> Figure | None:
    """Fitness at each rung against the next, for all that ran both."""
    if not any(len(entry.rungs) > 1 for entry in data.entries):
        return None
    panels = data.n_rungs - 1
    figure = canvas.new_figure(3.3, min(canvas.WIDTH, 3.5 * panels))
    for rung in range(panels):
        axes = figure.add_subplot(1, panels, rung + 1)
        pairs = [(entry.rungs[rung], entry.rungs[rung + 1]) for entry in data.entries if len(entry.rungs) > rung + 1]
        both = [value for pair in pairs for value in pair]
        if both:
            ends = [min(both), max(both)]
            axes.plot(ends, ends, color=canvas.FAINT, linewidth=1, zorder=1)
            axes.scatter(*zip(*pairs, strict=True), s=16, color=canvas.WINNER, alpha=0.55, linewidth=0, zorder=2)
        canvas.fit_scale(axes, "x", both)
        canvas.fit_scale(axes, "y", both)
        axes.set_xlabel(f"at {count(data.rung_tokens[rung])} tokens")
        axes.set_ylabel(f"at {count(data.rung_tokens[rung + 1])} tokens")
        tau, n = data.correlations[rung]
        axes.set_title("τ not known yet" if tau is None else f"τ = {tau:.2f}, n = {n}".replace("-", "−"))
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
    ceiling = _ceiling(heights, keep=heights)
    others = [entry for entry in data.entries if entry.birth not in known and entry.rungs[0] <= ceiling * 1.1]
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
    canvas.fit_scale(axes, "y", heights)
    axes.set_xlabel("birth")
    axes.set_ylabel(f"{objective_text(data.config.objective)} at the first rung")
    axes.legend(loc="upper right")
    return figure


def _place(entry: Entry) -> tuple[float, float]:
    return entry.expression.complexity, entry.fitness


def _progress(axes: Axes, data: ReportData, rung: int, levels: Sequence[float] = ()) -> int:
    """The candidates at a rung in the order of evaluation, and the best of them so far; how many lie above the axis."""
    some = [entry for entry in data.entries if len(entry.rungs) > rung]
    values = [entry.rungs[rung] for entry in some]
    best = [min(values[: index + 1]) for index in range(len(values))]
    ceiling = _ceiling([*values, *levels])
    visible = [(entry.number, value) for entry, value in zip(some, values, strict=True) if value <= ceiling]
    axes.scatter(*zip(*visible, strict=True), s=8, color=canvas.FAINT, linewidth=0)
    # Each best holds until the next one, the last until the end.
    numbers = [entry.number for entry in some]
    last = max(data.n_evaluations, numbers[-1])
    axes.step([*numbers, last], [*best, best[-1]], where="post", color=canvas.WINNER)
    axes.set_xlim(0, last * 1.01 + 1)
    axes.set_title(f"{count(data.rung_tokens[rung])} tokens, {len(some)} candidates")
    axes.set_xlabel("evaluations")
    axes.set_ylabel(objective_text(data.config.objective))
    canvas.plain_numbers(axes.yaxis)
    return _limit(axes, best[-1], ceiling, values)


def _mark_levels(axes: Axes, levels: dict[str, float], beyond: int) -> None:
    """Known metrics as lines with names in the right margin; those above the axis in the note."""
    low, high = axes.get_ylim()
    inside = {name: level for name, level in levels.items() if level <= high}
    places = spread(list(inside.values()), gap=(high - low) * 0.065)
    for (name, level), place in zip(inside.items(), places, strict=True):
        colour = canvas.POWER if name == "power" else canvas.MUTED
        axes.axhline(level, color=colour, linewidth=1.1 if name == "power" else 0.7, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{label(name)}  {compact(level)}",
            (1, level),
            (1.03, place),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
            annotation_clip=False,
        )
    named = [f"{label(name)} {compact(level)}" for name, level in levels.items() if level > high]
    _note_beyond(axes, beyond, named)


def _front_line(axes: Axes, members: Sequence[Entry]) -> list[tuple[float, float]]:
    """The front as a staircase with the numbers of its table; its points."""
    points = [_place(entry) for entry in members]
    axes.step(*zip(*points, strict=True), where="post", color=canvas.WINNER, linewidth=1.2, zorder=2)
    axes.scatter(*zip(*points, strict=True), s=40, facecolor="none", edgecolor=canvas.WINNER, linewidth=1.2, zorder=3)
    for number, point in enumerate(points, start=1):
        # What lies below and to the left of a front is empty.
        axes.annotate(
            str(number),
            point,
            (-5, -5),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=canvas.WINNER,
        )
    return points


def _ceiling(values: Sequence[float], keep: Sequence[float] = ()) -> float:
    """The largest value worth showing: far outliers would press everything else into a line."""
    if len(values) < 4:
        return max([*values, *keep])
    first, _, third = quantiles(values, n=4, method="inclusive")
    return max([value for value in values if value <= third + 1.5 * (third - first)] + list(keep))


def _limit(axes: Axes, low: float, high: float, values: Sequence[float]) -> int:
    """Show `low` to `high` with some air; how many values lie above."""
    air = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - 1.3 * air, high + air)
    return sum(value > high for value in values)


def _note_beyond(axes: Axes, beyond: int, named: Sequence[str] = ()) -> None:
    """Say above the axes what lies above them."""
    if beyond:
        words = f"{beyond} above the axis" + (f", such as {', '.join(named)}" if named else "")
        axes.set_title(words, loc="right", fontsize=7.5, fontweight="normal", color=canvas.MUTED)
