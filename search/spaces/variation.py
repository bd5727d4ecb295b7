"""Changes of expressions that know nothing of what an expression is for. DEAP makes those that it has."""

from __future__ import annotations

import random
from collections.abc import Callable

from deap import gp

from evoprune.metrics.expression import CONSTANT, MAX_CONSTANT, Expression, call, constant
from evoprune.metrics.types import Type
from evoprune.search.spaces.trees import EXPONENTS, LANGUAGE_TYPES, fits, seeded_deap, to_expression, to_tree


def swap_subtree(first: Expression, second: Expression, pset: gp.PrimitiveSetTyped, rng: random.Random) -> Expression:
    """`first` with one subtree replaced by a subtree of `second`.

    DEAP's own typed crossover pairs equal types only, and draws them from a set, in an order that changes from process
    to process; here a subtree may stand wherever its type fits.
    """
    tree, donor = to_tree(first, pset), to_tree(second, pset)
    at = rng.randrange(len(tree))
    fitting = [index for index, node in enumerate(donor) if fits(node.ret, tree[at].ret)]
    if not fitting:
        return first
    taken = donor[donor.searchSubtree(rng.choice(fitting))]
    tree[tree.searchSubtree(at)] = taken
    return to_expression(tree)


def replace_subtree(
    genome: Expression, pset: gp.PrimitiveSetTyped, rng: random.Random, draw: Callable[[Type], Expression]
) -> Expression:
    """A subtree replaced by a fresh one, which `draw` makes for a type."""

    def fresh(pset: gp.PrimitiveSetTyped, type_: type) -> list[gp.Primitive | gp.Terminal]:
        if type_ not in LANGUAGE_TYPES:
            return [gp.Terminal(rng.choice(EXPONENTS), False, type_)]
        return list(to_tree(draw(LANGUAGE_TYPES[type_]), pset))

    with seeded_deap(rng):
        return to_expression(gp.mutUniform(to_tree(genome, pset), fresh, pset)[0])


def replace_node(genome: Expression, pset: gp.PrimitiveSetTyped, rng: random.Random) -> Expression:
    """Another operator of the same signature, or another terminal of the same type."""
    with seeded_deap(rng):
        return to_expression(gp.mutNodeReplacement(to_tree(genome, pset), pset)[0])


def insert_node(genome: Expression, pset: gp.PrimitiveSetTyped, rng: random.Random) -> Expression:
    """An operator put in somewhere, its other arguments drawn."""
    with seeded_deap(rng):
        return to_expression(gp.mutInsert(to_tree(genome, pset), pset)[0])


def delete_node(genome: Expression, pset: gp.PrimitiveSetTyped, rng: random.Random) -> Expression:
    """An operator replaced by one of its arguments."""
    with seeded_deap(rng):
        return to_expression(gp.mutShrink(to_tree(genome, pset))[0])


def move_number(genome: Expression, rng: random.Random) -> Expression | None:
    """One exponent or constant a little larger or smaller; None if there is none."""
    numbers = [index for index, node in enumerate(genome.walk()) if node.value is not None]
    if not numbers:
        return None
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


def rotate(genome: Expression, rng: random.Random) -> Expression | None:
    """Reassociate: op(a, op'(b, c)) becomes op'(op(a, b), c) somewhere; None where there is no such place."""
    spots = [index for index, node in enumerate(genome.walk()) if len(node.args) == 2 and len(node.args[1].args) == 2]
    if not spots:
        return None

    def rotated(node: Expression) -> Expression:
        left, right = node.args
        return call(right.head, call(node.head, left, right.args[0]), right.args[1])

    return replace_at(genome, rng.choice(spots), rotated)


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
