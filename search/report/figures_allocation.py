"""Figures of an allocation: what was found, beside what others would do.

Each function returns None when there is nothing to draw yet.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from evoprune.search.report import canvas
from evoprune.search.report.allocation_data import AllocationData, Cells
from evoprune.search.report.axes import columns, plain_numbers
from evoprune.search.report.figures_generation import MOST_RIVALS
from evoprune.search.report.maps import draw_map, write_cells
from evoprune.search.report.names import label, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NUMBERED = 16  # blocks
_ROW = 0.29  # inches
_HIGHEST = 9.0


def allocation(data: AllocationData) -> Figure | None:
    """The best allocation as a map: sparsity by kind and block, white where it is the target."""
    if data.best is None or not data.best.plan:
        return None
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    kinds, blocks = data.axes
    table = [[100 * data.best.plan.get((kind, block), math.nan) for block in blocks] for kind in kinds]
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
    for (name, cells), colour in zip(data.best_rivals(MOST_RIVALS), canvas.RIVAL_COLOURS, strict=False):
        axes.plot(*columns(_percent(data, cells)), color=colour, linewidth=1.1, label=shortened(label(name)))
    few = len(data.axes[1]) <= 2 * _MOST_NUMBERED
    axes.plot(
        *columns(_percent(data, data.best.plan)),
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


def _percent(data: AllocationData, cells: Cells) -> list[tuple[int, float]]:
    means = data.means(cells, 1)
    return [(block, 100 * means[block]) for block in data.axes[1]]
