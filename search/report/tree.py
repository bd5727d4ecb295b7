"""An expression as a tree: boxes and lines in an SVG of our own, parents centred above their arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from evoprune.metrics.expression import CONSTANT, Expression
from evoprune.metrics.terminals import TERMINALS
from evoprune.search.report.numbers import compact

LETTER = 7.8  # of a monospaced font of 13 px, with some air
PADDING = 11.0
HEIGHT = 28.0
GAP = 14.0
ROW = 58.0
MARGIN = 4.0

_SYMBOLS = {
    "add": "+",
    "sub": "−",
    "mul": "×",
    "div": "÷",
    "abs": "| · |",
    "neg": "−( · )",
    "sqr": "( · )²",
    "sqrt": "√",
}


@dataclass
class _Box:
    """A node with its place; `left` and `span` are those of the whole subtree."""

    label: str
    kind: str
    hint: str
    children: list[_Box] = field(default_factory=list)
    left: float = 0.0
    span: float = 0.0
    centre: float = 0.0
    top: float = MARGIN

    @property
    def width(self) -> float:
        return max(len(self.label) * LETTER + 2 * PADDING, 38.0)


def tree_svg(expression: Expression) -> str:
    """An inline SVG; the colours come from the page's classes ``node-operator``, ``node-forward`` and so on."""
    root = _box(expression)
    _measure(root)
    _place(root, MARGIN, MARGIN)
    boxes = _all(root)
    width = root.span + 2 * MARGIN
    height = max(box.top for box in boxes) + HEIGHT + MARGIN
    lines = [
        f'<path class="edge" d="M{box.centre:.1f} {box.top + HEIGHT:.1f}C{box.centre:.1f} {box.top + 46:.1f} '
        f'{child.centre:.1f} {child.top - 18:.1f} {child.centre:.1f} {child.top:.1f}"/>'
        for box in boxes
        for child in box.children
    ]
    return (
        f'<svg class="tree" role="img" aria-label="tree of {escape(expression.text)}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">{"".join([*lines, *map(_drawn, boxes)])}</svg>'
    )


def kind_of(node: Expression) -> str:
    """What colours a node: operator, constant, or the pass over data that a terminal needs (``weights`` for none)."""
    if node.args:
        return "operator"
    if node.head == CONSTANT:
        return "constant"
    cost = TERMINALS[node.head].cost
    return {"none": "weights", "local": "second-order", "hessian": "second-order"}.get(cost, cost)


def _box(node: Expression) -> _Box:
    if node.head == CONSTANT:
        assert node.value is not None
        label, hint = compact(node.value), f"constant {node.value:g}"
    elif not node.args:
        label, hint = node.head, TERMINALS[node.head].meaning
    elif node.value is not None:
        label, hint = f"( · )^{compact(node.value)}", f"{node.head} {node.value:g}"
    else:
        label, hint = _SYMBOLS.get(node.head, node.head), node.head
    return _Box(label, kind_of(node), hint, [_box(arg) for arg in node.args])


def _measure(box: _Box) -> float:
    """Set the width of every subtree, from the leaves up."""
    below = sum(_measure(child) for child in box.children) + GAP * max(len(box.children) - 1, 0)
    box.span = max(box.width, below)
    return box.span


def _place(box: _Box, left: float, top: float) -> None:
    """Set the place of every node, from the root down."""
    box.left, box.top = left, top
    below = sum(child.span for child in box.children) + GAP * max(len(box.children) - 1, 0)
    cursor = left + (box.span - below) / 2
    for child in box.children:
        _place(child, cursor, top + ROW)
        cursor += child.span + GAP
    if box.children:
        middle = (box.children[0].centre + box.children[-1].centre) / 2
        # A wide label over a lopsided subtree must not leave the subtree's own strip.
        box.centre = min(max(middle, left + box.width / 2), left + box.span - box.width / 2)
    else:
        box.centre = left + box.span / 2


def _all(box: _Box) -> list[_Box]:
    return [box, *(below for child in box.children for below in _all(child))]


def _drawn(box: _Box) -> str:
    left = box.centre - box.width / 2
    return (
        f'<g class="node node-{box.kind}"><title>{escape(box.hint)}</title>'
        f'<rect x="{left:.1f}" y="{box.top:.1f}" width="{box.width:.1f}" height="{HEIGHT:.0f}" rx="{HEIGHT / 2:.0f}"/>'
        f'<text x="{box.centre:.1f}" y="{box.top + HEIGHT / 2 + 4.5:.1f}">{escape(box.label)}</text></g>'
    )
