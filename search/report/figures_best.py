"""Figures of what the search found: the best so far, and the front. Every fitness in them is from text B.

Each function returns None when there is nothing to draw yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evoprune.search.report import canvas
from evoprune.search.report.axes import ceiling, columns, limit, note_beyond, without_outliers
from evoprune.search.report.data import Entry, ReportData
from evoprune.search.report.labels import annotate_points, name_levels
from evoprune.search.report.names import label, needs_text, objective_text
from evoprune.search.report.numbers import count, nats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def convergence(data: ReportData) -> Figure | None:
    """Best fitness so far over evaluations: the top rung with the levels of known metrics, the lower rungs below it."""
    if not data.entries:
        return None
    top = data.n_rungs - 1 if data.finalists else max(len(entry.rungs) for entry in data.entries) - 1
    figure = canvas.new_figure(3.4 if top == 0 else 5.6)
    grid = figure.add_gridspec(2 if top else 1, max(top, 1), height_ratios=[1.8, 1] if top else [1])
    axes = figure.add_subplot(grid[0, :])
    levels = data.levels if top == data.n_rungs - 1 else {}
    beyond = _progress(axes, data, top, list(levels.values()))
    _mark_levels(axes, levels, beyond)
    for rung in range(top):
        lower = figure.add_subplot(grid[1, rung])
        if beyond := _progress(lower, data, rung):
            lower.set_xlabel(f"evaluations\n({beyond} above the axis)")
        # Side by side there is room for narrow words only.
        lower.set_title(lower.get_title(loc="left").replace(", ", "\n"))
        if rung:
            lower.set_ylabel("")
    return figure


def front(data: ReportData) -> Figure | None:
    """Fitness against complexity of all that reached the top rung; the front numbered as in its table."""
    if not data.front:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = canvas.new_figure(3.9)
    axes = figure.add_subplot()
    shown = data.finalists or data.front
    values = [entry.fitness for entry in shown]
    seeds = without_outliers([entry.fitness for entry in shown if entry.family == "seed"])
    highest = ceiling(values, keep=[*seeds, *(entry.fitness for entry in data.front)])
    above = limit(axes, min(values), highest, values)
    visible = [entry for entry in shown if entry.fitness <= axes.get_ylim()[1]]
    for needs, colour in canvas.NEEDS_COLOURS.items():
        if some := [entry for entry in visible if entry.needs == needs]:
            axes.scatter(
                *columns(map(_place, some)),
                s=22,
                marker=canvas.NEEDS_MARKERS[needs],
                color=colour,
                alpha=0.65,
                linewidth=0,
                label=needs,
            )
    axes.set_xlabel("complexity: weighted nodes, plus a price for the dearest statistic")
    axes.set_ylabel(f"{objective_text(data.config)} on text B")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.06)
    note_beyond(axes, above)
    figure.legend(loc="outside lower center", ncols=len(canvas.NEEDS_COLOURS), handletextpad=0.2, columnspacing=1.5)
    numbered = _front_line(axes, data.front)
    names = [(label(entry.origin.removeprefix("seed:")), *_place(entry)) for entry in visible if entry.family == "seed"]
    annotate_points(axes, names, list(map(_place, visible)), numbered=numbered, size=7.5, color=canvas.MUTED)
    return figure


def fronts(data: ReportData) -> Figure | None:
    """The front of each class of metrics by what they need at most, as staircases; equal ones are drawn once."""
    shown: dict[str, list[Entry]] = {}
    for needs, members in data.fronts.items():
        if members and members not in shown.values():
            shown[needs] = members
    if len(shown) < 2:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = canvas.new_figure(3.2)
    axes = figure.add_subplot()
    points = {needs: list(map(_place, members)) for needs, members in shown.items()}
    last = max(complexity for some in points.values() for complexity, _ in some)
    for place, (needs, some) in enumerate(points.items()):
        colour = canvas.FRONT_COLOURS[needs]
        # What a complexity reaches, every greater one reaches too.
        line = [*some, (last + 1, some[-1][1])]
        # A front lies on those of narrower classes wherever they agree: these stay visible as a wider line below.
        axes.step(*columns(line), where="post", color=colour, linewidth=1.3 + 1.0 * (len(points) - 1 - place))
        axes.scatter(*columns(some), s=20, marker=canvas.FRONT_MARKERS[needs], color=colour, linewidth=0)
    values = [fitness for some in points.values() for _, fitness in some]
    limit(axes, min(values), max(values), values)
    axes.set_xlim(right=last + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("complexity")
    axes.set_ylabel(f"{objective_text(data.config)} on text B")
    best = {needs: some[-1][1] for needs, some in points.items()}
    names = [
        (f"{needs_text(needs)}  {nats(level)}", level, canvas.FRONT_COLOURS[needs]) for needs, level in best.items()
    ]
    name_levels(axes, names)
    return figure


def _progress(axes: Axes, data: ReportData, rung: int, levels: Sequence[float] = ()) -> int:
    """The candidates at a rung in the order of evaluation, and the best of them so far; how many lie above the axis."""
    some = [entry for entry in data.entries if len(entry.rungs) > rung]
    values = [entry.rungs[rung] for entry in some]
    best = [min(values[: index + 1]) for index in range(len(values))]
    highest = ceiling(values, keep=[best[0], *without_outliers(levels)])
    above = limit(axes, best[-1], highest, values)
    top = axes.get_ylim()[1]
    visible = [(entry.number, value) for entry, value in zip(some, values, strict=True) if value <= top]
    axes.scatter(*columns(visible), s=8, color=canvas.FAINT, linewidth=0)
    # Each best holds until the next one, the last until the end.
    numbers = [entry.number for entry in some]
    last = max(data.n_evaluations, numbers[-1])
    axes.step([*numbers, last], [*best, best[-1]], where="post", color=canvas.WINNER)
    axes.set_xlim(0, last * 1.01 + 1)
    axes.set_title(f"{count(data.rung_tokens[rung])} tokens, {len(some)} candidates")
    axes.set_xlabel("evaluations")
    axes.set_ylabel(objective_text(data.config))
    return above


def _mark_levels(axes: Axes, levels: dict[str, float], beyond: int) -> None:
    """Known metrics as lines with names in the right margin; those above the axis in the note."""
    high = axes.get_ylim()[1]
    names = []
    for name, level in levels.items():
        if level <= high:
            colour, width = (canvas.POWER, 1.1) if name == "power" else (canvas.MUTED, 0.7)
            axes.axhline(level, color=colour, linewidth=width, linestyle=(0, (4, 3)), zorder=1)
            names.append((f"{label(name)}  {nats(level)}", level, colour))
    name_levels(axes, names)
    named = [f"{label(name)} {nats(level)}" for name, level in levels.items() if level > high]
    note_beyond(axes, beyond, named)


def _front_line(axes: Axes, members: Sequence[Entry]) -> list[tuple[float, float]]:
    """The front as a staircase with the numbers of its table; its points."""
    points = [_place(entry) for entry in members]
    axes.step(*columns(points), where="post", color=canvas.WINNER, linewidth=1.2, zorder=2)
    axes.scatter(*columns(points), s=40, facecolor="none", edgecolor=canvas.WINNER, linewidth=1.2, zorder=3)
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


def _place(entry: Entry) -> tuple[float, float]:
    return entry.expression.complexity, entry.fitness
