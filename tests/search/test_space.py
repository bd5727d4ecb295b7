"""The space of metrics: drawing and varying expressions through DEAP."""

import random
import subprocess
import sys

import pytest
import torch

from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.expression import constant, parse
from evoprune.metrics.interpreter import evaluate
from evoprune.metrics.probe import synthetic_inputs
from evoprune.metrics.terminals import TERMINALS
from evoprune.metrics.types import Type
from evoprune.search.config_metric import DEFAULT_STATISTICS
from evoprune.search.spaces.generator import Generator
from evoprune.search.spaces.symbolic import MetricSpace
from evoprune.search.spaces.trees import Exponent, InVec, Mat, OutVec, Scal, primitive_set, to_expression, to_tree
from evoprune.search.spaces.variation import replace_at

TERMINAL_NAMES = frozenset(TERMINALS)


@pytest.fixture(scope="module")
def space():
    return MetricSpace(TERMINAL_NAMES)


@pytest.mark.parametrize("name", [name for name in CRITERIA if isinstance(CRITERIA[name], Metric)])
def test_trees_give_expressions_back(name):
    expression = CRITERIA[name].expression
    assert to_expression(to_tree(expression, primitive_set(TERMINAL_NAMES))) == expression


def test_drawn_expressions_stay_within_budget_and_terminals():
    generator = Generator({"W", "X_l2", "G_l2"}, height=6)
    rng = random.Random(0)
    for _ in range(2000):
        expression = generator.draw(rng)
        assert expression.terminals <= {"W", "X_l2", "G_l2"}
        assert expression.height <= 7  # a W mostly comes as abs(W)


@pytest.mark.parametrize("type_", list(Type))
def test_a_drawn_expression_fits_its_slot(type_):
    generator, rng = Generator(TERMINAL_NAMES), random.Random(1)
    assert all(generator.draw(rng, type_).type.fits(type_) for _ in range(500))


def assert_well_typed(tree):
    """Every argument of a DEAP tree is of its slot's type or a subtype, and the tree has one root."""

    def read(at, slot):
        node = tree[at]
        assert issubclass(node.ret, slot), (str(tree), at)
        at += 1
        for argument in node.args if node.arity else ():
            at = read(at, argument)
        return at

    assert read(0, Mat) == len(tree)


def broadcasts(tensor, type_):
    """Whether a value, expanded to its matrix, varies only along what its type says."""
    return (type_.varies_with_row or torch.equal(tensor, tensor[:1].expand_as(tensor))) and (
        type_.varies_with_column or torch.equal(tensor, tensor[:, :1].expand_as(tensor))
    )


def test_ten_thousand_variations_are_well_typed(space):
    """Every product of crossover and mutation types, prints, reads back and, for a sample, evaluates to its shape."""
    rng, inputs = random.Random(2), synthetic_inputs()
    shape = tuple(inputs["W"].shape)
    pset = primitive_set(TERMINAL_NAMES)
    pool = [space.sample(rng) for _ in range(60)]
    for turn in range(10_000):
        if rng.random() < 0.3:
            child, _ = space.crossover(rng.choice(pool), rng.choice(pool), rng)
        else:
            child, _ = space.mutate(rng.choice(pool), rng)
        assert_well_typed(to_tree(child, pset))
        if len(child.text) < 1000:
            assert parse(child.text) == child
        if turn % 20 == 0:
            score = evaluate(child, inputs)
            assert tuple(score.shape) == shape
            assert torch.isfinite(score).all()
        if turn % 200 == 0:
            for node in child.walk():
                assert broadcasts(evaluate(node, inputs), node.type), node.text
        if child.size <= 30:
            pool[rng.randrange(len(pool))] = child


def test_a_badly_typed_tree_is_seen():
    pset = primitive_set(TERMINAL_NAMES)
    tree = to_tree(parse("mul(X_l2,sqrt(X_l2))"), pset)
    assert {InVec, OutVec, Scal, Exponent} > {node.ret for node in tree}
    assert_well_typed(tree)
    tree[1] = pset.mapping["Y_l2"]
    with pytest.raises(AssertionError):
        assert_well_typed(tree)


def test_every_mutation_happens_and_most_change_something(space):
    rng = random.Random(3)
    changed: dict[str, int] = {}
    for _ in range(2000):
        parent = space.sample(rng)
        child, name = space.mutate(parent, rng)
        changed[name] = changed.get(name, 0) + (child != parent)
    assert set(changed) == {"perturb", "subtree", "node", "insert", "delete", "rotate", "extend", "append"}
    assert all(count > 5 for count in changed.values())


def test_births_may_be_simplified_as_published():
    expression = parse("mul(sqrt(sqr(W)),div(mul(X_l2,Y_l2),Y_l2))")
    published = MetricSpace(TERMINAL_NAMES, simplify="opposing")
    assert published.simplified(expression) == parse("mul(W,X_l2)")
    assert MetricSpace(TERMINAL_NAMES).simplified(expression) == parse("mul(abs(W),X_l2)")
    # Whatever it is born as, equal rankings share a key.
    assert published.key(parse("sqr(mul(W,X_l2))")) == published.key(parse("mul(abs(W),X_l2)"))


def test_replace_at_counts_as_walk_does():
    expression = parse("mul(abs(W),powc(X_l2,0.5))")
    for index, node in enumerate(expression.walk()):
        seen = []
        replace_at(expression, index, lambda found, seen=seen: seen.append(found) or constant(1))
        assert seen == [node]


def test_the_global_generator_is_left_alone(space):
    random.seed(5)
    expected = random.random()
    random.seed(5)
    rng = random.Random(0)
    for _ in range(200):
        space.mutate(space.sample(rng), rng)
    assert random.random() == expected


_OFFSPRING = """
import random, sys
from evoprune.search.config_metric import DEFAULT_STATISTICS
from evoprune.search.spaces.symbolic import MetricSpace
junk = [object() for _ in range(int(sys.argv[1]))]
space, rng = MetricSpace(set(DEFAULT_STATISTICS) | {"W"}), random.Random(0)
pool = [space.sample(rng) for _ in range(20)]
for _ in range(400):
    child, _ = space.crossover(rng.choice(pool), rng.choice(pool), rng)
    pool[rng.randrange(20)] = space.mutate(child, rng)[0] if child.size < 40 else space.sample(rng)
print("\\n".join(map(str, pool)))
"""


def test_same_seed_same_offspring_in_any_process():
    """DEAP's own typed crossover fails this: it draws from a set of type objects, ordered by memory address."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", _OFFSPRING, junk],
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for junk, hash_seed in (("10", "1"), ("100000", "2"))
    }
    assert len(outputs) == 1
    assert DEFAULT_STATISTICS[0] in outputs.pop()
