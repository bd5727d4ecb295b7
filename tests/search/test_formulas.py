"""The space of allocation formulas and the breeder on it: total, exact, and able to find a formula again."""

from __future__ import annotations

import random

import pytest

from evoprune.metrics.allocation_formula import AllocationFormula
from evoprune.metrics.expression import parse
from evoprune.metrics.formula_library import FORMULAS
from evoprune.metrics.formula_rule import requested_sparsities
from evoprune.metrics.records import Site
from evoprune.metrics.site_terminals import SITE_TERMINALS, structure
from evoprune.search.breeders import BREEDERS
from evoprune.search.breeders.formula import Formulas
from evoprune.search.spaces.formulas import FormulaSpace
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace

SITES = [
    Site(f"layers.{block}.{kind}", kind, block, 6, rows, columns)
    for block in range(6)
    for kind, rows, columns in (("self_attn.q_proj", 64, 256), ("mlp.up_proj", 128, 256), ("mlp.down_proj", 64, 512))
]


def statistics() -> dict[str, list[float]]:
    """Of a model that nobody has: every terminal has numbers, block by block where it should."""
    rng, found = random.Random(8), structure(SITES)
    for name in SITE_TERMINALS:
        if name not in found:
            of_block = [rng.uniform(0.1, 2) for _ in range(6)]
            shared = name.endswith("_block") or name in ("influence", "ablation")
            found[name] = [of_block[site.block] if shared else rng.uniform(0.1, 2) for site in SITES]
    return found


@pytest.fixture(scope="module")
def levels() -> LevelSpace:
    return LevelSpace(SITES, 0.6)


def test_births_are_of_the_language_and_keep_what_they_mean() -> None:
    """Thousands of changes: what is born asks for what was bred, to the three digits that its constants keep."""
    space, rng, known = FormulaSpace(SITE_TERMINALS), random.Random(0), statistics()
    state = random.getstate()
    parents, births, alike = [entry.formula for entry in FORMULAS.values()], 0, 0
    for _ in range(1500):
        first, second = rng.choice(parents), rng.choice(parents)
        if rng.random() < 0.3:
            bred, _ = space.crossover(first, second, rng)
        elif rng.random() < 0.1:
            bred = space.sample(rng)
        else:
            bred, _ = space.mutate(first, rng)
        born = space.born(bred)
        if born is None:
            continue
        births += 1
        assert born.expression.size <= 25 and born.expression.height <= 8 and born.expression.terminals
        assert parse(born.expression.text, SITE_TERMINALS) == born.expression
        assert 0.01 <= born.spread <= 0.6
        pairs = (requested_sparsities(formula.scores(known), formula.spread, 0.6) for formula in (bred, born))
        alike += max(abs(a - b) for a, b in zip(*pairs, strict=True)) < 0.01
        parents[rng.randrange(len(parents))] = born
    assert random.getstate() == state  # DEAP's generator is put back
    assert births > 1200
    # The normal form takes logs and roots of real numbers, where a guard may bind: seldom.
    assert alike > 0.97 * births


@pytest.mark.parametrize(
    ("bred", "born"),
    [
        ("zsn_t(mul(2,add(position,3)))", "position"),
        ("sub(1,mul(0.12345678,position))", "neg(position)"),
        ("mul(-2,sub(first,last))", "sub(last,first)"),
        ("mms_t(neg(neg(error)))", "error"),
        ("add(position,mul(0.333333333,first))", "add(position,mul(0.333,first))"),
    ],
)
def test_what_standardising_undoes_is_left_out(bred: str, born: str) -> None:
    found = FormulaSpace(SITE_TERMINALS).born(AllocationFormula.from_text(bred, 0.2))
    assert found is not None
    known = statistics()
    expected = AllocationFormula.from_text(born, 0.2)
    assert found.expression.size <= expected.expression.size + 1
    ours, theirs = (requested_sparsities(formula.scores(known), 0.2, 0.6) for formula in (found, expected))
    assert ours == pytest.approx(theirs, abs=2e-4)


def test_a_formula_without_a_statistic_is_not_born() -> None:
    assert FormulaSpace(SITE_TERMINALS).born(AllocationFormula.from_text("sub(position,position)", 0.2)) is None


def test_the_published_ones_come_first_and_only_those_that_can_be_read(levels: LevelSpace) -> None:
    known = statistics()
    parent = tuple([0] * len(SITES))
    for given in (known, {"position": known["position"], "first": known["first"]}):
        breeder = Formulas(levels, 0, given)
        children = breeder.children(parent, 40, random.Random(0))
        hows = [breeder.note(child)["formula"]["how"] for child in children]
        readable = [name for name, entry in FORMULAS.items() if set(entry.formula.reads) <= given.keys()]
        published = [how for how in hows if how.startswith("published")]
        assert published == hows[: len(published)]
        assert published == [f"published:{name}" for name in readable]
        for child in children:
            reads = AllocationFormula.from_text(breeder.note(child)["formula"]["expression"], 0.1).reads
            assert set(reads) <= given.keys()


def test_formulas_of_equal_levels_are_one_candidate_and_the_shortest_stands_for_them(levels: LevelSpace) -> None:
    breeder = Formulas(levels, 0, statistics())
    long = AllocationFormula.from_text("add(position,mul(first,last))", 0.2)
    short = AllocationFormula.from_text("position", 0.2)
    breeder._queue.clear()
    breeder._queue.extend([("long", long), ("short", short)])
    parent = tuple([0] * len(SITES))
    (child, *_) = breeder.children(parent, 1, random.Random(0))
    breeder.tell(child, 1.0)
    later = breeder.children(parent, 4, random.Random(1))
    assert child not in later
    assert breeder.note(child)["formula"] == {"expression": "position", "spread": 0.2, "how": "short"}


def planted(levels: LevelSpace, hidden: AllocationFormula) -> Genome:
    return tuple(hidden.levels(statistics(), [(s.out_features, s.in_features) for s in SITES], levels.sparsity))


@pytest.mark.parametrize(
    ("text", "spread"),
    [("neg(tail)", 0.12), ("sub(influence,mul(0.5,position))", 0.25), ("add(zsn_t(error),mul(0.7,zsn_t(first)))", 0.3)],
)
def test_a_planted_formula_is_found_again(text: str, spread: float, levels: LevelSpace) -> None:
    """Fitness is the distance to the levels that a hidden formula asks for; a hundredth of a row is near enough."""
    goal = planted(levels, AllocationFormula.from_text(text, spread))

    def distance(genome: Genome) -> float:
        return sum(abs(a - b) for a, b in zip(genome, goal, strict=True)) / len(goal) / 256

    breeder, parent, best = Formulas(levels, 0, statistics()), tuple([0] * len(SITES)), 1.0
    for generation in range(60):
        for child in breeder.children(parent, 24, random.Random(generation)):
            breeder.tell(child, distance(child))
            best = min(best, distance(child))
        if best < 0.01:
            break
    assert best < 0.01
    (first, *_) = breeder.finalists()
    assert distance(first) == best


def test_a_candidate_without_a_fitness_is_no_parent_and_no_finalist(levels: LevelSpace) -> None:
    breeder, parent = Formulas(levels, 0, statistics()), tuple([0] * len(SITES))
    children = breeder.children(parent, 8, random.Random(0))
    for at, child in enumerate(children):
        breeder.tell(child, None if at % 2 else 1.0 + at)
    assert list(breeder.finalists()) == [children[0], children[2], children[4], children[6]]
    assert set(breeder.finalists().values()) == {1}
    breeder.tell(parent, 0.0)  # of somebody else's making
    assert parent not in breeder.finalists() and breeder.note(parent) == {}


def test_it_may_read_what_the_registry_says() -> None:
    assert set(BREEDERS["formula"].reads) == set(SITE_TERMINALS)
