"""The space of pruning metrics: expressions, varied through DEAP. Source: symbolic pruning metrics, section 2.5."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Literal

from deap import gp

from evoprune.metrics.canonical import canonicalise, metric_key
from evoprune.metrics.expression import CONSTANT, MAX_CONSTANT, Expression, call, constant, terminal
from evoprune.metrics.opposing import oppose
from evoprune.metrics.records import Group
from evoprune.metrics.terminals import TERMINALS
from evoprune.metrics.types import Type
from evoprune.search.spaces import SPACES
from evoprune.search.spaces.generator import Generator, pick
from evoprune.search.spaces.trees import (
    EXPONENTS,
    LANGUAGE_TYPES,
    fits,
    primitive_set,
    seeded_deap,
    to_expression,
    to_tree,
)

Mutation = Callable[[Expression, random.Random], Expression]
Simplification = Literal["canonical", "opposing"]

_SHORT_STEPS = (0.25, 0.1, -0.1, -0.25)

# Share of crossovers that add their parents.
_BLENDS = 0.25


class MetricSpace:
    """Expressions over some terminals.

    Args:
        terminals: names that may occur.
        group: what scores are compared within; it decides which expressions are equivalent.
        simplify: how births are simplified: to their canonical form, which ranks alike, or by the published removal of
            opposite operators, which may change what an expression means. Keys are of canonical forms either way.
        typical: the typical magnitude of an expression's scores. Sums are made with it, for a sum whose terms differ
            by orders of magnitude ranks like its larger term; without it, their constants are drawn blindly.
    """

    def __init__(
        self,
        terminals: Collection[str],
        group: Group = "row",
        *,
        simplify: Simplification = "canonical",
        typical: Callable[[Expression], float] | None = None,
    ) -> None:
        self.terminals = frozenset(terminals)
        self.group = group
        self._simplify = simplify
        self._typical = typical
        self._pset = primitive_set(self.terminals)
        self._generator = Generator(self.terminals)
        self._factors = [
            name
            for name in sorted(self.terminals)
            if TERMINALS[name].cost != "none"
            and -1 not in TERMINALS[name].sign
            and TERMINALS[name].type.varies_with_column
        ]
        self._mutations: dict[str, tuple[float, Mutation]] = {
            "perturb": (0.15, self._perturb),
            "extend": (0.20, self._extend),
            "append": (0.20, self._append),
            "subtree": (0.10, self._replace_subtree),
            "node": (0.15, self._replace_node),
            "insert": (0.05, self._insert),
            "delete": (0.10, self._delete),
            "rotate": (0.05, self._rotate),
        }

    def sample(self, rng: random.Random) -> Expression:
        return self._generator.draw(rng)

    def mutate(self, genome: Expression, rng: random.Random) -> tuple[Expression, str]:
        name = pick({name: weight for name, (weight, _) in self._mutations.items()}, rng)
        return self._mutations[name][1](genome, rng), name

    def crossover(self, first: Expression, second: Expression, rng: random.Random) -> tuple[Expression, str]:
        """A sum of the two (`blend`), or `first` with one subtree replaced by a subtree of `second` (`subtree`)."""
        if rng.random() < _BLENDS:
            return self._sum(first, second, rng), "blend"
        return self._swap_subtree(first, second, rng), "subtree"

    def _swap_subtree(self, first: Expression, second: Expression, rng: random.Random) -> Expression:
        """DEAP's own typed crossover pairs equal types only, and draws them from a set, in an order that changes from
        process to process; here a subtree may stand wherever its type fits."""
        tree, donor = to_tree(first, self._pset), to_tree(second, self._pset)
        at = rng.randrange(len(tree))
        fitting = [index for index, node in enumerate(donor) if fits(node.ret, tree[at].ret)]
        if not fitting:
            return first
        taken = donor[donor.searchSubtree(rng.choice(fitting))]
        tree[tree.searchSubtree(at)] = taken
        return to_expression(tree)

    def key(self, genome: Expression) -> str:
        return metric_key(genome, self.group)

    def simplified(self, genome: Expression) -> Expression:
        """The form in which `genome` is born."""
        return oppose(genome) if self._simplify == "opposing" else canonicalise(genome, self.group)

    def _perturb(self, genome: Expression, rng: random.Random) -> Expression:
        """Move one exponent or constant; without any, give one vector or matrix factor an exponent."""
        numbers = [index for index, node in enumerate(genome.walk()) if node.value is not None]
        if not numbers:
            return self._exponentiate(genome, rng)
        chosen = rng.choice(numbers)

        def moved(node: Expression) -> Expression:
            assert node.value is not None
            if node.head == CONSTANT:
                sign = -1 if rng.random() < 0.01 else 1
                value = sign * node.value * 2.718281828459045 ** rng.gauss(0, 0.5)
                return constant(max(-MAX_CONSTANT, min(MAX_CONSTANT, value)))
            exponent = max(-4.0, min(4.0, node.value + rng.gauss(0, 0.15)))
            return call(node.head, *node.args, exponent=round(exponent, 2))

        return replace_at(genome, chosen, moved)

    def _exponentiate(self, genome: Expression, rng: random.Random) -> Expression:
        leaves = [
            index
            for index, node in enumerate(genome.walk())
            if not node.args and node.head != CONSTANT and node.head != "W" and node.type is not Type.SCAL
        ]
        if not leaves:
            return self._extend(genome, rng)
        return replace_at(
            genome, rng.choice(leaves), lambda leaf: call("powc", leaf, exponent=rng.choice((0.5, 0.75, 1.25, 1.5)))
        )

    def _replace_subtree(self, genome: Expression, rng: random.Random) -> Expression:
        def fresh(pset: gp.PrimitiveSetTyped, type_: type) -> list[gp.Primitive | gp.Terminal]:
            if type_ not in LANGUAGE_TYPES:
                return [gp.Terminal(rng.choice(EXPONENTS), False, type_)]
            return list(to_tree(self._generator.draw(rng, LANGUAGE_TYPES[type_], rng.randint(1, 7)), pset))

        with seeded_deap(rng):
            return to_expression(gp.mutUniform(to_tree(genome, self._pset), fresh, self._pset)[0])

    def _replace_node(self, genome: Expression, rng: random.Random) -> Expression:
        """Another operator of the same signature, or another terminal of the same type."""
        with seeded_deap(rng):
            return to_expression(gp.mutNodeReplacement(to_tree(genome, self._pset), self._pset)[0])

    def _insert(self, genome: Expression, rng: random.Random) -> Expression:
        with seeded_deap(rng):
            return to_expression(gp.mutInsert(to_tree(genome, self._pset), self._pset)[0])

    def _delete(self, genome: Expression, rng: random.Random) -> Expression:
        with seeded_deap(rng):
            return to_expression(gp.mutShrink(to_tree(genome, self._pset))[0])

    def _rotate(self, genome: Expression, rng: random.Random) -> Expression:
        """Reassociate: op(a, op'(b, c)) becomes op'(op(a, b), c) somewhere."""
        spots = [
            index for index, node in enumerate(genome.walk()) if len(node.args) == 2 and len(node.args[1].args) == 2
        ]
        if not spots:
            return self._perturb(genome, rng)

        def rotated(node: Expression) -> Expression:
            left, right = node.args
            return call(right.head, call(node.head, left, right.args[0]), right.args[1])

        return replace_at(genome, rng.choice(spots), rotated)

    def _extend(self, genome: Expression, rng: random.Random) -> Expression:
        """Multiply the root by a small power of a statistic that is never negative.

        In exponents a metric is a point, and this is a short step along one of its axes: what helps a little can be
        tuned afterwards, while a large step of a wrong length is lost at once.
        """
        if not self._factors:
            return genome
        factor = call("powc", terminal(rng.choice(self._factors)), exponent=rng.choice(_SHORT_STEPS))
        return call("mul", genome, factor)

    def _append(self, genome: Expression, rng: random.Random) -> Expression:
        """Add a power of the weight, mostly times a power of a statistic that is never negative."""
        term = call(rng.choice(("abs", "sqr")), terminal("W"))
        if self._factors and rng.random() < 0.75:
            factor = call("powc", terminal(rng.choice(self._factors)), exponent=rng.choice((0.5, 1.0, -0.5)))
            term = call("mul", term, factor)
        return self._sum(genome, term, rng)

    def _sum(self, first: Expression, second: Expression, rng: random.Random) -> Expression:
        """`first` and a smaller share of `second`."""
        ratio = 10 ** rng.uniform(-1.5, 0.0)
        if self._typical is not None:
            above, below = self._typical(first), self._typical(second)
            ratio *= above / below if above > 0 and below > 0 else 1.0
        else:
            ratio *= 10 ** rng.uniform(-3.0, 3.0)
        share = min(MAX_CONSTANT, float(f"{ratio:.2g}"))
        return call("add", first, call("mul", constant(share), second)) if share > 0 else first


def replace_at(genome: Expression, index: int, change: Callable[[Expression], Expression]) -> Expression:
    """A copy of `genome` with its `index`-th node, counted as `Expression.walk` does, passed through `change`."""
    rebuilt, _ = _replace(genome, index, change)
    return rebuilt


def _replace(node: Expression, index: int, change: Callable[[Expression], Expression]) -> tuple[Expression, int]:
    if index == 0:
        return change(node), -1
    index -= 1
    args = []
    for arg in node.args:
        if index >= 0:
            arg, index = _replace(arg, index, change)
        args.append(arg)
    return Expression(node.head, tuple(args), node.value), index


SPACES.add("metric", MetricSpace)
