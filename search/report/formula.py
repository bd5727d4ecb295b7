"""Formulas as pictures: LaTeX set by matplotlib's mathtext, as one SVG path that scales with the text around it."""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape

# Spellings that mathtext lacks or spaces badly.
_SPELLINGS = (
    ("\\lVert", "\\Vert"),
    ("\\rVert", "\\Vert"),
    ("\\left\\lvert", "\\left|"),
    ("\\right\\rvert", "\\right|"),
    ("\\lvert", "|"),
    ("\\rvert", "|"),
)
_FONT_UNITS = 100.0
_LETTERS = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}


@lru_cache(1024)
def formula_svg(latex: str, text: str, *, display: bool = False) -> str | None:
    """An inline SVG of a formula, sized in em, on the baseline of the text around it.

    Args:
        latex: math without dollar signs.
        text: what screen readers say.
        display: full-size fractions, for a formula that stands alone.

    Returns:
        The SVG element; None if mathtext cannot set it (an operator of a plug-in may use any macro).
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import text_to_path

    font = FontProperties(math_fontfamily="cm")
    try:
        vertices, codes = text_to_path.get_text_path(font, f"${mathtext(latex, display=display)}$", ismath=True)
    except ValueError:
        return None
    outline = Outline(vertices, codes)
    pieces = []
    for points, code in outline.iter_segments(simplify=False):
        # SVG counts downwards.
        numbers = [f"{-value if index % 2 else value:.4g}" for index, value in enumerate(points)]
        pieces.append(_LETTERS[int(code)] + ("" if code == Outline.CLOSEPOLY else " ".join(numbers)))
    box = outline.get_extents()
    left, top, width, height = box.x0 - 2, -box.y1 - 2, box.width + 4, box.height + 4
    view = f"{left:.1f} {top:.1f} {width:.1f} {height:.1f}"
    em = [f"{value / _FONT_UNITS:.3f}em" for value in (width, height, box.y0 - 2)]
    return (
        f'<svg class="formula" role="img" aria-label="{escape(text)}" viewBox="{view}" '
        f'style="width:{em[0]};height:{em[1]};vertical-align:{em[2]}"><path d="{"".join(pieces)}"/></svg>'
    )


def mathtext(latex: str, *, display: bool = False) -> str:
    """`latex` in the dialect of mathtext, with parentheses as tall as the fractions in them."""
    for ours, theirs in _SPELLINGS:
        latex = latex.replace(ours, theirs)
    # A named function after a factor needs the space that LaTeX gives it by itself.
    latex = re.sub(r"(?<=[\w})|]) (?=\\operatorname)", r"\\,", latex)
    latex = _tall_parentheses(latex)
    return _display_fractions(latex) if display else latex


def _tall_parentheses(latex: str) -> str:
    pieces = list(latex)
    opened = []
    for index, letter in enumerate(latex):
        if letter == "(":
            opened.append(index)
        elif letter == ")" and opened:
            start = opened.pop()
            if "\\frac" in latex[start:index] and not latex[:start].endswith("\\left"):
                pieces[start], pieces[index] = "\\left(", "\\right)"
    return "".join(pieces)


def _display_fractions(latex: str) -> str:
    """Fractions that stand in no other group, at full size."""
    head, *rest = latex.split("\\frac")
    depth, text = 0, head
    for before, piece in zip([head, *rest], rest, strict=False):
        depth += before.count("{") - before.count("}")
        text += ("\\frac" if depth else "\\dfrac") + piece
    return text
