"""Maps: numbers by kind of matrix and block, as coloured cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BLOCK_NUMBERS = 16


def draw_map(axes: Axes, table: Sequence[Sequence[float]], blocks: Sequence[int], **colours: Any) -> Any:
    """Draw a table as a map with a row for each kind and a column for each block; the first row is the top one.

    Args:
        table: NaN where a block does not have such a matrix.
        colours: ``cmap``, ``vmin`` and ``vmax``. Few colours, or a colour bar of it becomes an image.

    Returns:
        What a colour bar needs.
    """
    # A mesh of shapes, as an image would be a data URL inside the page.
    image = axes.pcolormesh(table, **colours)
    axes.set_ylim(len(table), 0)
    axes.set_xlabel("block")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    step = -(-len(blocks) // _MOST_BLOCK_NUMBERS)
    axes.set_xticks([place + 0.5 for place in range(0, len(blocks), step)], [str(block) for block in blocks[::step]])
    return image


def write_cells(
    axes: Axes, table: Sequence[Sequence[float]], text: Callable[[float], str], colour: Callable[[float], str]
) -> None:
    """Write a number into each cell of a map, in a colour that its cell leaves legible."""
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            if value == value:  # not NaN
                axes.text(
                    column + 0.5, row + 0.5, text(value), ha="center", va="center", fontsize=7, color=colour(value)
                )
