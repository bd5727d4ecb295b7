"""Expressions as DEAP trees and back. DEAP varies them; it never compiles or evaluates them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from deap import gp

from evoprune.metrics.expression import CONSTANT, Expression, call, constant, terminal
from evoprune.metrics.operators import OPERATORS
from evoprune.metrics.site_terminals import ALL_TERMINALS
from evoprune.metrics.types import Type


class Mat:
    """A value for every weight, as DEAP's type."""


class InVec(Mat):
    """A value for every column."""


class OutVec(Mat):
    """A value for every row."""


class Scal(InVec, OutVec):
    """One value."""


class Exponent:
    """The number in a powc."""


DEAP_TYPES = {Type.MAT: Mat, Type.INVEC: InVec, Type.OUTVEC: OutVec, Type.SCAL: Scal}
LANGUAGE_TYPES = {deap_type: type_ for type_, deap_type in DEAP_TYPES.items()}

EXPONENTS = tuple(sign * value for value in (0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1.0, 1.5, 2.0, 3.0) for sign in (1, -1))

# DEAP wants a terminal of every type; this constant is the one that does not need a statistic.
_ONE = "one"


@lru_cache(maxsize=8)
def primitive_set(terminals: frozenset[str], operators: frozenset[str] | None = None) -> gp.PrimitiveSetTyped:
    """DEAP's view of the language, restricted to some terminals and some operators (None: all of them).

    An operator on any type stands there once per type, so that its result fits wherever its arguments do.
    """
    pset = gp.PrimitiveSetTyped("metric", [], Mat)
    for name in OPERATORS:
        if operators is not None and name not in operators:
            continue
        operator = OPERATORS[name]
        if operator.kind in ("elementwise", "power"):
            for type_ in DEAP_TYPES.values():
                extra = [Exponent] if operator.kind == "power" else []
                pset.addPrimitive(_uncallable, [type_] * operator.arity + extra, type_, name=f"{name}:{type_.__name__}")
        else:
            result = {"normaliser": Mat, "reduce_row": OutVec, "reduce_column": InVec, "reduce_all": Scal}[
                operator.kind
            ]
            pset.addPrimitive(_uncallable, [Mat] * operator.arity, result, name=f"{name}:{result.__name__}")
    for name in sorted(terminals):
        pset.addTerminal(_uncallable, DEAP_TYPES[ALL_TERMINALS[name].type], name=name)
    for exponent in EXPONENTS:
        pset.addTerminal(exponent, Exponent)
    pset.addTerminal(_uncallable, Scal, name=_ONE)
    return pset


def _uncallable(*arguments: object) -> object:
    raise TypeError("trees are interpreted by evoprune, not called")


def to_tree(expression: Expression, pset: gp.PrimitiveSetTyped) -> gp.PrimitiveTree:
    """The DEAP tree of an expression whose terminals `pset` holds."""
    return gp.PrimitiveTree(list(_prefix(expression, pset)))


def _prefix(expression: Expression, pset: gp.PrimitiveSetTyped) -> Iterator[gp.Primitive | gp.Terminal]:
    if expression.head == CONSTANT:
        yield gp.Terminal(expression.value, False, Scal)
    elif not expression.args:
        yield pset.mapping[expression.head]
    else:
        yield pset.mapping[f"{expression.head}:{DEAP_TYPES[expression.type].__name__}"]
        for arg in expression.args:
            yield from _prefix(arg, pset)
        if expression.value is not None:
            yield gp.Terminal(expression.value, False, Exponent)


def to_expression(tree: gp.PrimitiveTree) -> Expression:
    """The expression of a DEAP tree. Types are inferred anew, to the least that fit."""
    expression, rest = _read(tree, 0)
    assert rest == len(tree)
    return expression


def _read(tree: gp.PrimitiveTree, at: int) -> tuple[Expression, int]:
    node = tree[at]
    at += 1
    if isinstance(node, gp.Terminal):
        if node.name in ALL_TERMINALS:
            return terminal(node.name, ALL_TERMINALS), at
        return constant(1.0 if node.name == _ONE else node.value), at
    name = node.name.partition(":")[0]
    args = []
    for _ in range(OPERATORS[name].arity):
        arg, at = _read(tree, at)
        args.append(arg)
    if OPERATORS[name].kind != "power":
        return call(name, *args), at
    return call(name, *args, exponent=float(tree[at].value)), at + 1


@contextmanager
def seeded_deap(rng: random.Random) -> Iterator[None]:
    """DEAP draws from the global generator: seed it from `rng` inside the block and put it back after."""
    before = random.getstate()
    random.seed(rng.getrandbits(64))
    try:
        yield
    finally:
        random.setstate(before)


def fits(child: type, slot: type) -> bool:
    """Whether a value of DEAP type `child` may stand in `slot`."""
    return issubclass(child, slot)
