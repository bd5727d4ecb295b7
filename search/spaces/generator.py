"""Random expressions, top-down from a type and a number of nodes. Source: symbolic pruning metrics, section 2.5."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from evoprune.metrics.expression import Expression, call, constant, terminal
from evoprune.metrics.operators import OPERATORS
from evoprune.metrics.terminals import TERMINALS
from evoprune.metrics.types import Type
from evoprune.search.spaces.trees import EXPONENTS

_BINARY = {"mul": 0.45, "add": 0.20, "div": 0.20, "sub": 0.05, "min": 0.05, "max": 0.05}
_UNARY = {
    "abs": 0.15,
    "sqrt": 0.15,
    "sqr": 0.15,
    "powc": 0.35,
    "log": 0.08,
    "log1p": 0.05,
    "tanh": 0.04,
    "exp": 0.02,
    "neg": 0.01,
}
_NODE = {"binary": 0.40, "unary": 0.25, "leaf": 0.25, "normaliser": 0.05, "vector": 0.05}
# Squares of other terminals add nothing that an exponent does not.
_REDUNDANT = {"X_ss": "X_l2", "Y_ss": "Y_l2"}
_FAMILIES = {"W": 0.40, "X": 0.30, "G": 0.20, "Y": 0.035, "H": 0.035, "scalar": 0.03}


def pick(weights: Mapping[str, float], rng: random.Random) -> str:
    """A key, with probability proportional to its weight."""
    return rng.choices(list(weights), list(weights.values()))[0]


def _family(name: str) -> str:
    return name[0] if name[0] in "WXGYH" else "scalar"


class Generator:
    """Draws expressions over some terminals.

    Args:
        terminals: names that may occur.
        height: largest height of what is drawn.
    """

    def __init__(self, terminals: Collection[str], height: int = 6) -> None:
        self.height = height
        self._leaves = {type_: self._leaf_weights(terminals, type_) for type_ in Type}
        self._normalisers = [name for name in OPERATORS if OPERATORS[name].kind == "normaliser"]
        self._reductions: dict[Type, Sequence[str]] = {
            type_: [name for name in OPERATORS if OPERATORS[name].kind == kind]
            for type_, kind in (
                (Type.INVEC, "reduce_column"),
                (Type.OUTVEC, "reduce_row"),
                (Type.SCAL, "reduce_all"),
            )
        }

    def draw(self, rng: random.Random, type_: Type = Type.MAT, nodes: int | None = None) -> Expression:
        """An expression that fits a slot of `type_`, of about `nodes` nodes (3 to 15 by default), grown or full."""
        budget = rng.randint(3, 15) if nodes is None else nodes
        return self._node(type_, budget, self.height, rng, full=rng.random() < 0.5)

    def leaf(self, type_: Type, rng: random.Random) -> Expression:
        """A terminal that fits a slot of `type_`, a constant where there is none."""
        weights = self._leaves[type_]
        if not weights:
            return constant(_log_uniform(rng))
        name = pick(weights, rng)
        if name == "W" and rng.random() < 0.9:
            return call("abs", terminal("W"))
        return terminal(name)

    def _leaf_weights(self, terminals: Collection[str], type_: Type) -> dict[str, float]:
        fitting = [
            name
            for name in sorted(terminals)
            if TERMINALS[name].type.fits(type_) and _REDUNDANT.get(name) not in terminals
        ]
        weights = {}
        for name in fitting:
            siblings = [other for other in fitting if _family(other) == _family(name)]
            share = 1 / len(siblings)
            if _family(name) == "X" and "X_l2" in siblings and len(siblings) > 1:
                share = 0.5 if name == "X_l2" else 0.5 / (len(siblings) - 1)
            weights[name] = _FAMILIES[_family(name)] * share
        return weights

    def _node(self, type_: Type, budget: int, height: int, rng: random.Random, full: bool) -> Expression:
        if budget <= 1 or height == 0:
            return self.leaf(type_, rng)
        kinds = dict(_NODE)
        if full:
            del kinds["leaf"]
        if type_ is not Type.MAT:
            del kinds["normaliser"]
        if type_ is Type.MAT and rng.random() < kinds["vector"]:
            type_ = rng.choice([Type.INVEC, Type.INVEC, Type.OUTVEC, Type.SCAL])
        kind = pick(kinds, rng)
        below = height - 1
        if kind == "leaf" or (budget == 2 and kind == "binary"):
            return self.leaf(type_, rng)
        if kind == "binary":
            left = rng.randint(1, budget - 2)
            return call(
                pick(_BINARY, rng),
                self._node(type_, left, below, rng, full),
                self._node(type_, budget - 1 - left, below, rng, full),
            )
        if kind == "normaliser":
            return call(rng.choice(self._normalisers), self._node(Type.MAT, budget - 1, below, rng, full))
        if kind == "vector" and type_ is not Type.MAT:
            return call(rng.choice(self._reductions[type_]), self._node(Type.MAT, budget - 1, below, rng, full))
        name = pick(_UNARY, rng)
        if name == "powc":
            return call(name, self._node(type_, max(budget - 2, 1), below, rng, full), exponent=rng.choice(EXPONENTS))
        return call(name, self._node(type_, budget - 1, below, rng, full))


def _log_uniform(rng: random.Random) -> float:
    """A constant between 1e-3 and 1e3 in magnitude, of either sign."""
    return rng.choice((1, -1)) * 10 ** rng.uniform(-3, 3)
