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
# By matplotlib's code of a segment: its letter in SVG and how many points it takes.
_SEGMENTS = {1: ("M", 1), 2: ("L", 1), 3: ("Q", 2), 4: ("C", 3), 79: ("Z", 0)}


@lru_cache(1024)
def formula_svg(latex: str, text: str, *, display: bool = False, widest: float | None = None) -> str | None:
    """An inline SVG of a formula, sized in em, on the baseline of the text around it.

    Args:
        latex: math without dollar signs.
        text: what screen readers say.
        display: full-size fractions, for a formula that stands alone.
        widest: the most it may measure, in em.

    Returns:
        The SVG element; None if it is wider, or if mathtext cannot set it (an operator of a plug-in may use any macro).
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(math_fontfamily="cm")
    try:
        vertices, codes = text_to_path.get_text_path(font, f"${mathtext(latex, display=display)}$", ismath=True)
    except ValueError:
        return None
    points = [(float(x), float(y)) for x, y in vertices]
    letters = [int(code) for code in codes]
    outline: list[str] = []
    drawn: list[tuple[float, float]] = []
    index = 0
    while index < len(letters):
        letter, length = _SEGMENTS[letters[index]]
        segment = points[index : index + length]
        # SVG counts downwards.
        outline.append(letter + " ".join(f"{x:.4g} {-y:.4g}" for x, y in segment))
        drawn += segment
        # The end of an outline comes with a point that means nothing.
        index += max(length, 1)
    left, right = min(x for x, _ in drawn) - 2, max(x for x, _ in drawn) + 2
    if widest is not None and right - left > widest * _FONT_UNITS:
        return None
    bottom, top = min(y for _, y in drawn) - 2, max(y for _, y in drawn) + 2
    view = f"{left:.1f} {-top:.1f} {right - left:.1f} {top - bottom:.1f}"
    em = [f"{value / _FONT_UNITS:.3f}em" for value in (right - left, top - bottom, bottom)]
    return (
        f'<svg class="formula" role="img" aria-label="{escape(text)}" viewBox="{view}" '
        f'style="width:{em[0]};height:{em[1]};vertical-align:{em[2]}"><path d="{"".join(outline)}"/></svg>'
    )


def formula_picture(latex: str, text: str) -> str | None:
    """A formula as an SVG file of its own, dark on white; None if mathtext cannot set it."""
    svg = formula_svg(latex, text, display=True)
    if svg is None:
        return None
    # As a picture it has a size in pixels, or a page would stretch it.
    width, height = (24 * float(size) for size in re.findall(r"(?:width|height):([\d.]+)em", svg))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
    return re.sub(r'style="[^"]*"', 'style="background:#fff"', svg.replace("<svg ", head, 1), count=1)


def mathtext(latex: str, *, display: bool = False) -> str:
    """`latex` in the dialect of mathtext, with parentheses as tall as the fractions in them."""
    for ours, theirs in _SPELLINGS:
        latex = latex.replace(ours, theirs)
    # A named function after a factor needs the space that LaTeX gives it by itself.
    latex = re.sub(r"(?<=[\w})|])(?<!\\cdot) (?=\\(?:operatorname|min|max|log|exp|tanh)\b)", r"\\,", latex)
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
