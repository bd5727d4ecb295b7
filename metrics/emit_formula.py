"""Expressions as formulas for people: LaTeX and plain text, with parentheses only where they are needed.

Formulas show what is computed in real arithmetic: guards against overflow and division by zero are left out, and
numbers are rounded to six digits. The exact form is `Expression.text`.
"""

from __future__ import annotations

from enum import IntEnum
from fractions import Fraction
from functools import reduce
from itertools import pairwise

from evoprune.metrics.expression import CONSTANT, Expression
from evoprune.metrics.site_terminals import ALL_TERMINALS


class Level(IntEnum):
    """How tightly a formula holds together; a place that needs more puts it in parentheses."""

    SUM = 0
    PRODUCT = 1
    PREFIX = 2  # a function without parentheses around its argument
    FACTOR = 3  # may stand in a product
    ATOM = 4  # may carry a power


Formula = tuple[str, Level]

# Operators that work on the magnitude of their argument.
_OF_MAGNITUDE = ("sqrt", "powc", "log", "log1p")

_LATEX_TERMINAL_LEVELS = {
    "X_ss": Level.FACTOR,
    "Y_ss": Level.FACTOR,
    "Hchol2": Level.FACTOR,
    "X_var": Level.PREFIX,
    "n_in": Level.PREFIX,
    "n_out": Level.PREFIX,
    "fan_in": Level.PREFIX,
    "fan_out": Level.PREFIX,
}
_TEXT_TERMINALS: dict[str, Formula] = {
    "X_ss": ("‖X‖₂²", Level.FACTOR),
    "X_l2": ("‖X‖₂", Level.ATOM),
    "X_l1": ("mean|X|", Level.FACTOR),
    "X_mean": ("mean(X)", Level.FACTOR),
    "X_var": ("var(X)", Level.FACTOR),
    "X_max": ("max|X|", Level.FACTOR),
    "X_gate_l2": ("‖gX‖₂", Level.ATOM),
    "X_v": ("‖X_v‖₂", Level.ATOM),
    "X_l": ("‖X_l‖₂", Level.ATOM),
    "Y_ss": ("‖Y‖₂²", Level.FACTOR),
    "Y_l2": ("‖Y‖₂", Level.ATOM),
    "G_l2": ("‖G‖₂", Level.ATOM),
    "G_l1": ("‖G‖₁", Level.ATOM),
    "G_mean": ("mean(G)", Level.FACTOR),
    "G_reg": ("‖G_b‖₂", Level.ATOM),
    "Hinv": ("H⁻¹ⱼⱼ", Level.FACTOR),
    "Hchol2": ("U²ⱼⱼ", Level.FACTOR),
}


def latex(expression: Expression) -> str:
    """The formula in LaTeX math; needs amsmath for ``\\lVert`` and ``\\operatorname``."""
    return _Latex().formula(expression)[0]


def to_text(expression: Expression) -> str:
    """The formula in one line of Unicode, such as ``|W|·‖X‖₂^0.75``."""
    return _Text().formula(expression)[0]


def without_scale(expression: Expression) -> Expression:
    """The same product without its positive constant factors: ``mms_t(x)`` becomes ``x - min x``.

    Dividing all scores of a matrix by one positive number keeps every mask that compares within a row or the matrix.
    """
    factors = [factor for factor in _chain(expression, "mul") if not (factor.head == CONSTANT and factor.positive)]
    if not factors:
        return expression
    return reduce(lambda product, factor: Expression("mul", (product, factor)), map(_unscaled, factors))


def _unscaled(factor: Expression) -> Expression:
    if factor.head != "mms_t":
        return factor
    return Expression("sub", (factor.args[0], Expression("tmin", factor.args)))


def _chain(node: Expression, head: str) -> list[Expression]:
    """The operands of nested `head` nodes, left to right."""
    return [leaf for arg in node.args for leaf in _chain(arg, head)] if node.head == head else [node]


def _short(value: float) -> str:
    return f"{value:.6g}".replace("e-0", "e-").replace("e+0", "e+")


def _exponent(value: float) -> str:
    """A short decimal if it is one, else a small fraction if it is one, else rounded."""
    fraction = Fraction(value).limit_denominator(12)
    if float(_short(value)) != value and float(fraction) == value:
        return str(fraction)
    return _short(value)


class _Latex:
    """LaTeX; the text form below changes what differs."""

    def formula(self, node: Expression) -> Formula:
        """How `node` reads, and how tightly it holds together."""
        if node.head == CONSTANT:
            assert node.value is not None
            return self.number(node.value)
        if not node.args:
            return self.terminal(node.head)
        if node.head in ("add", "sub"):
            terms = _chain(node, "add") if node.head == "add" else list(node.args)
            first, *rest = terms
            sign = " + " if node.head == "add" else " - "
            return sign.join([self.at(first, Level.SUM), *(self.at(term, Level.PRODUCT) for term in rest)]), Level.SUM
        if node.head == "mul":
            # Numbers stand first, as people write them.
            factors = sorted(_chain(node, "mul"), key=lambda factor: factor.head != CONSTANT)
            return self.product([self.at(factor, Level.FACTOR) for factor in factors]), Level.PRODUCT
        if node.head == "neg":
            return f"-{self.at(node.args[0], Level.PRODUCT)}", Level.SUM
        if node.head == "div":
            return self.quotient(*node.args)
        if node.head == "abs":
            return self.magnitude(self.formula(node.args[0])[0])
        if node.head in _OF_MAGNITUDE and not node.args[0].nonnegative:
            return self.call(node, [self.magnitude(self.formula(node.args[0])[0])])
        return self.call(node, [self.formula(arg) for arg in node.args])

    def at(self, node: Expression, level: Level) -> str:
        """`node` for a place that needs at least `level`."""
        return self.raised(self.formula(node), level)

    def raised(self, formula: Formula, level: Level) -> str:
        """`formula`, in parentheses if it holds together less than `level`."""
        return formula[0] if formula[1] >= level else self.parentheses(formula[0])

    def number(self, value: float) -> Formula:
        digits, _, power = _short(value).partition("e")
        if power:
            scale = f"10^{{{int(power)}}}"
            if digits == "1":
                return scale, Level.FACTOR
            return f"{digits} \\cdot {scale}", Level.PRODUCT if value > 0 else Level.SUM
        return digits, Level.ATOM if value >= 0 else Level.SUM

    def terminal(self, name: str) -> Formula:
        return ALL_TERMINALS[name].latex, _LATEX_TERMINAL_LEVELS.get(name, Level.ATOM)

    def parentheses(self, text: str) -> str:
        return f"\\left({text}\\right)" if "\\frac" in text else f"({text})"

    def product(self, factors: list[str]) -> str:
        text = factors[0]
        for left, right in pairwise(factors):
            text += (" \\cdot " if _needs_dot(left, right) else " ") + right
        return text

    def quotient(self, above: Expression, below: Expression) -> Formula:
        return f"\\frac{{{self.formula(above)[0]}}}{{{self.formula(below)[0]}}}", Level.FACTOR

    def magnitude(self, text: str) -> Formula:
        # Bars inside bars need to say which belong together.
        nested = any(mark in text for mark in ("|", "\\lVert", "\\lvert", "\\frac"))
        return (f"\\left\\lvert {text} \\right\\rvert" if nested else f"|{text}|"), Level.ATOM

    def call(self, node: Expression, args: list[Formula]) -> Formula:
        if node.head in ("sqr", "powc"):
            exponent = "2" if node.value is None else _exponent(node.value)
            return f"{self.raised(args[0], Level.ATOM)}^{{{exponent}}}", Level.FACTOR
        if node.head == "log":
            return f"\\log {self.raised(args[0], Level.FACTOR)}", Level.PREFIX
        # Every other operator's own form delimits its arguments.
        return node.operator.latex(*(text for text, _ in args)), Level.ATOM if node.head == "sqrt" else Level.FACTOR


def _needs_dot(left: str, right: str) -> bool:
    """Whether two LaTeX factors would run into each other: digits after digits, bars after bars."""
    bars = ("|", "\\lVert", "\\left\\lvert")
    return right[0].isdigit() or (left.startswith(bars) and right.startswith(bars))


class _Text(_Latex):
    """Plain text."""

    def number(self, value: float) -> Formula:
        return _short(value), Level.ATOM if value >= 0 else Level.SUM

    def terminal(self, name: str) -> Formula:
        return _TEXT_TERMINALS.get(name, (name, Level.ATOM))

    def parentheses(self, text: str) -> str:
        return f"({text})"

    def product(self, factors: list[str]) -> str:
        return "·".join(factors)

    def quotient(self, above: Expression, below: Expression) -> Formula:
        return f"{self.at(above, Level.PRODUCT)} / {self.at(below, Level.FACTOR)}", Level.PRODUCT

    def magnitude(self, text: str) -> Formula:
        return (f"abs({text})", Level.FACTOR) if set(text) & set("|‖") else (f"|{text}|", Level.ATOM)

    def call(self, node: Expression, args: list[Formula]) -> Formula:
        if node.head == "sqr":
            return f"{self.raised(args[0], Level.ATOM)}²", Level.FACTOR
        if node.head == "powc":
            assert node.value is not None
            exponent = _exponent(node.value)
            exponent = f"({exponent})" if "/" in exponent else exponent
            return f"{self.raised(args[0], Level.ATOM)}^{exponent}", Level.FACTOR
        if node.head == "sqrt":
            return f"√{self.raised(args[0], Level.ATOM)}", Level.FACTOR
        name = {"log1p": "log", "mms_t": "minmax", "mms_r": "minmax_row", "zsn_t": "zscore", "zsn_r": "zscore_row"}.get(
            node.head, node.head
        )
        inner = ", ".join(text for text, _ in args)
        return f"{name}({'1 + ' * (node.head == 'log1p')}{inner})", Level.FACTOR
