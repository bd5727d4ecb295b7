"""What a candidate is known by when it is measured on one stretch of text after another."""

import random
import statistics
from itertools import pairwise

import pytest

from evoprune.search.pooled_search import Member


def fresh() -> Member:
    return Member((1, 2), "switch", generation=3, parents=(4,))


def measured(member: Member, values: list[float], first: int, last: int) -> Member:
    part = values[first:last]
    stderr = statistics.stdev(part) / len(part) ** 0.5 if len(part) > 1 else 0.0
    return member.measured(first, first, last, statistics.fmean(part), stderr)


@pytest.mark.parametrize("cuts", [(2, 10), (2, 3, 10), (2, 4, 5, 9), (0, 7, 8)])
def test_parts_of_a_text_add_up_to_the_whole(cuts: tuple[int, ...]) -> None:
    draw = random.Random(0)
    values = [draw.gauss(1, 0.3) for _ in range(10)]
    member = fresh()
    for first, last in pairwise(cuts):
        member = measured(member, values, first, last)
    whole = values[cuts[0] : cuts[-1]]
    assert member.seen == (cuts[0], cuts[-1])
    assert member.kl == pytest.approx(statistics.fmean(whole), rel=1e-12)
    assert member.stderr == pytest.approx(statistics.stdev(whole) / len(whole) ** 0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("first", "last", "kept"), [(2, 8, True), (2, 5, False), (2, 4, False), (3, 8, False), (5, 8, False)]
)
def test_only_the_beginning_of_a_text_is_kept(first: int, last: int, kept: bool) -> None:
    """What was measured in full is measured again where it is asked for again."""
    member = fresh().measured(7, 2, 5, 1.5, 0.1)
    assert member.before(first, last) == (member if kept else Member((1, 2), "switch", 7, generation=3, parents=(4,)))


def test_json() -> None:
    for member in (fresh(), fresh().measured(7, 2, 5, 1.5, 0.1)):
        assert Member.from_json(member.to_json()) == member
