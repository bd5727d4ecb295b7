"""The normal form of an expression: the same value in real arithmetic, written in one of fewer ways.

Works bottom-up: each rule gets arguments that are normal already. Every rule is exact in real arithmetic under the
guards of the operators, as long as no intermediate value reaches the bound of 1e30; what would need more than that
(the log of a product, a quotient of quotients as one divisor) is left alone. Source: symbolic pruning metrics,
section 3.3.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from evoprune.metrics.analysis import bounds, varies
from evoprune.metrics.expression import CONSTANT, Expression, call, constant
from evoprune.metrics.products import (
    CACHE,
    ZERO,
    Product,
    build,
    factorise,
    magnitude,
    multiply,
    opaque,
    order,
    printable,
    raised,
    scaled,
    snap,
    split,
    unsigned,
)
from evoprune.metrics.sums import add_up, lattice, without_terms

_PRODUCTS = frozenset({"mul", "div", "neg", "abs", "sqr", "sqrt", "powc"})
_NORMALISERS = frozenset({"mms_t", "mms_r", "zsn_t", "zsn_r"})
_REDUCTIONS = frozenset(
    {"rsum", "rmean", "rmax", "rl2", "csum", "cmean", "cmax", "cl2", "tmean", "tstd", "tmin", "tmax", "tl2"}
)

# Functions of the magnitude alone, beside the powers that products cover.
EVEN = frozenset({"log", "log1p", "rl2", "cl2", "tl2"})


@lru_cache(CACHE)
def normal(expression: Expression) -> Expression:
    """The normal form of `expression`."""
    if expression.head == CONSTANT:
        assert expression.value is not None
        return constant(snap(expression.value))
    if not expression.args:
        return expression
    head = expression.head
    node = Expression(head, tuple(normal(arg) for arg in expression.args), expression.value)
    kind = node.operator.kind
    if node.sign == frozenset({0}):
        return ZERO
    if kind in ("elementwise", "power") and all(arg.head == CONSTANT for arg in node.args):
        return _folded(node)
    if head in ("add", "sub"):
        total = add_up([(1.0, node.args[0]), (1.0 if head == "add" else -1.0, node.args[1])])
        return node if total is None else total
    if head in ("min", "max"):
        return lattice(head, node.args)
    if head in _PRODUCTS:
        if node.value is not None and node.value < 0:
            node = call(head, unsigned(node.args[0]), exponent=node.value)
        return build(factorise(node))
    if head in _NORMALISERS:
        return _normaliser(head, node.args[0])
    if head in _REDUCTIONS:
        return _reduction(head, node.args[0])
    return _function(node)


def _folded(node: Expression) -> Expression:
    """The value of an operator on constants, by its own function; `node` itself where that cannot be written."""
    tensors = [torch.full((1, 1), arg.value) for arg in node.args if arg.value is not None]
    value = float(node.operator.function(*tensors, *([] if node.value is None else [node.value])))
    # The digits that float32 holds.
    return constant(float(f"{value:.8g}")) if printable(value) else node


def _function(node: Expression) -> Expression:
    """log, log1p, exp, tanh, and any function of another package."""
    head, args = node.head, node.args
    if head in EVEN:
        args = (unsigned(args[0]),)
    elif node.operator.commutative:
        args = tuple(sorted(args, key=order))
    inner = args[0]
    if head == "tanh" and factorise(inner).coefficient < 0:
        return scaled(-1.0, call(head, scaled(-1.0, inner)))
    if head == "log" and inner.head == "exp" and _within(inner.args[0], -69.0, 69.0):
        return inner.args[0]
    if head == "exp" and inner.head == "log" and _within(magnitude(inner.args[0]), 1.1e-30, 9e29):
        return magnitude(inner.args[0])
    return Expression(head, args, node.value)


def _within(expression: Expression, low: float, high: float) -> bool:
    least, most = bounds(expression)
    return least >= low and most <= high


def _reduction(head: str, arg: Expression) -> Expression:
    """A reduction, without the factors that are constant along it."""
    over, what = head[0], head[1:]

    def fixed(expression: Expression) -> bool:
        row, column = varies(expression)
        return not (row and over != "r") and not (column and over != "c")

    if fixed(arg):
        if what in ("mean", "max", "min"):
            return arg
        return ZERO if what == "std" else call(head, arg)
    linear, even = what in ("sum", "mean"), what in ("l2", "std")
    if what == "l2":
        arg = unsigned(arg)
    outside, rest = split(factorise(arg), lambda base, signed: fixed(base) and (linear or even or not signed))
    size = abs(rest.coefficient)
    sign = 1.0 if even or rest.coefficient > 0 else -1.0
    taken: Product | None = Product(size * sign if linear else size, outside.factors)
    if even:
        taken = raised(Product(size, outside.factors), 1.0)
    inner = build(Product(1.0 if linear else sign, rest.factors))
    if what in ("mean", "max"):
        # The mean of means is the mean, and what varies along one side only needs no more than the whole matrix's.
        if over == "t" and inner.head in ("r" + what, "c" + what):
            inner = inner.args[0]
        elif over != "t" and varies(inner) == (over == "c", over == "r"):
            head = "t" + what
    whole = None if taken is None else multiply(taken, opaque(call(head, inner)))
    return call(head, arg) if whole is None else build(whole)


def _normaliser(head: str, arg: Expression) -> Expression:
    """A normaliser, without what it undoes: other normalisers, positive factors and addends constant in its scope."""
    row_only = head.endswith("_r")

    def fixed(expression: Expression) -> bool:
        row, column = varies(expression)
        return not column and (row_only or not row)

    if fixed(arg):
        return ZERO
    undone = _NORMALISERS if row_only else frozenset({"mms_t", "zsn_t"})
    flipped = 1.0
    inner = arg
    while True:
        before = inner
        if inner.head in undone:
            inner = inner.args[0]
        _, rest = split(factorise(inner), lambda base, _: fixed(base) and base.positive)
        sign = 1.0 if rest.coefficient > 0 else -1.0
        if sign < 0 and head.startswith("zsn"):
            flipped, sign = -flipped, 1.0
        inner = without_terms(build(Product(sign, rest.factors)), fixed)
        if inner == before:
            break
    if row_only and not varies(inner)[0]:
        head = head.removesuffix("r") + "t"
    return scaled(flipped, call(head, inner))
