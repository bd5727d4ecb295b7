"""Fronts and the archive, against definitions spelled out."""

from __future__ import annotations

import random
from collections import Counter

from evoprune.search.front import Buckets, Point, mates, nondominated, survivors
from evoprune.search.pooled_search import Member


def point(kl: float, cost: int, name: int = 0) -> Point:
    return Point(Member((name,), "seed:x", birth=name, kl=kl), (cost,))


def cloud(count: int, seed: int = 0) -> list[Point]:
    rng = random.Random(seed)
    return [point(rng.randrange(20) / 10, rng.randrange(100), name) for name in range(count)]


def beaten(one: Point, by: Point) -> bool:
    return by.kl <= one.kl and by.cost <= one.cost and (by.kl, by.cost) != (one.kl, one.cost)


def test_the_front_is_what_nobody_beats() -> None:
    for seed in range(20):
        points = cloud(40, seed)
        expected = {(one.kl, one.cost) for one in points if not any(beaten(one, by) for by in points)}
        front = nondominated(points)
        assert [(one.kl, one.cost) for one in front] == sorted(expected, key=lambda pair: -pair[1])
    assert nondominated([]) == []


def test_survivors_are_the_first_fronts() -> None:
    points = cloud(40)
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
    random_points = cloud(200)
    filled, reverse = Buckets([100]), Buckets([100])
    for one in random_points:
        filled.add(one)
    for one in reversed(random_points):
        reverse.add(one)
    assert [one.member for one in filled.points] == [one.member for one in reverse.points]
    for one in filled.points:
        assert one.kl == min(other.kl for other in random_points if other.cost == one.cost)
