"""Tuning exponents and constants on functions whose minimum is known."""

import json
import math

import pytest

from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.expression import parse
from evoprune.metrics.files import canonical_json
from evoprune.search.searchers.tuner import Tuner, parameters, parametrised, skeleton, with_values


def exponents(expression):
    return [node.value for node in expression.walk() if node.value is not None]


def run(tuner, function):
    best = math.inf
    proposed = 0
    while (point := tuner.propose()) is not None:
        index, expression = point
        value = function(exponents(expression))
        best = min(best, value)
        proposed += 1
        tuner.tell(index, value)
    return best, proposed


def test_a_quadratic_bowl_is_found_within_the_budget():
    template = parse("mul(abs(W),mul(powc(X_l2,1),powc(G_l2,1)))")

    def bowl(at):
        return (at[0] - 0.62) ** 2 + 2 * (at[1] - 0.37) ** 2

    best, proposed = run(Tuner(template, parent=0, value=bowl([1, 1]), island=0, budget=16), bowl)
    assert proposed == 16
    assert best < 1e-3


def test_a_grid_comes_first_and_the_best_of_it_is_refined():
    template = parse("mul(abs(W),mul(powc(X_l2,1),powc(G_l2,1)))")
    grid = ((0.5, 0.5), (1.5, 0.25), (0.25, 1.0))
    seen = []

    def bowl(at):
        seen.append(tuple(at))
        return abs(at[0] - 1.6) + (at[1] - 0.2) ** 2

    best, _ = run(Tuner(template, parent=None, value=None, island=0, budget=30, grid=grid), bowl)
    assert tuple(seen[:3]) == grid
    assert best < 0.02


def test_constants_move_in_their_logarithm_and_keep_their_sign():
    template = parse("add(abs(W),mul(-100,G_l2))")
    tuner = Tuner(template, parent=0, value=1.0, island=0)
    values = []
    while (point := tuner.propose()) is not None:
        values += exponents(point[1])
        tuner.tell(point[0], abs(math.log(-exponents(point[1])[0]) - math.log(30)))
    assert all(value < 0 for value in values)
    assert min(abs(math.log(-value / 30)) for value in values) < 0.2


def test_failed_points_do_not_stop_it():
    tuner = Tuner(parse("mul(abs(W),powc(X_l2,1))"), parent=0, value=1.0, island=0, budget=8)
    told = 0
    while (point := tuner.propose()) is not None:
        tuner.tell(point[0], None if told % 2 else (exponents(point[1])[0] - 0.5) ** 2)
        told += 1
    assert told == 8
    assert tuner.finished


def test_a_form_of_which_nothing_has_a_fitness_goes_through_json():
    tuner = Tuner(parse("mul(abs(W),powc(X_l2,1))"), parent=None, value=None, island=0, budget=8, grid=[[0.5], [1.0]])
    while (point := tuner.propose()) is not None:
        tuner.tell(point[0], None)
        tuner = Tuner.from_state(json.loads(canonical_json(tuner.state())))
    assert tuner.finished


def test_nothing_is_proposed_while_a_batch_is_out():
    tuner = Tuner(parse("mul(abs(W),powc(X_l2,1))"), parent=0, value=1.0, island=0)
    assert tuner.propose() is not None
    assert tuner.propose() is not None
    assert tuner.propose() is None


def test_state_goes_through_json():
    function = lambda at: (at[0] - 0.7) ** 2  # noqa: E731
    whole = Tuner(parse("mul(abs(W),powc(X_l2,1))"), parent=3, value=0.09, island=1, evolved_parent=True)
    broken = Tuner(parse("mul(abs(W),powc(X_l2,1))"), parent=3, value=0.09, island=1, evolved_parent=True)
    proposals: list[list[str]] = [[], []]
    for which, tuner in enumerate((whole, broken)):
        while (point := tuner.propose()) is not None:
            proposals[which].append(point[1].text)
            tuner.tell(point[0], function(exponents(point[1])))
            if which:
                tuner = Tuner.from_state(json.loads(json.dumps(tuner.state())))
                assert (tuner.parent, tuner.island, tuner.evolved_parent) == (3, 1, True)
    assert proposals[0] == proposals[1]


@pytest.mark.parametrize("name", ["wanda", "gblm", "pruner-zero", "ria", "symwanda"])
def test_parametrising_keeps_the_function(name):
    expression = CRITERIA[name].expression
    given = parametrised(expression)
    ones = {index: 1.0 for index in parameters(given) if index not in parameters(expression)}
    assert given.terminals == expression.terminals
    assert skeleton(given) == skeleton(with_values(given, ones))
    assert any(node.head == "powc" for node in given.walk())


def test_the_exponent_of_the_weight_stays():
    expression = parse("mul(powc(abs(W),2),powc(X_l2,0.5))")
    nodes = list(expression.walk())
    assert [nodes[index].args[0].text for index in parameters(expression)] == ["X_l2"]
