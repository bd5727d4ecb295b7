"""Racing and the hall of fame."""

import json
import random

import pytest

from evoprune.metrics.expression import parse
from evoprune.search.archive import Archive, needs_class
from evoprune.search.candidate import Candidate
from evoprune.search.racing import kendall_tau
from evoprune.search.racing.halving import SuccessiveHalving


def candidate(birth, text, value, rungs=3):
    return Candidate(birth, parse(text), "random", (), False, 0, (value,) * rungs, 0.0, f"s{birth}")


def test_the_best_share_goes_on():
    racing = SuccessiveHalving(2, keep=0.25, uniform=0.0)
    for value in range(40):
        racing.observe([float(value)], [False])
    (threshold,) = racing.thresholds([0.5])
    assert threshold == 9.0
    assert sum(value <= threshold for value in range(40)) == 10


def test_while_few_results_are_in_only_a_new_best_goes_on():
    racing = SuccessiveHalving(3, uniform=0.0)
    assert all(threshold < -1e20 for threshold in racing.thresholds([0.5, 0.5]))
    racing.observe([0.4, 0.5, 0.6], [False, False])
    assert racing.thresholds([0.5, 0.5]) == [0.4, 0.5]


def test_further_up_fewer_results_are_remembered():
    racing = SuccessiveHalving(4, keep=0.25, uniform=0)
    for value in range(100, 0, -1):
        racing.observe([value] * 4, [False] * 3)
    assert racing.thresholds([1, 1, 1]) == [64 / 4, 32 / 4, 16 / 4]


def test_some_go_on_whatever_their_fitness_and_give_tau():
    racing = SuccessiveHalving(2, uniform=0.1)
    assert racing.thresholds([0.05]) == [None]
    rng = random.Random(0)
    for _ in range(40):
        value = rng.random()
        racing.observe([value, value + 0.01 * rng.random()], [True])
    assert racing.tau(0) > 0.9
    assert racing.correlations()[0]["n"] == 40


def test_twice_the_share_goes_on_where_a_rung_predicts_badly():
    good, bad = SuccessiveHalving(2, uniform=0.5), SuccessiveHalving(2, uniform=0.5)
    rng = random.Random(0)
    for value in range(64):
        good.observe([float(value), float(value)], [True])
        bad.observe([float(value), rng.random()], [True])
    assert bad.thresholds([0.9])[0] > good.thresholds([0.9])[0] * 1.9


def test_racing_state_goes_through_json():
    racing, copy = SuccessiveHalving(3), SuccessiveHalving(3)
    rng = random.Random(1)
    for _ in range(50):
        racing.observe([rng.random() for _ in range(rng.randint(1, 3))], [rng.random() < 0.5] * 2)
    copy.restore(json.loads(json.dumps(racing.state())))
    assert copy.thresholds([0.5, 0.5]) == racing.thresholds([0.5, 0.5])
    assert copy.state() == racing.state()


@pytest.mark.parametrize(
    ("pairs", "tau"),
    [([(1, 1), (2, 2), (3, 3)], 1.0), ([(1, 3), (2, 2), (3, 1)], -1.0), ([(1, 2), (2, 1), (3, 3)], 1 / 3)],
)
def test_kendall_by_hand(pairs, tau):
    assert kendall_tau(pairs) == pytest.approx(tau)


def test_the_archive_keeps_what_nothing_dominates():
    archive = Archive()
    rng = random.Random(0)
    texts = ["abs(W)", "mul(abs(W),X_l2)", "mul(abs(W),powc(X_l2,0.5))", "mul(abs(W),mul(X_l2,G_l2))"]
    members = [candidate(birth, rng.choice(texts), rng.random()) for birth in range(200)]
    for member in members:
        archive.add(member)
    brute = {
        member.birth
        for member in members
        if not any(
            other.value <= member.value
            and other.complexity <= member.complexity
            and (other.value, other.complexity) != (member.value, member.complexity)
            for other in members
        )
    }
    assert {member.birth for member in archive.front} == brute
    assert archive.best.value == min(member.value for member in members)


def test_every_class_of_needs_has_its_own_winner():
    archive = Archive()
    archive.add(candidate(0, "mul(abs(W),G_l2)", 0.1))
    archive.add(candidate(1, "mul(abs(W),X_l2)", 0.2))
    archive.add(candidate(2, "abs(W)", 0.3))
    best = {name: member and member.birth for name, member in archive.by_class().items()}
    assert best == {"data-free": 2, "forward": 1, "backward": 0, "any": 0}
    assert needs_class(parse("div(sqr(W),Hinv)")) == "any"


def test_the_archive_goes_through_json():
    archive, copy = Archive(), Archive()
    for birth, text in enumerate(["abs(W)", "mul(abs(W),X_l2)", "mul(abs(W),G_l2)"]):
        archive.add(candidate(birth, text, 1 - birth / 10))
    copy.restore(json.loads(json.dumps(archive.state())))
    assert copy.state() == archive.state()
    assert copy.front == archive.front


def test_further_is_better_than_lower():
    assert candidate(0, "W", 0.9, rungs=2).fitness > candidate(1, "W", 0.1, rungs=1).fitness
    assert candidate(0, "W", 0.1).fitness > candidate(1, "W", 0.2).fitness
