"""Expressions of the metric language: trees, their types, and the safe readers and printers.

Text is read through Python's own parser into a syntax tree that is walked against a white list; nothing is ever
evaluated. Grammar: ``expr := NAME | NUMBER | '-' NUMBER | NAME '(' expr (',' expr)* ')'``; the second argument of
``powc`` is a number or a quotient of two numbers. Source: symbolic pruning metrics, sections 2.3 and 4.3.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evoprune.metrics.errors import InvalidExpression, UnknownName
from evoprune.metrics.operators import OPERATORS, Operator
from evoprune.metrics.site_terminals import ALL_TERMINALS
from evoprune.metrics.terminals import TERMINALS, Cost, Terminal
from evoprune.metrics.types import NONNEGATIVE, POSITIVE, ZERO, Sign, Type

CONSTANT = "const"

MAX_TEXT = 1000
MAX_HEIGHT = 32
MAX_NODES = 256
MAX_CONSTANT = 1e6

_COST_COMPLEXITY: dict[Cost, int] = {"none": 0, "forward": 1, "backward": 3, "local": 3, "hessian": 3}


@dataclass(frozen=True)
class Expression:
    """A node with all below it; equal trees are equal and hash alike.

    Attributes:
        head: a terminal's name, an operator's name, or `CONSTANT`.
        args: the operator's tensor arguments.
        value: a constant's value, or the exponent of a ``powc``.
    """

    head: str
    args: tuple[Expression, ...] = ()
    value: float | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.head, self.args, self.value))

    def __str__(self) -> str:
        return self.text

    @cached_property
    def text(self) -> str:
        """The expression as text, without spaces; `parse` reads it back to an equal tree."""
        if self.head == CONSTANT:
            return _number(self.value)
        if not self.args:
            return self.head
        parts = [arg.text for arg in self.args]
        if self.value is not None:
            parts.append(_number(self.value))
        return f"{self.head}({','.join(parts)})"

    @cached_property
    def type(self) -> Type:
        """What the value varies with."""
        if self.head == CONSTANT:
            return Type.SCAL
        if not self.args:
            return ALL_TERMINALS[self.head].type
        kind = self.operator.kind
        if kind in ("elementwise", "power"):
            joined = self.args[0].type
            for arg in self.args[1:]:
                joined = joined.join(arg.type)
            return joined
        return {
            "normaliser": Type.MAT,
            "reduce_row": Type.OUTVEC,
            "reduce_column": Type.INVEC,
            "reduce_all": Type.SCAL,
        }[kind]

    @cached_property
    def sign(self) -> Sign:
        """The signs that a value can take, in real arithmetic."""
        if self.head == CONSTANT:
            assert self.value is not None
            return ZERO if self.value == 0 else frozenset({1 if self.value > 0 else -1})
        if not self.args:
            return ALL_TERMINALS[self.head].sign
        return self.operator.sign(*(arg.sign for arg in self.args))

    @property
    def nonnegative(self) -> bool:
        """Whether no value can be below zero."""
        return self.sign <= NONNEGATIVE

    @property
    def positive(self) -> bool:
        """Whether every value is above zero."""
        return self.sign <= POSITIVE

    @property
    def operator(self) -> Operator:
        """The operator at the head of a node that has arguments."""
        return OPERATORS[self.head]

    @cached_property
    def height(self) -> int:
        """Edges from here to the deepest leaf."""
        return 1 + max(arg.height for arg in self.args) if self.args else 0

    @cached_property
    def size(self) -> int:
        """Number of nodes, exponents included."""
        return 1 + sum(arg.size for arg in self.args) + (1 if self.args and self.value is not None else 0)

    @cached_property
    def terminals(self) -> frozenset[str]:
        """Names of the terminals read."""
        if self.args:
            return frozenset().union(*(arg.terminals for arg in self.args))
        return frozenset() if self.head == CONSTANT else frozenset({self.head})

    @cached_property
    def statistics(self) -> frozenset[str]:
        """Names of the terminals that have to be collected from data."""
        return frozenset(name for name in self.terminals if ALL_TERMINALS[name].cost != "none")

    @cached_property
    def costs(self) -> frozenset[Cost]:
        """The passes over data that its statistics need."""
        return frozenset(ALL_TERMINALS[name].cost for name in self.statistics)

    @cached_property
    def complexity(self) -> int:
        """Node weights, plus a price for the dearest statistic. Source: symbolic pruning metrics, section 3.5."""
        weights = sum(node.operator.weight if node.args else 1 for node in self.walk())
        return weights + sum(_COST_COMPLEXITY[cost] for cost in self.costs)

    def walk(self) -> Iterator[Expression]:
        """Every node, parents before children, left to right."""
        yield self
        for arg in self.args:
            yield from arg.walk()

    def to_json(self) -> Any:
        """Nested lists: ``["mul", ["abs", "W"], "X_l2"]``; exponents are ``{"e": 0.5}``."""
        if self.head == CONSTANT:
            return self.value
        if not self.args:
            return self.head
        exponent = [] if self.value is None else [{"e": self.value}]
        return [self.head, *(arg.to_json() for arg in self.args), *exponent]


def terminal(name: str, terminals: Mapping[str, Terminal] = TERMINALS) -> Expression:
    """The leaf `name`, one of `terminals`.

    Raises:
        UnknownName: no such terminal.
    """
    if name not in terminals:
        raise UnknownName("terminal", name, terminals)
    return Expression(name)


def constant(value: float) -> Expression:
    """A constant.

    Raises:
        InvalidExpression: not finite, or beyond ±1e6.
    """
    return Expression(CONSTANT, (), _checked_number(value))


def call(name: str, *args: Expression, exponent: float | None = None) -> Expression:
    """An operator applied to its arguments.

    Raises:
        UnknownName: no such operator.
        InvalidExpression: wrong number of arguments, or an exponent where none belongs or is missing.
    """
    if name not in OPERATORS:
        raise UnknownName("operator", name, OPERATORS)
    operator = OPERATORS[name]
    takes = operator.arity + (operator.kind == "power")
    if len(args) != operator.arity or (operator.kind == "power") != (exponent is not None):
        given = len(args) + (exponent is not None)
        detail = " (the last one a number)" if operator.kind == "power" else ""
        raise InvalidExpression(f"{name} takes {takes} argument{'s' * (takes > 1)}{detail}, {given} given")
    return Expression(name, args, None if exponent is None else _checked_number(exponent))


def parse(text: str, terminals: Mapping[str, Terminal] = TERMINALS) -> Expression:
    """The expression that `text` spells.

    Args:
        terminals: the leaves that there are: those of metrics, or those of allocation formulas.

    Raises:
        InvalidExpression: too long, too deep, not of the grammar, or wrong arguments.
        UnknownName: a name that is no terminal and no operator.
    """
    if len(text) > MAX_TEXT:
        raise InvalidExpression(f"expression of {len(text)} characters; at most {MAX_TEXT} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
        return within_limits(_from_syntax(tree.body, terminals))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InvalidExpression(f"cannot read {text[:60]!r} as an expression; an example is mul(abs(W),X_l2)") from None


def from_json(value: Any, terminals: Mapping[str, Terminal] = TERMINALS) -> Expression:
    """The expression that nested lists spell; see `Expression.to_json` and, for `terminals`, `parse`.

    Raises:
        InvalidExpression: not of that form, too deep, too large, or wrong arguments.
        UnknownName: a name that is no terminal and no operator.
    """
    try:
        return within_limits(_from_lists(value, 0, terminals))
    except (RecursionError, ValueError):
        # Only from printing what is wrong: lists nested thousands deep, numbers of thousands of digits.
        raise InvalidExpression('not of the language: write ["mul", ["abs", "W"], "X_l2"], names and numbers') from None


def within_limits(expression: Expression) -> Expression:
    """`expression` itself.

    Raises:
        InvalidExpression: higher than `MAX_HEIGHT` or larger than `MAX_NODES`.
    """
    if expression.height > MAX_HEIGHT:
        raise InvalidExpression(f"expression nested {expression.height} deep; at most {MAX_HEIGHT} is read")
    if expression.size > MAX_NODES:
        raise InvalidExpression(f"expression of {expression.size} nodes; at most {MAX_NODES} are read")
    return expression


def _number(value: float | None) -> str:
    assert value is not None
    return repr(int(value)) if value == int(value) else repr(value)


def _checked_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidExpression(f"{str(value)[:40]!r} is no number")
    if not abs(value) <= MAX_CONSTANT:
        raise InvalidExpression(f"constant {str(value)[:40]} is not within ±{MAX_CONSTANT:g}")
    # Negative zero would print and hash differently from zero.
    return float(value) + 0.0


def _literal(node: ast.expr) -> float | None:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return sign * _checked_number(node.value)
    return None


def _exponent(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        above, below = _literal(node.left), _literal(node.right)
        if above is not None and below:
            return _checked_number(above / below)
    value = _literal(node)
    if value is None:
        raise InvalidExpression("the second argument of powc is a number or a quotient of two numbers, such as 1/2")
    return value


def _from_syntax(node: ast.expr, terminals: Mapping[str, Terminal]) -> Expression:
    value = _literal(node)
    if value is not None:
        return constant(value)
    if isinstance(node, ast.Name):
        return terminal(node.id, terminals)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        name = node.func.id
        if name in OPERATORS and OPERATORS[name].kind == "power" and len(node.args) == 2:
            return call(name, _from_syntax(node.args[0], terminals), exponent=_exponent(node.args[1]))
        return call(name, *(_from_syntax(arg, terminals) for arg in node.args))
    raise InvalidExpression(
        f"{ast.unparse(node)[:40]!r} is not of the language: only names, numbers and calls such as mul(abs(W),X_l2)"
    )


def _from_lists(value: Any, depth: int, terminals: Mapping[str, Terminal]) -> Expression:
    if depth > MAX_HEIGHT:
        raise InvalidExpression(f"expression nested deeper than {MAX_HEIGHT}")
    if isinstance(value, str):
        return terminal(value, terminals)
    if isinstance(value, (int, float)):
        return constant(value)
    if isinstance(value, list) and value and isinstance(value[0], str) and len(value) <= 4:
        name, *rest = value
        exponent = None
        if rest and isinstance(rest[-1], dict):
            exponent = rest.pop()
            if list(exponent) != ["e"]:
                raise InvalidExpression('an exponent is written {"e": number}')
        args = [_from_lists(arg, depth + 1, terminals) for arg in rest]
        return call(name, *args, exponent=None if exponent is None else exponent["e"])
    raise InvalidExpression(
        f'{str(value)[:40]!r} is not of the language: write ["mul", ["abs", "W"], "X_l2"], names and numbers'
    )


__all__ = [
    "CONSTANT",
    "Expression",
    "call",
    "constant",
    "from_json",
    "parse",
    "terminal",
    "within_limits",
]
