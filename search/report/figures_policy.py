"""Figures of a policy search: how it went, and what the best mask keeps. Every loss in them is from text B.

Each function returns None when there is nothing to draw yet.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from evoprune.search.report import canvas
from evoprune.search.report.axes import columns, limit, note_beyond, plain_numbers, without_outliers
from evoprune.search.report.maps import draw_map
from evoprune.search.report.names import objective_text, shortened
from evoprune.search.report.policy_data import PolicyData

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIAGNOSTICS = {
    "entropy": "entropy of a unit, nats",
    "undecided": "share of undecided units",
    "rho": "variance: minibatch / masks",
    "baseline": "baseline, nats per token",
    "cosine": "cosine of half gradients",
    "jaccard": "overlap of modes (Jaccard)",
    "rate": "learning rate",
    "kl": "step of the policy, nats",
    "clipped": "share of clipped advantages",
    "failed": "masks without a finite loss",
    "samples": "masks of a step",
}
"""What numbers of learners are called; others are called as learners call them."""
METRIC_COLOURS = (
    canvas.WINNER, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", canvas.POWER, "#332288", "#999933", canvas.MUTED,
    "#117733", "#882255",
)  # fmt: skip
"""Of metrics that matrices choose from; more of them take turns, with letters to tell them apart."""

_PALE = ("#e69f00", "#56b4e9")
_MOST_NUMBERED = 16  # blocks
_MOST_NAMED_BLOCKS = 12
_MOST_KINDS = 6
_PANEL = 1.3  # inches
_ROW = 0.29
_HIGHEST = 9.0


def convergence(data: PolicyData) -> Figure | None:
    """Losses of the masks of every step, of modes of the policy, and of the reference, by steps done."""
    if not data.modes and not data.steps:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = canvas.new_figure(3.9)
    axes = figure.add_subplot()
    dots = [(step.number, loss) for step in data.steps for loss in step.losses]
    means = [(step.number, step.mean) for step in data.steps if step.mean is not None]
    modes = [(mode.steps, mode.loss) for mode in data.modes if not mode.start]
    starts = [(mode.steps, mode.loss) for mode in data.modes if mode.start]
    finals = [(mode.steps, mode.loss) for mode in data.finals]
    references = [(step.number, step.reference) for step in data.steps if step.reference is not None]
    keep = [value for _, value in (*means, *modes, *finals, *references)]
    values = [value for _, value in (*dots, *starts)] + keep
    if not values:
        return None
    near = without_outliers(values)
    beyond = limit(axes, min(values), max([*near, *without_outliers(keep)]), values)
    axes.scatter(*columns(dots), s=7, color=canvas.MUTED, alpha=0.6, linewidth=0, label="mask of a step", zorder=2)
    banded = [step for step in data.steps if step.mean is not None and step.spread is not None]
    if len(banded) > 1:
        axes.fill_between(
            [step.number for step in banded],
            [(step.mean or 0.0) - (step.spread or 0.0) for step in banded],
            [(step.mean or 0.0) + (step.spread or 0.0) for step in banded],
            color=canvas.MUTED, alpha=0.22, linewidth=0, label="± standard deviation",
        )  # fmt: skip
    if means:
        axes.plot(*columns(means), color=canvas.MUTED, linewidth=1.4, label="mean of a step")
    if references:
        axes.plot(
            *columns(references), color=canvas.NEEDS_COLOURS["forward"], linewidth=1.1, label="reference, same text"
        )
    if starts:
        axes.scatter(
            *columns(starts), s=22, facecolor="white", edgecolor=canvas.INK, linewidth=0.9, zorder=3,
            label="one metric throughout",
        )  # fmt: skip
    if modes:
        axes.plot(
            *columns(modes), color=canvas.POWER, linewidth=1.2, marker="s", markersize=4, zorder=4,
            label="mode, validation text",
        )  # fmt: skip
    if finals:
        axes.scatter(*columns(finals), s=26, marker="D", color=canvas.WINNER, zorder=5, label="finalist, all of text B")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    last = max(x for x, _ in (*dots, *modes, *means, *finals, (1, 0)))
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.set_xlabel("steps done")
    axes.set_ylabel(f"{objective_text(data.config)}, nats per token")
    note_beyond(axes, beyond)
    figure.legend(loc="outside lower center", ncols=4, handletextpad=0.4, columnspacing=1.5)
    return figure


def groups(data: PolicyData) -> Figure | None:
    """Mean keep probability by block and kind over time; of a choice of metrics, of each metric."""
    if data.metrics is not None:
        return _metric_shares(data)
    if len(data.groups) < 2 or not data.rows:
        return None
    from matplotlib import colormaps

    kinds = data.kinds[:_MOST_KINDS]
    wide = 2 if len(kinds) > 1 else 1
    rows = math.ceil(len(kinds) / wide)
    figure = canvas.new_figure(0.6 + 2.2 * rows)
    panels: list[Axes] = list(figure.subplots(rows, wide, sharex=True, sharey=True, squeeze=False).flat)
    # Without the palest, which paper swallows.
    shade = colormaps["viridis"].resampled(256)
    places = {block: 0.88 * at / max(1, len(data.blocks) - 1) for at, block in enumerate(data.blocks)}
    width = 1.2 if len(data.blocks) <= 2 * _MOST_NAMED_BLOCKS else 0.7
    for axes, kind in zip(panels, kinds, strict=False):
        for block in data.blocks:
            if (row := data.cells.get((kind, block))) is not None:
                points = [(moment.steps, moment.values[row]) for moment in data.groups]
                axes.plot(*columns(points), color=shade(places[block]), linewidth=width, label=f"block {block}")
        axes.set_title(kind)
        axes.set_ylim(-0.03, 1.03)
        plain_numbers(axes.yaxis)
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    _steps_below(panels[: len(kinds)], wide)
    for axes in panels[::wide]:
        axes.set_ylabel("mean keep probability")
    if len(data.blocks) <= _MOST_NAMED_BLOCKS:
        handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        ordered = [name for name in (f"block {block}" for block in data.blocks) if name in handles]
        figure.legend(
            [handles[name] for name in ordered], ordered, loc="outside lower center", ncols=6, handlelength=1.4
        )
    else:
        _block_bar(figure, panels, data.blocks, shade)
    return figure


def diagnostics(data: PolicyData) -> Figure | None:
    """What the learner tells of its steps, a panel for each number that ever changed."""
    known = {name: data.diagnostics[name] for name in DIAGNOSTICS if name in data.diagnostics}
    told = {**known, **data.diagnostics}
    changing = {name: points for name, points in told.items() if name not in data.constant}
    if not changing:
        return None
    wide = min(3, len(changing))
    rows = math.ceil(len(changing) / wide)
    figure = canvas.new_figure(0.35 + 1.45 * rows)
    panels: list[Axes] = list(figure.subplots(rows, wide, sharex=True, squeeze=False).flat)
    for axes, (name, points) in zip(panels, changing.items(), strict=False):
        if name == "baseline":
            means = [(step.number, step.mean) for step in data.steps if step.mean is not None]
            axes.plot(*columns(means), color=canvas.FAINT, linewidth=1)
        # A line would cross what is not known, and one point is no line.
        axes.plot(*columns(points), color=canvas.WINNER, linewidth=1.2, marker="." if len(points) < 40 else None)
        if name == "rho" and (threshold := _rho_limit(data)) is not None:
            axes.axhline(threshold, color=canvas.POWER, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_title(shortened(DIAGNOSTICS.get(name, name.replace("_", " "))), fontsize=8, fontweight="normal")
        axes.margins(y=0.12)
        plain_numbers(axes.yaxis)
    for axes in panels[len(changing) :]:
        axes.set_visible(False)
    _steps_below(panels[: len(changing)], wide)
    return figure


def kept(data: PolicyData) -> Figure | None:
    """What every block of the best mask keeps of each kind of unit; of a choice of metrics, a map of these."""
    if not data.kept:
        return None
    if data.metrics is not None:
        return _metric_map(data)
    from matplotlib.ticker import MaxNLocator

    kinds, numbered = data.kinds[:_MOST_KINDS], len(data.blocks) <= _MOST_NUMBERED
    figure = canvas.new_figure(0.6 + _PANEL * len(kinds))
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        present = [(block, data.cells[kind, block]) for block in data.blocks if (kind, block) in data.cells]
        dense = [(block, len(data.rows[row].units)) for block, row in present]
        most = max(count for _, count in dense)
        axes.bar(*columns(dense), width=0.8, color=canvas.GRID)
        axes.bar(*columns((block, data.kept[row]) for block, row in present), width=0.8, color=canvas.WINNER)
        for block, row in present:
            if not data.kept[row]:
                axes.plot(block, 0.06 * most, marker="x", color=canvas.POWER, markersize=5, clip_on=False)
            elif numbered and most > 1:
                axes.annotate(
                    f"{data.kept[row]:,}", (block, data.kept[row]), (0, -2), textcoords="offset points", ha="center",
                    va="top", fontsize=7, color="white",
                )  # fmt: skip
        axes.set_ylabel(shortened(kind, 16))
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylim(0, 1.03 * most)
    panels[-1].xaxis.set_major_locator(MaxNLocator(_MOST_NUMBERED, integer=True))
    panels[-1].set_xlim(min(data.blocks) - 0.6, max(data.blocks) + 0.6)
    panels[-1].set_xlabel("block")
    return figure


def _metric_shares(data: PolicyData) -> Figure | None:
    """Mean probability of every metric over the matrices."""
    if data.metrics is None or len(data.snapshots) < 2:
        return None
    figure = canvas.new_figure(3.2)
    axes = figure.add_subplot()
    for at, (metric, points) in enumerate(data.metric_shares.items()):
        colour, style = METRIC_COLOURS[at % len(METRIC_COLOURS)], "-" if at < len(METRIC_COLOURS) else "--"
        axes.plot(*columns(points), color=colour, linestyle=style, label=shortened(metric, 24))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mean probability")
    plain_numbers(axes.yaxis)
    _steps_below([axes], 1)
    figure.legend(loc="outside lower center", ncols=4, handlelength=1.6, columnspacing=1.5)
    return figure


def _metric_map(data: PolicyData) -> Figure:
    """Which metric each matrix has, by kind and block."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    assert data.metrics is not None
    places = {metric: at for at, metric in enumerate(data.metrics)}
    used = [metric for metric, count, _ in data.choices if count]
    chosen = {cell: places[data.chosen[at]] for cell, at in data.cells.items()}
    table = [[chosen.get((kind, block), math.nan) for block in data.blocks] for kind in data.kinds]
    # A mixture of experts has hundreds of kinds: their rows are thin, and some of them are named.
    height = min(_ROW, _HIGHEST / len(data.kinds))
    step = math.ceil(0.16 / height)
    legend_rows = math.ceil(len(used) / 4)
    figure = canvas.new_figure(0.6 + height * len(data.kinds) + 0.2 * legend_rows)
    axes = figure.add_subplot()
    colours = [METRIC_COLOURS[at % len(METRIC_COLOURS)] for at in range(len(places))]
    many = len(places) > 1
    draw_map(
        axes, table, data.blocks, cmap=ListedColormap(colours if many else colours * 2), vmin=-0.5,
        vmax=max(len(places), 2) - 0.5, edgecolors="white", linewidth=0.6,
    )  # fmt: skip
    axes.set_yticks(
        [row + 0.5 for row in range(0, len(data.kinds), step)], [shortened(kind) for kind in data.kinds[::step]]
    )
    letters = {metric: chr(ord("A") + at % 26) for at, metric in enumerate(data.metrics)}
    lettered = height == _ROW and len(data.blocks) <= 2 * _MOST_NUMBERED
    if lettered:
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                if value == value:  # not NaN
                    metric = data.metrics[int(value)]
                    axes.text(
                        column + 0.5, row + 0.5, letters[metric], ha="center", va="center", fontsize=7,
                        color=canvas.INK if colours[int(value)] in _PALE else "white",
                    )  # fmt: skip
    handles = [Patch(color=colours[places[metric]]) for metric in used]
    names = [f"{f'{letters[metric]}: ' if lettered else ''}{shortened(metric, 24)}" for metric in used]
    figure.legend(handles, names, loc="outside lower center", ncols=4, handlelength=1, columnspacing=1.5)
    return figure


def _rho_limit(data: PolicyData) -> float | None:
    """From where on leaving one out has the smaller variance: 1 / (K - 1)."""
    samples = {value for _, value in data.diagnostics.get("samples", ())}
    return 1 / (min(samples) - 1) if len(samples) == 1 and min(samples) > 1 else None


def _steps_below(panels: Sequence[Axes], wide: int) -> None:
    """Name the lowest axis of every column, and show whole steps."""
    from matplotlib.ticker import MaxNLocator

    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in panels[-wide:]:
        axes.set_xlabel("steps done")
        axes.tick_params(axis="x", labelbottom=True)


def _block_bar(figure: Figure, panels: Sequence[Axes], blocks: Sequence[int], shade: Any) -> None:
    """A colour bar of blocks, where there are too many for a legend."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    few = ListedColormap([shade(0.88 * at / 31) for at in range(32)])
    shown: Iterable[Axes] = [axes for axes in panels if axes.get_visible()]
    bar = figure.colorbar(
        ScalarMappable(Normalize(min(blocks), max(blocks)), few), ax=[*shown], fraction=0.035, pad=0.02,
        ticks=MaxNLocator(6, integer=True),
    )  # fmt: skip
    bar.outline.set_visible(False)
    bar.set_label("block")
