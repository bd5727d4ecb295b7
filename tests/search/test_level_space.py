"""Levels of matrices, parts that are dropped: the budget holds, and every gene says what it does."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

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
    genome = space.near(space.even(0.5, rng), rng)
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


# Two blocks of a few matrices each: equal heads, grouped ones, and sizes that share no divisor, as with biases.
SMALL = {
    "equal": {"self_attn.q": (16, 16), "self_attn.o": (16, 16), "mlp.up": (16, 16)},
    "grouped": {"self_attn.q": (16, 16), "self_attn.k": (4, 16), "mlp.up": (24, 16), "mlp.down": (16, 24)},
    "odd": {"self_attn.q": (17, 16), "self_attn.k": (5, 16), "mlp.up": (23, 16)},
}
GRID_OF_SIX = (64, 96, 128, 160, 192, 255)


@pytest.mark.parametrize("shapes", SMALL)
@pytest.mark.parametrize(
    "options",
    [{}, {"drop": "parts"}, {"drop": "parts", "only": True}, {"stored": GRID_OF_SIX, "drop": "blocks"}],
)
def test_a_hundred_thousand_random_operators_keep_the_budget(shapes: str, options: dict[str, Any]) -> None:
    """Allocation chapter, list 3: 12 cases of 8,400 calls; switches, drops and crossings of whole families."""
    n_blocks = 8 if options.get("only") else 2
    sites = [
        Site(f"layers.{block}.{kind}", kind, block, n_blocks, *shape)
        for block in range(n_blocks)
        for kind, shape in SMALL[shapes].items()
    ]
    space = LevelSpace(sites, 0.5, **options)
    budget, rng = removed_count(0.5, sum(site.weights for site in sites)), random.Random(shapes)
    steps = [high - low for gene in space.genes for low, high in pairwise(gene.removed) if high > low]
    assert space.tolerance <= (max(steps) if "stored" in options else min(steps)) // 2
    genome = space.near(space.even(0.5, rng), rng)
    base, children, made, merged = genome, [], 0, 0
    for call in range(8400):
        if call % 4 == 3:
            found = space.merged(base, children, rng)
            merged += found is not None
            base, children = genome, []
        else:
            found = space.switched(base, rng, space.spans)
            if found is not None:
                children.append(found)
        if found is not None:
            made += 1
            removed = sum(
                site.out_features * (level * site.in_features // 256)
                for site, level in zip(sites, space.levels(found), strict=True)
            )
            assert abs(removed - budget) <= space.tolerance
            genome = found
    assert made > 4000 and merged > 100, (made, merged)


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
    genome = space.near(space.even(0.4, rng), rng)
    for _ in range(50):
        genome = space.switched(genome, rng, SPANS) or genome
        by_part: dict[tuple[int, str], set[int]] = {}
        for site, level in zip(SITES, space.levels(genome), strict=True):
            by_part.setdefault((site.block, site.kind.partition(".")[0]), set()).add(level)
        assert all(found in ({0}, {256}) for found in by_part.values())


def blocks(count: int) -> list[Site]:
    return [
        Site(f"layers.{block}.{kind}", kind, block, count, *SHAPES[kind]) for block in range(count) for kind in SHAPES
    ]


def gone(space: LevelSpace, asked: list[float]) -> list[int]:
    """Places of the genes that go, whatever the draw."""
    made = {space.near(asked, random.Random(seed)) for seed in range(3)}
    assert len(made) == 1
    return [at for at, option in enumerate(made.pop()) if option]


def test_parts_go_in_the_order_of_what_is_asked_of_them() -> None:
    sites = blocks(16)
    space = LevelSpace(sites, 0.25, drop="blocks", only=True)
    rng = random.Random(5)
    for _ in range(20):
        asked = [rng.uniform(-0.3, 0.6) for _ in range(16)]
        expected = sorted(sorted(range(16), key=lambda block: -asked[block])[:4])
        assert gone(space, [asked[site.block] for site in sites]) == expected
    # Of equals the earlier one, and differences of rounding are none.
    falling = [0.25 + 1e-12 * site.block - 0.1 * (site.block % 2) for site in sites]
    assert gone(space, falling) == [0, 2, 4, 6]
    # 0.28 of 16 blocks is 4.48, and 0.3 is 4.8.
    for sparsity, count in ((0.28, 4), (0.3, 5)):
        assert len(gone(LevelSpace(sites, sparsity, drop="blocks", only=True), falling)) == count
    with pytest.raises(InvalidInput, match="the same is asked of all 16 parts"):
        space.near([0.1 + 0.2] * len(sites), rng)


def test_parts_of_two_sizes_are_exchanged_only_where_the_order_misses_the_budget() -> None:
    sites = blocks(4)
    attention, mlp = 48 * 32 + 16 * 32 + 32 * 48, 80 * 32 + 32 * 80  # 3,584 and 5,120 weights
    weights = 4 * (attention + mlp)

    def asked(order: list[int]) -> list[float]:
        """Of two genes for each block, attention first, the earlier in `order` the more."""
        return [1 - order.index(2 * site.block + site.kind.startswith("mlp")) / 8 for site in sites]

    space = LevelSpace(sites, (2 * mlp + attention) / weights, drop="parts", only=True)
    assert gone(space, asked([5, 2, 1, 0, 3, 4, 6, 7])) == [1, 2, 5]
    # Three attentions are too little, four too much: two MLPs and one attention are the budget exactly.
    assert gone(space, asked([4, 6, 0, 2, 5, 3, 1, 7])) == [3, 4, 5]


def test_chance_treats_parts_of_any_size_alike() -> None:
    space = LevelSpace(blocks(4), 0.5, drop="parts", only=True)
    counts = [0] * 8
    for seed in range(400):
        rng = random.Random(seed)
        for at, option in enumerate(space.near(space.even(0.5, rng), rng)):
            counts[at] += option
    assert min(counts) > 150 and max(counts) < 250


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
