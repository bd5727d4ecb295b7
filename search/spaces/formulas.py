"""The space of allocation formulas: an expression over statistics of matrices, and a spread; varied through DEAP."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection

from evoprune.metrics.allocation_formula import AllocationFormula
from evoprune.metrics.errors import InvalidExpression
from evoprune.metrics.expression import CONSTANT, Expression, call, constant, terminal, within_limits
from evoprune.metrics.filters import DEFAULT_LIMITS
from evoprune.metrics.formula_operators import FUNCTIONS
from evoprune.metrics.normal_form import normal
from evoprune.metrics.operators import OPERATORS
from evoprune.metrics.site_terminals import SITE_TERMINALS
from evoprune.metrics.types import Type
from evoprune.search.spaces import SPACES
from evoprune.search.spaces.generator import pick
from evoprune.search.spaces.trees import primitive_set
from evoprune.search.spaces.variation import (
    delete_node,
    insert_node,
    move_number,
    replace_node,
    replace_subtree,
    rotate,
    swap_subtree,
)

LEAST_SPREAD, MOST_SPREAD = 0.01, 0.6
_HEIGHT = 4
_BLENDS = 0.4

_NODE = {"binary": 0.45, "unary": 0.2, "normaliser": 0.1, "leaf": 0.25}
_BINARY = {"add": 0.4, "sub": 0.15, "mul": 0.25, "div": 0.1, "min": 0.05, "max": 0.05}
_UNARY = {"neg": 0.2, "log": 0.2, "sqrt": 0.2, "sqr": 0.15, "exp": 0.05, "tanh": 0.1, "abs": 0.1}
_NORMALISERS = ("zsn_t", "mms_t")
_CONSTANTS = 0.1


class FormulaSpace:
    """Allocation formulas over some terminals.

    Args:
        terminals: names of `SITE_TERMINALS` that may occur; at least one.
    """

    def __init__(self, terminals: Collection[str]) -> None:
        self.terminals = tuple(name for name in SITE_TERMINALS if name in terminals)
        self._pset = primitive_set(frozenset(self.terminals), frozenset(FUNCTIONS))
        self._mutations: dict[str, tuple[float, Callable[[Expression, random.Random], Expression]]] = {
            "number": (0.2, lambda genome, rng: move_number(genome, rng) or self._extended(genome, rng)),
            "extend": (0.25, self._extended),
            "subtree": (0.15, self._new_subtree),
            "node": (0.15, lambda genome, rng: replace_node(genome, self._pset, rng)),
            "insert": (0.05, lambda genome, rng: insert_node(genome, self._pset, rng)),
            "delete": (0.15, lambda genome, rng: delete_node(genome, self._pset, rng)),
            "rotate": (0.05, lambda genome, rng: rotate(genome, rng) or self._extended(genome, rng)),
        }

    def sample(self, rng: random.Random) -> AllocationFormula:
        """A formula drawn at random."""
        return AllocationFormula(
            self._draw(rng, _HEIGHT), _rounded(math.exp(rng.uniform(math.log(0.05), math.log(0.4))))
        )

    def mutate(self, genome: AllocationFormula, rng: random.Random) -> tuple[AllocationFormula, str]:
        """A changed copy, and the name of the change: of the spread, of the expression, or of both."""
        name = "spread" if rng.random() < 0.25 else pick({name: w for name, (w, _) in self._mutations.items()}, rng)
        spread = genome.spread
        if name == "spread" or rng.random() < 0.2:
            spread = _rounded(spread * math.exp(rng.gauss(0, 0.35)))
        if name == "spread":
            return AllocationFormula(genome.expression, spread), name
        return AllocationFormula(self._mutations[name][1](genome.expression, rng), spread), name

    def crossover(
        self, first: AllocationFormula, second: AllocationFormula, rng: random.Random
    ) -> tuple[AllocationFormula, str]:
        """A weighted sum of the two (`blend`), or `first` with a subtree of `second` (`subtree`)."""
        if rng.random() < _BLENDS:
            spread = _rounded(math.sqrt(first.spread * second.spread))
            return AllocationFormula(_sum(first.expression, second.expression, rng), spread), "blend"
        return AllocationFormula(
            swap_subtree(first.expression, second.expression, self._pset, rng), first.spread
        ), "subtree"

    def key(self, genome: AllocationFormula) -> str:
        """The text: what else is equivalent shows in the levels, see the breeder."""
        return f"{genome.expression.text} {genome.spread!r}"

    def born(self, genome: AllocationFormula) -> AllocationFormula | None:
        """The formula in its normal form, constants rounded, without what standardising its scores undoes anyway.

        None if it is too large or reads nothing.
        """
        try:
            expression = within_limits(_shortened(_unscaled(normal(within_limits(genome.expression)))))
            born = AllocationFormula(expression, genome.spread)
        except InvalidExpression:
            return None
        fits = expression.height <= DEFAULT_LIMITS.height and expression.size <= DEFAULT_LIMITS.size
        return born if fits and expression.terminals else None

    def _extended(self, genome: Expression, rng: random.Random) -> Expression:
        """A smaller share of one more statistic, all terms in units of their spread over matrices."""
        return _sum(genome, self._leaf(rng), rng)

    def _new_subtree(self, genome: Expression, rng: random.Random) -> Expression:
        def draw(type_: Type) -> Expression:
            return constant(_share(rng)) if type_ is Type.SCAL else self._draw(rng, 2)

        return replace_subtree(genome, self._pset, rng, draw)

    def _draw(self, rng: random.Random, height: int) -> Expression:
        kind = "leaf" if height == 0 else pick(_NODE, rng)
        if kind == "leaf":
            return self._leaf(rng)
        if kind == "binary":
            left = constant(_share(rng)) if rng.random() < _CONSTANTS else self._draw(rng, height - 1)
            return call(pick(_BINARY, rng), left, self._draw(rng, height - 1))
        name = rng.choice(_NORMALISERS) if kind == "normaliser" else pick(_UNARY, rng)
        return call(name, self._draw(rng, height - 1))

    def _leaf(self, rng: random.Random) -> Expression:
        return terminal(rng.choice(self.terminals), SITE_TERMINALS)


def _sum(first: Expression, second: Expression, rng: random.Random) -> Expression:
    return call("add", _standardised(first), call("mul", constant(_share(rng)), _standardised(second)))


def _standardised(term: Expression) -> Expression:
    """`term` in units of its spread over matrices; a sum of such terms stays as it is."""
    heads = {node.head for node in (term, *term.args)}
    return term if heads & {"zsn_t"} else call("zsn_t", term)


def _unscaled(root: Expression) -> Expression:
    """`root` without outer factors, addends and normalisers that change neither order nor z-score of what is inside."""
    head, args = root.head, root.args
    fixed = [arg for arg in args if arg.head == CONSTANT]
    if head in ("zsn_t", "mms_t"):
        return _unscaled(args[0])
    if head in ("mul", "add", "sub") and len(fixed) == 1:
        (inner,) = (arg for arg in args if arg.head != CONSTANT)
        falls = not fixed[0].positive if head == "mul" else head == "sub" and args[1] is inner
        return _negated(_unscaled(inner)) if falls else _unscaled(inner)
    if head == "neg":
        return _negated(_unscaled(args[0]))
    return root


def _shortened(root: Expression) -> Expression:
    """`root` with constants of three digits: more would be noise that nobody wants to read."""
    if root.head == CONSTANT:
        return constant(float(f"{root.value:.3g}"))
    return Expression(root.head, tuple(map(_shortened, root.args)), root.value)


def _negated(term: Expression) -> Expression:
    if term.head == "neg":
        return term.args[0]
    return call("sub", *reversed(term.args)) if term.head == "sub" else call("neg", term)


def _share(rng: random.Random) -> float:
    """A constant from 0.1 to 2 in magnitude, of either sign."""
    return float(f"{rng.choice((1, -1)) * math.exp(rng.uniform(math.log(0.1), math.log(2))):.2g}")


def _rounded(spread: float) -> float:
    return float(f"{min(max(spread, LEAST_SPREAD), MOST_SPREAD):.3g}")


assert set(FUNCTIONS) <= set(OPERATORS)
SPACES.add("formula", FormulaSpace)
