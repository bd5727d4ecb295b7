"""Levels of matrices, parts that are dropped: the budget holds, and every gene says what it does."""

from __future__ import annotations

import random

import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site, removed_count
from evoprune.search.spaces.levels import LevelSpace, spread_levels

SPANS = (1, 2, 4, 8, 16, 32, 64)
SHAPES = {
    "self_attn.q": (48, 32),
    "self_attn.k": (16, 32),
    "self_attn.o": (32, 48),
    "mlp.up": (80, 32),
    "mlp.down": (32, 80),
}
SITES = [Site(f"layers.{block}.{kind}", kind, block, 4, *shape) for block in range(4) for kind, shape in SHAPES.items()]


GRID = spread_levels((0.5, 0.5), 16)


def removed_by_hand(levels: list[int]) -> int:
    """Weights that masks at these levels remove: floor(level * in / 256) from every row."""
    return sum(site.out_features * (level * site.in_features // 256) for site, level in zip(SITES, levels, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "block"},
        {"granularity": "kind"},
        {"drop": "parts"},
        {"drop": "blocks"},
        {"drop": "parts", "only": True},
        {"drop": "blocks", "only": True},
        {"stored": GRID},
        {"stored": GRID, "drop": "parts"},
        {"stored": GRID, "granularity": "kind"},
    ],
)
def test_every_operator_keeps_the_budget(options: dict[str, object]) -> None:
    space = LevelSpace(SITES, 0.5, **options)
    rng = random.Random(0)
    genome = space.near([0.5] * len(SITES), rng)
    budget = removed_count(0.5, sum(site.weights for site in SITES))
    seen = set()
    for _ in range(2000):
        levels = space.levels(genome)
        assert "stored" not in options or set(levels) <= {0, *GRID, 256}
        assert removed_by_hand(levels) == space.removed(genome)
        assert abs(space.removed(genome) - budget) <= space.tolerance
        seen.add(genome)
        genome = space.switched(genome, rng, space.spans) or genome
    assert len(seen) > (5 if options.get("only") else 200)


def test_granularity_says_what_shares_a_level() -> None:
    rng = random.Random(0)
    for granularity, shared in (("block", lambda site: site.block), ("kind", lambda site: site.kind)):
        space = LevelSpace(SITES, 0.6, granularity)
        genome = space.near([0.6] * len(SITES), rng)
        for _ in range(50):
            genome = space.switched(genome, rng, SPANS) or genome
        levels: dict[object, set[int]] = {}
        for site, level in zip(SITES, space.levels(genome), strict=True):
            levels.setdefault(shared(site), set()).add(level)
        assert all(len(found) == 1 for found in levels.values())
        assert len({level for found in levels.values() for level in found}) > 1


def test_what_is_dropped_goes_as_a_whole() -> None:
    rng = random.Random(0)
    space = LevelSpace(SITES, 0.4, drop="parts", only=True)
    genome = space.near([0.4] * len(SITES), rng)
    for _ in range(50):
        genome = space.switched(genome, rng, SPANS) or genome
        by_part: dict[tuple[int, str], set[int]] = {}
        for site, level in zip(SITES, space.levels(genome), strict=True):
            by_part.setdefault((site.block, site.kind.partition(".")[0]), set()).add(level)
        assert all(found in ({0}, {256}) for found in by_part.values())


def test_parts_are_dropped_and_come_back_beside_levels() -> None:
    rng = random.Random(1)
    space = LevelSpace(SITES, 0.5, drop="parts")
    genome = space.near([0.5] * len(SITES), rng)
    dropped = set()
    for _ in range(400):
        genome = space.switched(genome, rng, SPANS) or genome
        levels = dict(zip((site.name for site in SITES), space.levels(genome), strict=True))
        dropped.add(all(levels[f"layers.1.{kind}"] == 256 for kind in SHAPES if kind.startswith("self_attn")))
    assert dropped == {True, False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": True}, "say what may be dropped"),
        ({"drop": "parts", "granularity": "block"}, "where matrices have levels of their own"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        LevelSpace(SITES, 0.5, **options)


def test_levels_to_store_by_hand() -> None:
    # From 0.3 to 0.9 in 15 steps of 10.24, so 10; 154 is 0.6.
    assert spread_levels((0.6, 0.6), 16) == (*range(84, 235, 10), 255)
    # From 0.2 to 0.925 in 3 steps of 62; the middle is 0.55.
    assert spread_levels((0.4, 0.7), 4) == (79, 141, 203, 255)


@pytest.mark.parametrize("sparsity", [0.02, 0.05, 0.3, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("count", [4, 8, 16, 128])
def test_uniform_sparsity_is_near_on_every_default_grid(sparsity: float, count: int) -> None:
    stored = spread_levels((sparsity, sparsity), count)
    assert 4 <= len(stored) <= count + 1 and list(stored) == sorted(set(stored))
    assert stored[0] > 0 and stored[-1] == 255
    space = LevelSpace(SITES, sparsity, stored=stored)
    genome = space.near([sparsity] * len(SITES), random.Random(0))
    assert abs(space.removed(genome) - space.budget) <= space.tolerance


def test_sparsities_of_another_model_are_refused() -> None:
    with pytest.raises(InvalidInput, match="3 sparsities for 20 matrices"):
        LevelSpace(SITES, 0.5).near([0.5] * 3, random.Random(0))
