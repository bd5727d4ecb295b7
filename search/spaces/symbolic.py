"""The space of pruning metrics: expressions, varied through DEAP. Source: symbolic pruning metrics, section 2.5."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Literal

from evoprune.metrics.canonical import canonicalise, metric_key
from evoprune.metrics.expression import CONSTANT, MAX_CONSTANT, Expression, call, constant, terminal
from evoprune.metrics.opposing import oppose
from evoprune.metrics.records import Group
from evoprune.metrics.terminals import TERMINALS
from evoprune.metrics.types import Type
from evoprune.search.spaces import SPACES
from evoprune.search.spaces.generator import Generator, pick
from evoprune.search.spaces.trees import primitive_set
from evoprune.search.spaces.variation import (
    delete_node,
    insert_node,
    move_number,
    replace_at,
    replace_node,
    replace_subtree,
    rotate,
    swap_subtree,
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
        return swap_subtree(first, second, self._pset, rng), "subtree"

    def key(self, genome: Expression) -> str:
        return metric_key(genome, self.group)

    def simplified(self, genome: Expression) -> Expression:
        """The form in which `genome` is born."""
        return oppose(genome) if self._simplify == "opposing" else canonicalise(genome, self.group)

    def _perturb(self, genome: Expression, rng: random.Random) -> Expression:
        """Move one exponent or constant; without any, give one vector or matrix factor an exponent."""
        moved = move_number(genome, rng)
        return self._exponentiate(genome, rng) if moved is None else moved

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
        return replace_subtree(
            genome, self._pset, rng, lambda type_: self._generator.draw(rng, type_, rng.randint(1, 7))
        )

    def _replace_node(self, genome: Expression, rng: random.Random) -> Expression:
        return replace_node(genome, self._pset, rng)

    def _insert(self, genome: Expression, rng: random.Random) -> Expression:
        return insert_node(genome, self._pset, rng)

    def _delete(self, genome: Expression, rng: random.Random) -> Expression:
        return delete_node(genome, self._pset, rng)

    def _rotate(self, genome: Expression, rng: random.Random) -> Expression:
        rotated = rotate(genome, rng)
        return self._perturb(genome, rng) if rotated is None else rotated

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


SPACES.add("metric", MetricSpace)
