"""Figures of a search for a front: what was found on held-out text, how it was found, and what its members are.

Each function returns None when there is nothing to draw yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evoprune.search.report import canvas
from evoprune.search.report.axes import ceiling, columns, limit, note_beyond, plain_numbers
from evoprune.search.report.front_data import AnyFrontData, Place
from evoprune.search.report.labels import annotate_points
from evoprune.search.report.names import label, objective_text, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SAVED = {
    ("allocation", "parameters"): "prunable weights removed, %",
    ("allocation", "flops"): "multiply-adds saved, %",
    ("allocation", "latency"): "time saved, %",
    ("structure", "parameters"): "parameters of heads and MLPs removed, %",
    ("structure", "flops"): "operations of heads and MLPs saved, %",
    ("structure", "kv_bytes"): "bytes of keys and values saved, %",
}

_DASHES = (0, (4, 3))
_MOST_KINDS = 12
_KIND_COLOURS = (
    canvas.WINNER, canvas.POWER, "#009e73", "#e69f00", "#cc79a7", "#56b4e9", canvas.INK,
)  # fmt: skip


def front(data: AnyFrontData[Any, Any]) -> Figure | None:
    """Held-out loss against cost: the front, the reference at the same costs, allocators; and paired differences."""
    members = [row for row in data.rows if row.place is not None]
    if not members or data.dense is None:
        return None
    figure = canvas.new_figure(5.2)
    differences = [row.difference for row in members if row.difference is not None]
    ratios = [2.2, 1] if differences else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    axes = panels[0]
    ours = [row.place for row in members if row.place is not None]
    references = [row.reference for row in members if row.reference is not None]
    rivals = [place for _, place in data.started]
    kept = [place.value + place.error for place in (*ours, *references)]
    values = [place.value for place in (*ours, *references, *rivals)]
    beyond = limit(axes, min(data.dense["loss"], *values), ceiling(values, keep=kept), values)
    high = axes.get_ylim()[1]
    other = "at random" if data.reference == "random" else "uniform"
    axes.axhline(data.dense["loss"], color=canvas.INK, linewidth=1, linestyle=(0, (1, 1.5)), label="dense")
    shown = [(name, place) for name, place in data.started if place.value <= high]
    _bars(axes, [place for _, place in shown], data.starters, color=canvas.MUTED, fmt="o", markersize=3.5, alpha=0.7)
    _bars(axes, references, f"{other}, at the same costs", color=canvas.POWER, fmt="s", markersize=4, linestyle=_DASHES)
    # With a second cost members that save as much are worth what they are for another reason.
    joined = "-" if data.other is None else "none"
    _bars(axes, ours, "front", color=canvas.WINNER, fmt="D", markersize=4.5, linestyle=joined, zorder=3)
    axes.set_ylabel("loss on text C, nats per token")
    plain_numbers(axes.yaxis)
    note_beyond(axes, beyond)
    if differences:
        lower = panels[1]
        lower.axhline(0, color=canvas.POWER, linewidth=1, linestyle=_DASHES)
        _bars(lower, differences, "", color=canvas.WINNER, fmt="D", markersize=4.5)
        lower.set_ylabel(f"minus {other}")
        plain_numbers(lower.yaxis)
    panels[-1].set_xlabel(_saved(data))
    plain_numbers(panels[-1].xaxis)
    figure.legend(loc="outside lower center", ncols=4, handletextpad=0.5, columnspacing=1.5)
    best: dict[int, tuple[str, Place]] = {}  # of the allocators, at every budget
    for name, place in sorted(shown, key=lambda pair: pair[1].value):
        best.setdefault(round(place.saved), (name, place))
    names = [(shortened(label(name)), place.saved, place.value) for name, place in best.values()]
    points = [(place.saved, place.value) for place in (*ours, *references, *(place for _, place in shown))]
    annotate_points(axes, names, points, size=7, color=canvas.MUTED)
    return figure


def candidates(data: AnyFrontData[Any, Any]) -> Figure | None:
    """Every candidate's KL on text B against its cost, and those that no other beats."""
    if not data.measured:
        return None
    figure = canvas.new_figure(3.6)
    axes = figure.add_subplot()
    best = [(data.saved(line["cost"]), line["kl"]) for line in data.archive]
    values = [line["kl"] for line in data.measured]
    above = limit(axes, min(values), ceiling(values, keep=[kl for _, kl in best]), values)
    high = axes.get_ylim()[1]
    seeds, children = (
        [
            (data.saved(line["cost"]), line["kl"])
            for line in data.measured
            if (line["stage"] == "seeds") == given and line["kl"] <= high
        ]
        for given in (True, False)
    )
    axes.scatter(*columns(children), s=9, color=canvas.FAINT, linewidth=0, label="children")
    axes.scatter(*columns(seeds), s=14, color=canvas.MUTED, linewidth=0, label=data.starters)
    axes.step(*columns(best), where="pre", color=canvas.WINNER, linewidth=1.2)
    axes.scatter(*columns(best), s=18, marker="D", color=canvas.WINNER, linewidth=0, zorder=3, label="not beaten")
    axes.set_xlabel(_saved(data))
    axes.set_ylabel(f"{objective_text(data.config)}, nats per token")
    plain_numbers(axes.xaxis)
    note_beyond(axes, above)
    figure.legend(loc="outside lower center", ncols=3, handletextpad=0.3, columnspacing=1.5)
    return figure


def kinds(data: AnyFrontData[Any, Any]) -> Figure | None:
    """How much of every kind of matrix, or of unit, goes along the front."""
    along = data.kinds_along
    if not along or len(along) > _MOST_KINDS or len(data.rows) < 2:
        return None
    figure = canvas.new_figure(3.4)
    axes = figure.add_subplot()
    for at, (kind, points) in enumerate(along.items()):
        colour = _KIND_COLOURS[at % len(_KIND_COLOURS)]
        dashes = "-" if at < len(_KIND_COLOURS) else _DASHES
        axes.plot(*columns(points), color=colour, linewidth=1.3, linestyle=dashes, label=shortened(kind))
    axes.set_xlabel(_saved(data))
    axes.set_ylabel("removed, %")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=4, handlelength=1.6, columnspacing=1.5)
    return figure


def times(data: AnyFrontData[Any, Any]) -> Figure | None:
    """What members save of both costs, where there are two, by their KL."""
    other = data.other
    if other is None or not data.rows:
        return None
    figure = canvas.new_figure(3.8)
    axes = figure.add_subplot()
    values = [row.values for row in data.rows]
    saved = [100 * (1 - row[other["cost"]] / other["dense"]) for row in values]
    points = axes.scatter(
        [data.saved(row["cost"]) for row in values], saved, c=[row["fitness"] for row in values], cmap="cividis",
        s=26, linewidth=0,
    )  # fmt: skip
    figure.colorbar(points, label=f"{objective_text(data.config)} on text B, nats per token")
    axes.set_xlabel(_saved(data))
    axes.set_ylabel("time saved, %")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    return figure


def _saved(data: AnyFrontData[Any, Any]) -> str:
    """What the first cost is of, for an axis."""
    target = data.config.target
    return _SAVED[data.kind, target.pareto if data.kind == "allocation" else target.cost]


def _bars(axes: Axes, places: Sequence[Place], name: str, **style: Any) -> None:
    """Points with error bars, joined if the style has a line."""
    if places:
        axes.errorbar(
            [place.saved for place in places],
            [place.value for place in places],
            yerr=[place.error for place in places],
            **{"linestyle": "none", "linewidth": 1.2, "elinewidth": 0.9, "capsize": 2, "label": name or None, **style},
        )
