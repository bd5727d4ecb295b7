"""The map of keep probabilities: at some moments of the run, and beside them what the best mask keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evoprune.search.report import canvas
from evoprune.search.report.axes import plain_numbers
from evoprune.search.report.maps import draw_map, write_cells
from evoprune.search.report.names import shortened
from evoprune.search.report.policy_data import Moment, PolicyData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEVELS = 20  # shades
_SIDE_BY_SIDE = 24  # columns
_CHARACTERS = 88  # of the names of kinds, across the figure
_MOST_NUMBERED = 16  # blocks
_ROW = 0.2  # inches
_LEAST_ROW = 0.035
_LEAST = 0.9  # of a panel
_PANEL = 1.9
_GAP = 0.8  # columns between kinds


@dataclass(frozen=True)
class _Layout:
    """Where units are on the map: kinds side by side, with gaps.

    Attributes:
        starts: the first column of each kind.
        widths: columns of each kind.
    """

    starts: dict[str, float]
    widths: dict[str, int]

    @property
    def width(self) -> float:
        """Of all of it, in columns."""
        last = list(self.starts)[-1]
        return self.starts[last] + self.widths[last]


def probabilities(data: PolicyData) -> Figure | None:
    """Keep probabilities by block and unit or by block and kind, a panel for each moment and one for the best mask."""
    if not data.shown:
        return None
    return _by_unit(data) if data.by_unit else _by_kind(data)


def _by_unit(data: PolicyData) -> Figure:
    layout, shades = _layout(data), _shades()
    panels = [(_after(moment), moment.values) for moment in data.shown]
    if data.mask is not None:
        panels.append((_found(data), tuple(data.mask.astype(float).tolist())))
    unit = "metric" if data.metrics is not None else "unit of the block"
    height = max(_LEAST, _LEAST_ROW * len(data.blocks), min(_ROW * len(data.blocks), _PANEL))
    across = 1 if layout.width > _SIDE_BY_SIDE else 2 if layout.width > 8 else len(panels)
    rows = math.ceil(len(panels) / across)
    figure = canvas.new_figure(0.3 + (height + 0.68) * rows)
    figure.set_layout_engine("constrained", wspace=0.06)
    drawn: list[Axes] = list(figure.subplots(rows, across, sharey=True, squeeze=False).flat)
    for axes, (title, values) in zip(drawn, panels, strict=False):
        _draw_units(axes, data, layout, values, shades, _CHARACTERS / across)
        axes.set_title(title, pad=16)
    for at, axes in enumerate(drawn[: len(panels)]):
        axes.set_ylabel("" if at % across else "block")
        axes.set_xlabel("" if at + across < len(panels) else unit, fontsize=8)
    for axes in drawn[len(panels) :]:
        axes.set_visible(False)
    _add_bar(figure, drawn[: len(panels)], shades)
    return figure


def _draw_units(
    axes: Axes, data: PolicyData, layout: _Layout, values: Sequence[float], shades: Any, characters: float
) -> None:
    """One panel: a row for each block, the first on top; a cell for each unit; for the last, see `_name_kinds`."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    # Neighbours of a shade are one shape, and all shapes of a shade one path: a page has thousands of units.
    shapes: dict[int, list[tuple[float, float, float]]] = {}
    places = {block: at for at, block in enumerate(data.blocks)}
    for row in data.rows:
        left, top = layout.starts[row.kind], places[row.block]
        begin, shade = 0, -1
        levels = [min(_LEVELS - 1, int(_LEVELS * values[unit])) for unit in row.units]
        for index, level in enumerate([*levels, -1]):
            if level != shade:
                if index:
                    shapes.setdefault(shade, []).append((left + begin, top, left + index))
                begin, shade = index, level
    code = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for level, boxes in sorted(shapes.items()):
        corners = [
            corner
            for left, top, right in boxes
            for corner in ((left, top), (right, top), (right, top + 1), (left, top + 1), (left, top))
        ]
        axes.add_patch(PathPatch(Path(corners, code * len(boxes)), facecolor=shades(level), linewidth=0))
    axes.set_xlim(0, layout.width)
    axes.set_ylim(len(data.blocks), 0)
    for kind in data.kinds:
        rows = [places[row.block] for row in data.rows if row.kind == kind]
        left, right = layout.starts[kind], layout.starts[kind] + layout.widths[kind]
        # A frame shows where units are that are white.
        axes.plot(
            [left, right, right, left, left], [min(rows), min(rows), max(rows) + 1, max(rows) + 1, min(rows)],
            color=canvas.FAINT, linewidth=0.6, clip_on=False,
        )  # fmt: skip
    _name_kinds(axes, layout, characters)
    _name_units(axes, data, layout)
    step = -(-len(data.blocks) // _MOST_NUMBERED)
    axes.set_yticks([at + 0.5 for at in range(0, len(data.blocks), step)], [str(at) for at in data.blocks[::step]])
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _name_kinds(axes: Axes, layout: _Layout, characters: float) -> None:
    """Write each kind above its units, none on another.

    Args:
        characters: that have room beside each other in the panel.
    """
    each, free = layout.width / characters, -layout.width / 20
    kinds = list(layout.starts)
    words = kinds if len(set(kinds)) > len({_last(kind) for kind in kinds}) else [_last(kind) for kind in kinds]
    if sum(map(len, words)) + len(words) > characters:
        words = [shortened(word, max(3, int(characters / len(words)) - 1)) for word in words]
    for kind, word in zip(kinds, words, strict=True):
        half = each * len(word) / 2
        centre = max(layout.starts[kind] + layout.widths[kind] / 2, free + half)
        free = centre + half + each
        axes.annotate(
            word, (centre, 0), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=7.5,
            color=canvas.MUTED, annotation_clip=False,
        )  # fmt: skip


def _last(kind: str) -> str:
    """A kind of matrix without the part that it is in."""
    return kind.rpartition(".")[2]


def _name_units(axes: Axes, data: PolicyData, layout: _Layout) -> None:
    """Tick labels: the first and the last unit of each kind, where both have room."""
    ticks: list[tuple[float, str]] = []
    for kind in data.kinds:
        width = layout.widths[kind]
        if width > 1 and width / layout.width > 0.04:
            ends = (0, width - 1) if width / layout.width > 0.07 or width > 2 else (0,)
            ticks += [(layout.starts[kind] + at + 0.5, str(at)) for at in ends]
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=7)


def _by_kind(data: PolicyData) -> Figure:
    """A row for each kind and a column for each block."""
    panels = [(_after(moment), moment.values) for moment in data.shown]
    if data.kept:
        shares = tuple(kept / len(row.units) for kept, row in zip(data.kept, data.rows, strict=True))
        panels.append((_found(data), shares))
    height = 0.27 * len(data.kinds)
    figure = canvas.new_figure(0.55 + (height + 0.35) * len(panels))
    drawn: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False).flat)
    shades = _shades()
    for axes, (title, values) in zip(drawn, panels, strict=True):
        table = [
            [values[data.cells[kind, block]] if (kind, block) in data.cells else math.nan for block in data.blocks]
            for kind in data.kinds
        ]
        draw_map(axes, table, data.blocks, cmap=shades, vmin=0, vmax=1, edgecolors=canvas.FAINT, linewidth=0.4)
        axes.set_title(title)
        axes.set_yticks([row + 0.5 for row in range(len(data.kinds))], [shortened(kind) for kind in data.kinds])
        if len(data.blocks) <= _MOST_NUMBERED:
            write_cells(axes, table, "{:.2f}".format, lambda value: "white" if value > 0.55 else canvas.INK)
        if axes is not drawn[-1]:
            axes.set_xlabel("")
    _add_bar(figure, drawn, shades)
    return figure


def _layout(data: PolicyData) -> _Layout:
    widths = {kind: max(len(row.units) for row in data.rows if row.kind == kind) for kind in data.kinds}
    gap, left = max(_GAP, 0.012 * sum(widths.values())), 0.0
    starts = {}
    for kind, width in widths.items():
        starts[kind] = left
        left += width + gap
    return _Layout(starts, widths)


def _shades() -> Any:
    from matplotlib import colormaps

    return colormaps["Blues"].resampled(_LEVELS)


def _after(moment: Moment) -> str:
    if not moment.steps:
        return "at the start"
    return f"after {moment.steps:,} step{'s' if moment.steps > 1 else ''}"


def _found(data: PolicyData) -> str:
    verb = "keeps" if data.metrics is None else "has"
    return f"what the {'winner' if data.result is not None else 'best so far'} {verb}"


def _add_bar(figure: Figure, panels: Sequence[Axes], shades: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), shades),
        ax=list(panels),
        fraction=0.035,
        pad=0.02,
        ticks=[0, 0.25, 0.5, 0.75, 1],
    )
    bar.outline.set_visible(False)
    bar.set_label("keep probability")
    plain_numbers(bar.ax.yaxis)
