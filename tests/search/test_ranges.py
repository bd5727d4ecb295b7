"""Level vectors between two budgets: nothing leaves the range, and what is asked for is met."""

from __future__ import annotations

import random
from typing import Any

import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.spaces.ranges import RangeSpace
from tests.search.test_level_space import SITES, SPANS, removed_by_hand

WEIGHTS = sum(site.weights for site in SITES)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"granularity": "block"},
    {"granularity": "kind"},
    {"drop": "parts"},
    {"drop": "parts", "only": True},
    {"drop": "blocks", "only": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_no_operator_leaves_the_range_or_stays_at_a_budget(options: dict[str, Any]) -> None:
    space = RangeSpace(SITES, (0.25, 0.75), **options)
    rng = random.Random(0)
    genome = space.near_budget(space.even(0.5, rng), 0.5, rng)
    other, reached = genome, []
    for _ in range(1500):
        made = space.switched(genome, rng, SPANS)
        if made is not None:
            assert made != genome
            other, genome = genome, made
        crossed = space.crossed(genome, other, rng)
        for found in (genome, *([] if crossed is None else [crossed])):
            removed = removed_by_hand(space.levels(found))
            assert removed == space.removed(found) and space.sparsity_of(found) == removed / WEIGHTS
            assert 0.25 * WEIGHTS - space.tolerance <= removed <= 0.75 * WEIGHTS + space.tolerance
            reached.append(removed / WEIGHTS)
    assert max(reached) - min(reached) > 0.2


def test_a_child_of_two_has_every_block_from_one_of_them() -> None:
    space = RangeSpace(SITES, (0.1, 0.9))
    rng = random.Random(3)
    first, second = (space.near_budget([sparsity] * len(SITES), sparsity, rng) for sparsity in (0.3, 0.6))
    seen = set()
    for _ in range(50):
        child = space.crossed(first, second, rng)
        if child is None:
            continue
        blocks = []
        for block in range(4):
            at = [place for place, site in enumerate(SITES) if site.block == block]
            assert [child[place] for place in at] in ([first[place] for place in at], [second[place] for place in at])
            blocks.append([child[place] for place in at] == [first[place] for place in at])
        assert len(set(blocks)) == 2  # neither of its parents
        seen.add(tuple(blocks))
    assert len(seen) > 8


def test_kinds_of_matrices_are_crossed_one_by_one() -> None:
    space = RangeSpace(SITES, (0.1, 0.9), "kind")
    rng = random.Random(3)
    first, second = (space.near_budget([sparsity] * len(SITES), sparsity, rng) for sparsity in (0.3, 0.6))
    children = {space.crossed(first, second, rng) for _ in range(50)} - {None}
    assert len(children) > 8


@pytest.mark.parametrize("options", OPTIONS[:4])
def test_budgets_within_the_range_are_met(options: dict[str, Any]) -> None:
    space = RangeSpace(SITES, (0.25, 0.75), **options)
    for sparsity in (0.25, 0.4, 0.61, 0.75):
        genome = space.near_budget([sparsity] * len(SITES), sparsity, random.Random(0))
        shared = "granularity" in options
        assert abs(space.removed(genome) - sparsity * WEIGHTS) <= (WEIGHTS / 200 if shared else space.tolerance + 1)


def test_a_dropped_part_comes_back_at_the_sparsity_of_the_others() -> None:
    space = RangeSpace(SITES, (0.2, 0.9), drop="parts")
    rng = random.Random(0)
    genome = space.near_budget([0.3] * len(SITES), 0.3, rng)
    part = [at for at, site in enumerate(SITES) if site.block == 1 and "attn" in site.kind]
    dropped = tuple(256 if at in part else option for at, option in enumerate(genome))
    back = set()
    for _ in range(400):
        made = space.switched(dropped, rng, SPANS)
        levels = [] if made is None else [made[at] for at in part]
        if levels and 256 not in levels:
            back.update(levels)
    assert back and max(back) < 0.5 * 256


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(InvalidInput, match="weights cannot go"):
        RangeSpace(SITES, (0.5, 0.9999))
