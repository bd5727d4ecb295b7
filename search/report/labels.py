"""Where labels go so that they do not lie on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the same order and near the wanted ones: those too close form centred blocks."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and _start(blocks[-1], places, gap) < _end(blocks[-2], places, gap) + gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    found = list(places)
    for block in blocks:
        first = _start(block, places, gap)
        for step, index in enumerate(block):
            found[index] = first + step * gap
    return found


def _start(block: Sequence[int], places: Sequence[float], gap: float) -> float:
    return sum(places[index] for index in block) / len(block) - gap * (len(block) - 1) / 2


def _end(block: Sequence[int], places: Sequence[float], gap: float) -> float:
    return _start(block, places, gap) + gap * (len(block) - 1)


def name_levels(axes: Axes, levels: Sequence[tuple[str, float, str]]) -> None:
    """Write names in the right margin, each joined to its height on the right edge, none on another.

    Args:
        levels: (text, y in data coordinates, colour).
    """
    low, high = axes.get_ylim()
    # Names need their room on the page, whatever the scale.
    to_page, to_data = axes.transScale.transform, axes.transScale.inverted().transform
    heights = [to_page((1, level))[1] for _, level, _ in levels]
    gap = 0.065 * (to_page((1, high))[1] - to_page((1, low))[1])
    places = [to_data((1, height))[1] for height in spread(heights, gap)]
    for (text, level, colour), place in zip(levels, places, strict=True):
        axes.annotate(
            text,
            (1, level),
            (1.03, place),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def annotate_points(
    axes: Axes,
    names: Sequence[tuple[str, float, float]],
    points: Sequence[tuple[float, float]],
    *,
    numbered: Sequence[tuple[float, float]] = (),
    size: float,
    color: str,
) -> None:
    """Write names beside their points, where they cover neither a point nor each other if there is such a place.

    Args:
        names: (text, x, y), the most important first.
        points: all that is drawn, in data coordinates.
        numbered: those of them with a number at their lower left.
        size: of the font, in points.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # fixes the axes' place
    scale = 72 / axes.figure.dpi

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return across * scale, up * scale

    frame = axes.bbox
    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in (at(*point) for point in points)]
    taken += [(x - 16, y - 14, x - 3, y - 4) for x, y in (at(*point) for point in numbered)]
    for text, x, y in names:
        across, up = at(x, y)
        best: tuple[float, float, float, Box] | None = None
        for dx, dy in _OFFSETS:
            width = 0.62 * size * len(text)
            left = across + dx if dx >= 0 else across + dx - width
            box = (left, up + dy - size / 2, left + width, up + dy + size / 2)
            # Leaving the frame on the left or right is worse than lying on a dot.
            cost = sum(_overlap(box, other) for other in taken)
            cost += 10 * max(frame.x0 * scale - box[0], box[2] - frame.x1 * scale, 0) * size
            if best is None or cost < best[0]:
                best = (cost, dx, dy, box)
        assert best is not None
        _, dx, dy, box = best
        taken.append(box)
        axes.annotate(
            text,
            (x, y),
            (dx, dy),
            textcoords="offset points",
            ha="left" if dx >= 0 else "right",
            va="center",
            fontsize=size,
            color=color,
        )


_OFFSETS = [(dx, dy) for dy in (5.0, -6.0, 0.0, 13.0, -14.0, 21.0) for dx in (5.0, -5.0)]


def _overlap(first: Box, second: Box) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return width * height if width > 0 and height > 0 else 0.0
