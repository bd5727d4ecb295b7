"""Figures of an allocation search: what was found, and how. Every KL in them is from text B: none shows a result.

Each function returns None when there is nothing to draw yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evoprune.metrics.records import LEVELS
from evoprune.search.report import canvas
from evoprune.search.report.allocation_data import AllocationData, Cells
from evoprune.search.report.axes import ceiling, columns, limit, note_beyond, plain_numbers
from evoprune.search.report.labels import name_levels
from evoprune.search.report.maps import draw_map, write_cells
from evoprune.search.report.names import label, shortened
from evoprune.search.report.numbers import nats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NUMBERED = 16  # blocks
_MOST_RIVALS = 3
_ROW = 0.29  # inches
_HIGHEST = 9.0
_RIVAL_COLOURS = (canvas.NEEDS_COLOURS["forward"], canvas.NEEDS_COLOURS["backward"], "#cc79a7")


def allocation(data: AllocationData) -> Figure | None:
    """The best allocation as a map: sparsity by kind and block, white where it is the target."""
    if data.best is None or not data.best.cells:
        return None
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    kinds, blocks = data.axes
    table = [[100 * data.best.cells.get((kind, block), math.nan) for block in blocks] for kind in kinds]
    # A mixture of experts has hundreds of kinds: their rows are thin, and some of them are named.
    height = min(_ROW, _HIGHEST / len(kinds))
    step = math.ceil(0.16 / height)
    figure = canvas.new_figure(0.75 + height * len(kinds))
    axes = figure.add_subplot()
    target = 100 * data.config.target.sparsity
    reach = max([abs(value - target) for row in table for value in row if value == value] + [1.0])
    shades = colormaps["RdBu_r"].resampled(41)
    image = draw_map(axes, table, blocks, cmap=shades, vmin=target - reach, vmax=target + reach)
    axes.set_yticks([row + 0.5 for row in range(0, len(kinds), step)], [shortened(kind) for kind in kinds[::step]])
    if data.shared_by == "kind":
        axes.set_xticks([])
        axes.set_xlabel("all blocks")
    if len(blocks) <= _MOST_NUMBERED and height == _ROW:
        dark = 0.6 * reach
        write_cells(axes, table, "{:.0f}".format, lambda value: "white" if abs(value - target) > dark else canvas.INK)
    bar = figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02, ticks=MaxNLocator(5))
    bar.outline.set_visible(False)
    bar.ax.set_ylim(max(0.0, target - reach), min(100.0, target + reach))
    bar.set_label("sparsity, %")
    plain_numbers(bar.ax.yaxis)
    return figure


def profile(data: AllocationData) -> Figure | None:
    """Mean sparsity by block of the best allocation and of the best few allocators."""
    if data.best is None or len(data.axes[1]) < 2:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = canvas.new_figure(3.2)
    axes = figure.add_subplot()
    target = 100 * data.config.target.sparsity
    everywhere = "Budget" if data.config.target.drop_only else label("uniform")
    axes.axhline(target, color=canvas.POWER, linewidth=1.1, linestyle=(0, (4, 3)), label=everywhere)
    for (name, cells), colour in zip(_rivals(data), _RIVAL_COLOURS, strict=False):
        axes.plot(*columns(_percent(data, cells)), color=colour, linewidth=1.1, label=shortened(label(name)))
    few = len(data.axes[1]) <= 2 * _MOST_NUMBERED
    axes.plot(
        *columns(_percent(data, data.best.cells)),
        color=canvas.WINNER,
        linewidth=2,
        marker="D" if few else None,
        markersize=4,
        label=label("winner") if data.result is not None else "Best so far",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.set_xlabel("block")
    axes.set_ylabel("sparsity, %" if data.weights else "mean of matrices, %")
    plain_numbers(axes.yaxis)
    figure.legend(loc="outside lower center", ncols=5, handlelength=1.6, columnspacing=1.5)
    return figure


def convergence(data: AllocationData) -> Figure | None:
    """KL of the parent after each generation by evaluations, with the allocators' and the finalists'."""
    if not data.seeds:
        return None
    won = [generation for generation in data.generations if generation.winner is not None]
    parents = [(generation.evaluations, generation.winner["kl"]) for generation in won if generation.winner]
    finals = [(data.evaluations_until(line), line["kl"]) for line in data.finals]
    seeds = [(line["birth"] + 1, line["kl"]) for line in data.seeds]
    figure = canvas.new_figure(3.9)
    axes = figure.add_subplot()
    named = _named_seeds(data)
    values = [value for _, value in (*seeds, *parents, *finals)]
    # Some allocators are dreadful: to their scale, the whole search would be one line.
    keep = [*(value for _, value in (*parents, *finals)), *named.values()]
    beyond = limit(axes, min(values), ceiling(values, keep=keep), values)
    high = axes.get_ylim()[1]
    axes.scatter(
        *columns(point for point in seeds if point[1] <= high),
        s=14,
        color=canvas.MUTED,
        linewidth=0,
        label="allocators, on the last stage's text",
    )
    last = max([data.n_evaluations, *(x for x, _ in parents)])
    if parents:
        axes.step(
            *columns([*parents, (last, parents[-1][1])]),
            where="post",
            color=canvas.WINNER,
            linewidth=1.2,
            alpha=0.75,
            label="parent, on its generation's windows",
        )
    if finals:
        axes.scatter(
            *columns(finals), s=26, marker="D", color=canvas.WINNER, zorder=3, label="finalists, on all of text B"
        )
    _mark_seeds(axes, named, data.config.target.reference)
    axes.set_xlim(0, last * 1.01 + 1)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("KL to dense, nats per token")
    note_beyond(axes, beyond)
    figure.legend(loc="outside lower center", ncols=3, handletextpad=0.4, columnspacing=1.5)
    return figure


def moves(data: AllocationData) -> Figure | None:
    """By generation: what the winner gained on its parent, and how far its genes moved."""
    won = [generation for generation in data.generations if generation.gain is not None]
    if not won:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = canvas.new_figure(4.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    accepted = [(generation.number, generation.gain or 0.0) for generation in won if not generation.kept]
    upper.vlines([x for x, _ in accepted], 0, [y for _, y in accepted], color=canvas.WINNER, linewidth=1.1)
    upper.scatter(*columns(accepted), s=16, color=canvas.WINNER, linewidth=0)
    kept = [(generation.number, 0.0) for generation in won if generation.kept]
    upper.scatter(*columns(kept), s=16, facecolor="white", edgecolor=canvas.MUTED, linewidth=0.9, zorder=3)
    upper.set_ylabel("gain, nats per token")
    points = [(generation.number, 100 * move / LEVELS) for generation in won for move in generation.moves]
    lower.axhline(0, color=canvas.FAINT, linewidth=0.8)
    lower.scatter(*columns(points), s=16, color=canvas.WINNER, alpha=0.6, linewidth=0)
    lower.set_ylabel("change, % points")
    lower.set_xlabel("generation")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        plain_numbers(axes.yaxis)
    return figure


def _rivals(data: AllocationData) -> list[tuple[str, Cells]]:
    """The best few allocators that differ from the reference, from the winner and from each other."""
    assert data.best is not None
    reference = data.config.target.reference
    # Levels that were repaired to meet the budget are not quite the same everywhere.
    seen: list[Cells] = [data.best.cells, *(cells for name, cells in data.rivals if name == reference)]
    found = []
    for name, cells in data.rivals:
        if cells not in seen:
            seen.append(cells)
            found.append((name, cells))
    return found[:_MOST_RIVALS]


def _percent(data: AllocationData, cells: Cells) -> list[tuple[int, float]]:
    means = data.means(cells, 1)
    return [(block, 100 * means[block]) for block in data.axes[1]]


def _named_seeds(data: AllocationData) -> dict[str, float]:
    """KL of the reference and of the best few allocators, by name."""
    reference = data.config.target.reference
    ranked: Sequence[tuple[str, float]] = sorted(
        ((line["origin"].removeprefix("seed:"), line["kl"]) for line in data.seeds), key=lambda seed: seed[1]
    )
    return dict([*ranked[:_MOST_RIVALS], *(seed for seed in ranked[_MOST_RIVALS:] if seed[0] == reference)])


def _mark_seeds(axes: Axes, named: dict[str, float], reference: str) -> None:
    """Allocators as lines across, with names in the right margin."""
    names = []
    for name, level in named.items():
        colour = canvas.POWER if name == reference else canvas.MUTED
        axes.axhline(level, color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        names.append((f"{shortened(label(name))}  {nats(level)}", level, colour))
    name_levels(axes, names)
