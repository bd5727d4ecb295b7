"""Numbers as the page prints them."""

from __future__ import annotations

from collections.abc import Sequence

MINUS = "\N{MINUS SIGN}"


def count(value: float) -> str:
    """A whole number with separators: ``12,345``."""
    return f"{value:,.0f}"


def percent(part: float, whole: float) -> str:
    """``part`` of ``whole`` in percent, one digit below ten; a dash if there is nothing to divide."""
    if not whole:
        return "–"
    share = 100 * part / whole
    return f"{share:.1f} %" if 0 < share < 10 else f"{share:.0f} %"


def perplexity(value: float) -> str:
    """Four digits or so: ``12.34``, ``123.4``, ``12,345``."""
    digits = 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}"


def nats(value: float) -> str:
    """A loss, a divergence or a fitness."""
    return f"{value:.4f}".replace("-", MINUS)


def signed(value: float) -> str:
    """A difference, with its sign."""
    return f"{value:+.4f}".replace("-", MINUS)


def compact(value: float) -> str:
    """An axis label: three digits at most."""
    return f"{value:.3g}".replace("-", MINUS)


def alike(values: Sequence[float]) -> list[str]:
    """Labels of a linear axis: all with the decimals of the one that needs most."""
    decimals = max((len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in values), default=0)
    return [f"{value + 0.0:.{decimals}f}".replace("-", MINUS) for value in values]


def seconds(value: float) -> str:
    """A duration in words: ``42 s``, ``5 min 3 s``, ``2 h 5 min``."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
