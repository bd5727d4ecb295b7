"""Figures of a shape: what was found, beside what others keep.

Each function returns None when there is nothing to draw yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evoprune.search.report import canvas
from evoprune.search.report.axes import plain_numbers
from evoprune.search.report.figures_generation import MOST_RIVALS
from evoprune.search.report.names import label, shortened
from evoprune.search.report.structure_data import UNITS, Kept, StructureData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NUMBERED = 16  # blocks
_PANEL = 1.3  # inches
_DASHES = (0, (4, 3))


def shape(data: StructureData) -> Figure | None:
    """What every block keeps of its KV groups, query heads and neurons, before what the dense block has."""
    if data.best is None or not data.widths:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = canvas.new_figure(0.6 + _PANEL * len(data.shown_units))
    panels = figure.subplots(len(data.shown_units), 1, sharex=True, squeeze=False)[:, 0]
    blocks, numbered = range(len(data.widths)), len(data.widths) <= _MOST_NUMBERED
    for axes, place in zip(panels, data.shown_units, strict=True):
        dense = [widths[place] for widths in data.widths]
        kept = [block[place] for block in data.best.plan]
        axes.bar(blocks, dense, width=0.8, color=canvas.GRID, label="dense")
        axes.bar(blocks, kept, width=0.8, color=canvas.WINNER, label="kept")
        for block, count in enumerate(kept):
            if not count:
                axes.plot(block, 0.06 * max(dense), marker="x", color=canvas.POWER, markersize=5, clip_on=False)
            elif numbered:
                axes.annotate(
                    f"{count:,}", (block, count), (0, -2), textcoords="offset points", ha="center", va="top",
                    fontsize=7, color="white",
                )  # fmt: skip
        axes.set_ylabel(UNITS[place])
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_ylim(0, 1.03 * max(dense))
    _number_blocks(panels[-1], len(data.widths))
    return figure


def profile(data: StructureData) -> Figure | None:
    """Query heads and neurons that every block keeps, in per cent, of the best shape and of the best few seeds."""
    if data.best is None or len(data.widths) < 2:
        return None
    figure = canvas.new_figure(4.6)
    panels = figure.subplots(2, 1, sharex=True)
    reference = [(name, plan) for name, plan in data.rivals if name == data.reference]
    rivals = data.best_rivals(MOST_RIVALS)
    winner = label("winner") if data.result is not None else "Best so far"
    for axes, place in zip(panels, (1, 2), strict=True):
        for name, plan in reference:
            (line,) = axes.plot(_percent(data, plan, place), color=canvas.POWER, linewidth=1.1, label=label(name))
            # Seeds by criteria are often the same nearly everywhere.
            line.set(linestyle=_DASHES, zorder=3)
        for (name, plan), colour in zip(rivals, canvas.RIVAL_COLOURS, strict=False):
            axes.plot(_percent(data, plan, place), color=colour, linewidth=1.1, label=shortened(label(name)))
        marker = "D" if len(data.widths) <= 2 * _MOST_NUMBERED else None
        shares = _percent(data, data.best.plan, place)
        axes.plot(shares, color=canvas.WINNER, linewidth=2, marker=marker, markersize=4, label=winner)
        axes.set_ylim(-4, 104)
        axes.set_ylabel(f"{UNITS[place]}, %")
        plain_numbers(axes.yaxis)
    _number_blocks(panels[-1], len(data.widths))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, handlelength=1.6, columnspacing=1.5
    )
    return figure


def _percent(data: StructureData, plan: tuple[Kept, ...], place: int) -> list[float]:
    return [100 * block[place] / widths[place] for block, widths in zip(plan, data.widths, strict=True)]


def _number_blocks(axes: Axes, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(_MOST_NUMBERED, integer=True))
    axes.set_xlim(-0.6, count - 0.4)
    axes.set_xlabel("block")
