"""Figures of results: held-out losses with error bars, and how far masks agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evoprune.metrics.records import split_site
from evoprune.search.report import canvas
from evoprune.search.report.axes import plain_numbers
from evoprune.search.report.data import ReportData
from evoprune.search.report.maps import draw_map, write_cells
from evoprune.search.report.names import label, shortened
from evoprune.search.report.numbers import compact
from evoprune.search.report.run_data import OF_WINNER, Contender, RunData
from evoprune.search.site_names import attention_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    **dict.fromkeys(OF_WINNER, canvas.WINNER),
    "power": canvas.POWER,
    "uniform": canvas.POWER,
    "dense": canvas.INK,
}
_MARKERS = {"winner": "D", "power": "s", "uniform": "s"}


def baselines(data: RunData[Any]) -> Figure | None:
    """Held-out loss of every contender, and its distance from the winner, each with its standard error."""
    rows = [row for row in data.contenders if row.name != "dense"]
    dense = data.contender("dense")
    if dense is None:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = canvas.new_figure(0.85 + 0.27 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    floor = dense.heldout["loss"]
    _points(left, rows, [(row.heldout["loss"], row.heldout["stderr"]) for row in rows], least=floor)
    left.axvline(floor, color=canvas.INK, linewidth=1, linestyle=(0, (1, 1.5)))
    left.annotate(
        "dense",
        (floor, 1),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    left.set_xlabel("loss on text C, nats per token")
    right.axvline(0, color=canvas.WINNER, linewidth=0.8)
    errors = [row.difference["stderr"] if row.difference else 0.0 for row in rows]
    _points(right, rows, [(row.above, error) for row, error in zip(rows, errors, strict=True)], least=0)
    right.set_xlabel("loss minus the winner's, on the same windows")
    left.set_yticks(range(len(rows)), [shortened(label(row.name)) for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        plain_numbers(axes.xaxis)
    return figure


def agreement(data: ReportData) -> Figure | None:
    """Per kind of layer and block, intersection over union of what the winner and another criterion prune."""
    if not data.agreement:
        return None
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    # Wanda first: the file has the names in alphabetical order.
    names = sorted(data.agreement, key=lambda name: name != "wanda")
    kinds = sorted(
        {split_site(site)[0] for site in data.agreement[names[0]]}, key=lambda kind: (attention_first(kind), kind)
    )
    blocks = sorted({split_site(site)[1] for site in data.agreement[names[0]]})
    smallest = min(value for values in data.agreement.values() for value in values.values())
    halfway = (1 + smallest) / 2
    cells = {
        name: {split_site(site): value for site, value in values.items()} for name, values in data.agreement.items()
    }
    figure = canvas.new_figure(1.0 + 0.29 * len(kinds))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        table = [[cells[name].get((kind, block), float("nan")) for block in blocks] for kind in kinds]
        colours = {"cmap": colormaps["Blues"].resampled(32), "vmin": int(10 * smallest) / 10, "vmax": 1}
        image = draw_map(axes, table, blocks, **colours)
        axes.set_title(f"winner and {label(name)}")
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
        if len(blocks) <= 10:
            write_cells(axes, table, "{:.2f}".format, lambda value: "white" if value > halfway else canvas.INK)
    bar = figure.colorbar(image, ax=list(panels), fraction=0.035, pad=0.02, ticks=MaxNLocator(5))
    bar.outline.set_visible(False)
    bar.set_label("agreement (IoU)")
    plain_numbers(bar.ax.yaxis)
    return figure


def _points(axes: Axes, rows: Sequence[Contender], values: Sequence[tuple[float, float]], least: float) -> None:
    """Dots with error bars, one row each; those far out stand at the edge as arrows with their number.

    Args:
        values: (mean, standard error) of each row.
        least: another value to show, at the left.
    """
    means = sorted(mean for mean, _ in values)
    centre = means[(len(means) - 1) // 2]
    # Random and magnitude are often so bad that to their scale all others are one dot.
    reach = 3 * max(centre - min(least, means[0]), 2 * max(error for mean, error in values if mean <= centre))
    near = [(mean, error) for mean, error in values if mean <= centre + reach]
    low = min(least, *(mean - error for mean, error in near))
    high = max(mean + error for mean, error in near)
    span = (high - low) or 1e-3
    axes.set_xlim(low - 0.06 * span, high + (0.06 if len(near) == len(values) else 0.2) * span)
    for place, (row, (mean, error)) in enumerate(zip(rows, values, strict=True)):
        colour = _COLOURS.get(row.name, canvas.MUTED)
        if mean > centre + reach:
            axes.annotate(
                f"{compact(mean)} →",
                (1, place),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=8,
                color=colour,
            )
        else:
            marker = _MARKERS.get(row.name, "o")
            axes.errorbar(mean, place, xerr=error, fmt=marker, color=colour, markersize=5, capsize=2.5, elinewidth=1.2)
