"""Breeders of allocation searches: budgets hold, a restored one goes on as if nothing had been, and good ones learn."""

from __future__ import annotations

import json
import random

import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site
from evoprune.search import breeders
from evoprune.search.breeders import BREEDERS, BreederPlugin, breeder_of
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace
from tests.search.whole_runs import installed_breeders

SITES = [
    Site(f"layers.{block}.{kind}", kind, block, 8, rows, 256)
    for block in range(8)
    for kind, rows in (("self_attn.q_proj", 64), ("mlp.up_proj", 128))
]
INSTALLED = installed_breeders()


@pytest.fixture(scope="module")
def space() -> LevelSpace:
    return LevelSpace(SITES, 0.5)


def uniform(space: LevelSpace) -> Genome:
    return space.near([0.5] * len(SITES), random.Random(0))


def loss(space: LevelSpace, genome: Genome) -> float:
    """Least for attention that is kept at the front and an MLP that is kept at the back."""
    return sum(
        (level / 256 - (0.5 + (0.25 if "attn" in site.kind else -0.125) * (2 * site.depth - 1))) ** 2
        for site, level in zip(SITES, space.levels(genome), strict=True)
    )


@pytest.mark.parametrize("name", INSTALLED)
def test_children_meet_the_budget(name: str, space: LevelSpace) -> None:
    breeder, parent = BREEDERS[name].make(space, 0), uniform(space)
    for generation in range(3):
        children = breeder.children(parent, 6, random.Random(generation))
        assert len(set(children)) == len(children) <= 6
        assert len(children) > 3
        assert parent not in children
        for child in children:
            assert abs(space.removed(child) - space.budget) <= space.tolerance
            breeder.tell(child, loss(space, child))


@pytest.mark.parametrize("name", INSTALLED)
def test_a_restored_breeder_goes_on_as_if_nothing_had_been(name: str, space: LevelSpace) -> None:
    def told(generations: int) -> breeders.Breeder:
        breeder = BREEDERS[name].make(space, 3)
        for generation in range(generations):
            for at, child in enumerate(breeder.children(uniform(space), 6, random.Random(generation))):
                breeder.tell(child, None if at == 2 else loss(space, child))
        return breeder

    expected = told(2).children(uniform(space), 6, random.Random(9))
    restored = BREEDERS[name].make(space, 3)
    restored.restore(json.loads(json.dumps(told(2).state())))
    assert restored.children(uniform(space), 6, random.Random(9)) == expected


# Formulas are told of nothing but shapes here, and have more to learn: see test_formulas.py.
@pytest.mark.parametrize("name", [name for name in INSTALLED if name not in ("random", "formula")])
def test_they_find_more_than_chance_does(name: str, space: LevelSpace) -> None:
    def best(which: str) -> float:
        breeder, parent = BREEDERS[which].make(space, 1), uniform(space)
        for generation in range(7):
            for child in breeder.children(parent, 6, random.Random(generation)):
                breeder.tell(child, loss(space, child))
                parent = min(parent, child, key=lambda genome: loss(space, genome))
        return loss(space, parent)

    assert best(name) < 0.8 * best("random")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, space: LevelSpace) -> None:
    monkeypatch.setitem(BREEDERS._entries, "far", BreederPlugin("", lambda space, seed: None, ("no_such_package",)))
    with pytest.raises(InvalidInput, match=r"needs the package no_such_package: pip install 'evoprune\[samplers\]'"):
        breeder_of("far")
