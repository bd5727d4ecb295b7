"""Fronts and the archive, against definitions spelled out."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from evoprune.search.front import Buckets, Point, mates, nondominated, survivors
from evoprune.search.pooled_search import Member


def point(kl: float, cost: int, name: int = 0) -> Point:
    return Point(Member((name,), "seed:x", birth=name, kl=kl), (cost,))


def cloud(count: int, seed: int = 0, costs: int = 1) -> list[Point]:
    rng = random.Random(seed)
    members = [Member((name,), "seed:x", birth=name, kl=rng.randrange(20) / 10) for name in range(count)]
    return [Point(member, tuple(rng.randrange(100) for _ in range(costs))) for member in members]


def beaten(one: Point, by: Point) -> bool:
    ours, theirs = (one.kl, *one.costs), (by.kl, *by.costs)
    return theirs != ours and all(low <= high for low, high in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("costs", [1, 2])
def test_the_front_is_what_nobody_beats(costs: int) -> None:
    for seed in range(20):
        points = cloud(40, seed, costs)
        expected = {(one.kl, one.costs) for one in points if not any(beaten(one, by) for by in points)}
        front = nondominated(points)
        assert [(one.kl, one.costs) for one in front] == sorted(expected, key=lambda pair: pair[1], reverse=True)
    assert nondominated([]) == []


@pytest.mark.parametrize("costs", [1, 2])
def test_survivors_are_the_first_fronts(costs: int) -> None:
    points = cloud(40, costs=costs)
    kept = survivors(points, 16)
    assert len(kept) == len(set(map(id, kept))) == 16
    for one in points:
        if one not in kept:  # nobody is kept whom a rejected one beats
            assert not any(beaten(other, one) for other in kept)
    assert [id(one) for one in survivors(points, 16)] == [id(one) for one in kept]


def test_mates_are_the_better_of_two_and_leave_the_global_generator_alone() -> None:
    points = survivors(cloud(22), 22)
    random.seed(5)
    before = random.getstate()
    drawn = mates(points, 400, random.Random(1))
    assert random.getstate() == before
    assert len(drawn) == 400
    assert [id(one) for one in mates(points, 400, random.Random(1))] == [id(one) for one in drawn]
    counts = Counter(map(id, drawn))
    losses = {id(one): sum(beaten(one, by) for by in points) for one in points}
    best = [counts[name] for name, lost in losses.items() if lost == 0]
    worst = [counts[name] for name, lost in losses.items() if lost > 10]
    assert worst and sum(best) / len(best) > 3 * sum(worst) / len(worst)
    few = points[:3]
    assert {id(one) for one in mates(few, 50, random.Random(1))} == set(map(id, few))


def test_the_archive_keeps_the_best_of_each_hundredth() -> None:
    archive = Buckets([1000])
    assert archive.add(point(1.0, 600, 1))
    assert not archive.add(point(1.1, 601, 2))  # the same bucket, worse
    assert archive.add(point(0.9, 604, 3))  # the same, better
    assert archive.add(point(0.5, 606, 4))  # the next one
    assert not archive.add(point(0.95, 620, 5))  # another bucket, but dearer than a better one
    assert [one.cost for one in archive.points] == [620, 606, 604]
    pairs = Buckets([1000, 10])
    for kl, costs, joins in ((1.0, (600, 7), True), (1.2, (601, 6), True), (1.1, (604, 7), False)):
        assert pairs.add(Point(Member((), "seed:x", kl=kl), costs)) == joins
    assert [one.costs for one in pairs.points] == [(600, 7), (601, 6)]
    random_points = cloud(200)
    filled, reverse = Buckets([100]), Buckets([100])
    for one in random_points:
        filled.add(one)
    for one in reversed(random_points):
        reverse.add(one)
    assert [one.member for one in filled.points] == [one.member for one in reverse.points]
    for one in filled.points:
        assert one.kl == min(other.kl for other in random_points if other.cost == one.cost)
