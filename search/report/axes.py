"""What axes show: their scale, their limits, and a word about what lies beyond."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from evoprune.search.report import canvas
from evoprune.search.report.numbers import alike, compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Points as a list of x and a list of y."""
    xs, ys = [], []
    for x, y in points:
        xs.append(x)
        ys.append(y)
    return xs, ys


def plain_numbers(axis: Any) -> None:
    """Tick labels such as 0.05 and 20, never powers of ten in math; as many decimals on each tick of a linear axis."""
    from matplotlib.ticker import Formatter, NullFormatter

    class Plain(Formatter):
        def __call__(self, value: float, position: int | None = None) -> str:
            return compact(value)

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            if axis.get_scale() != "linear":
                return [compact(value) for value in values]
            return alike(values)

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(NullFormatter())


def fit_scale(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Make the ``x`` or ``y`` axis logarithmic if all values are positive and span a factor of eight; plain labels."""
    from matplotlib.ticker import LogLocator

    axis = getattr(axes, f"{which}axis")
    if values and min(values) > 0 and max(values) > 8 * min(values):
        set_scale: Callable[[str], None] = getattr(axes, f"set_{which}scale")
        set_scale("log")
        decades = max(values) > 200 * min(values)
        axis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 5.0)))
    plain_numbers(axis)


def ceiling(values: Sequence[float], keep: Sequence[float] = ()) -> float:
    """The largest value worth showing where low is good: the better quarter, and whatever has to be kept.

    Many candidates are bad and some are dreadful; to the scale of those, all good ones would be one line.
    """
    return max([quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0], *keep])


def without_outliers(values: Sequence[float]) -> list[float]:
    """Those that are not far above the rest, by Tukey's rule."""
    if len(values) < 4:
        return list(values)
    first, _, third = quantiles(values, n=4, method="inclusive")
    return [value for value in values if value <= third + 1.5 * (third - first)]


def limit(axes: Axes, low: float, high: float, values: Sequence[float]) -> int:
    """Show `low` to `high` with some air; how many values lie above. Logarithmic if the two are far apart."""
    fit_scale(axes, "y", [low, high])
    if axes.get_yscale() == "log":
        air = (high / low) ** 0.08
        axes.set_ylim(low / air, high * air)
    else:
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - 1.3 * margin, high + margin)
    top = axes.get_ylim()[1]
    return sum(value > top for value in values)


def note_beyond(axes: Axes, beyond: int, named: Sequence[str] = ()) -> None:
    """Say above the axes how many points lie beyond them."""
    if beyond:
        words = f"{beyond} above the axis" + (f", such as {', '.join(named)}" if named else "")
        axes.set_title(words, loc="right", fontsize=7.5, fontweight="normal", color=canvas.MUTED)
