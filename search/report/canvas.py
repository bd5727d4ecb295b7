"""How figures look, and how they become SVG: one style, one palette, the same bytes every time.

Colours are from the palette of Okabe and Ito (2008), which readers of any colour vision tell apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1f2933"
MUTED = "#6b7680"
FAINT = "#c5ccd3"
GRID = "#e8ebee"
WINNER = "#0072b2"
POWER = "#d55e00"
NEEDS_COLOURS = {"data-free": "#7b8794", "forward": "#009e73", "backward": "#e69f00", "second-order": "#cc79a7"}
NEEDS_MARKERS = {"data-free": "s", "forward": "o", "backward": "^", "second-order": "D"}
# Of fronts by what their members need at most; the front of all metrics is the winner's.
FRONT_COLOURS = {**{name: NEEDS_COLOURS[name] for name in ("data-free", "forward", "backward")}, "any": WINNER}
FRONT_MARKERS = {**{name: NEEDS_MARKERS[name] for name in ("data-free", "forward", "backward")}, "any": "D"}
# Of the best few beside the winner.
RIVAL_COLOURS = (NEEDS_COLOURS["forward"], NEEDS_COLOURS["backward"], NEEDS_COLOURS["second-order"])

WIDTH = 7.2
"""Of a figure, in inches."""

_STYLE: dict[str, Any] = {
    # Text stays text: it can be searched and edited, and takes the page's font, which is no wider than DejaVu.
    "svg.fonttype": "none",
    "svg.hashsalt": "evoprune",
    "text.parse_math": False,
    # By its generic name, so that a viewer without the font takes another sans-serif and not its default.
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "figure.dpi": 100,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Our style inside the block, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams
        parameters.update(_STYLE)
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches, that keeps its labels inside."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure) -> str:
    """The figure as a standalone SVG document without date or program name."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def inline(svg: str, name: str) -> str:
    """A standalone SVG as an element of a page: no prologue, and ids of its own so that figures do not mix."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", svg)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda head: _head(head[0], head[1]), svg, count=1)


def _head(head: str, view: str) -> str:
    width, height = view.removeprefix('viewBox="').rstrip('"').split()[2:]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'class="plot" aria-hidden="true" {view} width="{float(width):.0f}pt" height="{float(height):.0f}pt">'
    )
