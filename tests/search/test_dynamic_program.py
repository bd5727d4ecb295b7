"""Least sums of errors, against trying all shapes; and SPDY, where errors of parts say the wrong thing."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from evoprune.fitness.unit_costs import AttentionCost, MlpCost, UnitCosts
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockWidths
from evoprune.search.dynamic_program import Spdy, least_error_genome
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.structure import StructureSpace


def costs(blocks: int) -> UnitCosts:
    return UnitCosts(
        "parameters",
        0,
        (BlockWidths(2, 4, 12),) * blocks,
        (AttentionCost(16, 128, 128),) * blocks,
        (MlpCost(16, 48),) * blocks,
    )


def drawn_errors(space: StructureSpace, rng: random.Random) -> list[list[float]]:
    """Nothing lost is no error, all lost the most; in between not always in the order of the costs."""
    return [
        [0.0, *(removed / gene.removed[-1] * rng.random() for removed in [gene.removed[at] for at in gene.choices[1:]])]
        for gene in space.parts
    ]


@pytest.mark.parametrize("seed", range(8))
def test_the_least_sum_is_what_trying_all_finds(seed: int) -> None:
    """Costs have a common divisor here, so the program is exact; among the same sums within the same slack."""
    rng = random.Random(seed)
    space = StructureSpace(costs(2), rng.uniform(0.2, 0.8), drop="parts", step=4, residual=False)
    errors = drawn_errors(space, rng)
    found = least_error_genome(space, errors, rng)

    def error(genome: Genome) -> float:
        return sum(row[gene.choices.index(at)] for row, gene, at in zip(errors, space.parts, genome, strict=True))

    every = itertools.product(*(gene.choices for gene in space.parts))
    fitting = [genome for genome in every if 0 <= space.removed(genome) - space.budget <= space.tolerance]
    assert found in fitting
    assert error(found) == pytest.approx(min(map(error, fitting)))


def test_what_rungs_miss_goes_to_one_mlp() -> None:
    space = StructureSpace(costs(3), 0.37, step=4)
    rng = random.Random(0)
    genome = least_error_genome(space, drawn_errors(space, rng), rng)
    assert 0 <= space.removed(genome) - space.budget < 48
    assert sum(option not in gene.rungs for gene, option in zip(space.parts, genome, strict=True)) <= 1


def truth(space: StructureSpace, genome: Genome) -> float:
    """Late blocks matter ten times as much, which the errors of parts do not say."""
    shares = [gene.removed[option] / gene.whole for gene, option in zip(space.parts, genome, strict=True)]
    return sum((10 if gene.block >= 4 else 1) * share**2 for gene, share in zip(space.parts, shares, strict=True))


def searched(seed: int, batch: int, rounds: int, interrupt: bool = False) -> tuple[list[Genome], float, float]:
    space = StructureSpace(costs(8), 0.5)
    errors = [[(gene.removed[at] / gene.whole) ** 2 for at in gene.choices] for gene in space.parts]
    spdy = Spdy(space, errors, seed, draws=20)
    seen: list[Genome] = []
    for _ in range(rounds):
        proposed = spdy.propose(batch)
        if interrupt:
            state = json.loads(json.dumps(spdy.state()))
            spdy = Spdy(space, errors, seed, draws=20)
            spdy.restore(state)
        seen += proposed
        spdy.tell([truth(space, genome) for genome in proposed])
    return seen, truth(space, seen[0]), spdy.value


def test_spdy_finds_what_errors_alone_do_not() -> None:
    seen, plain, best = searched(0, 7, 30)
    assert len(set(seen)) == len(seen) > 100
    assert best < 0.8 * plain
    # It goes on getting better after the draws.
    assert best < 0.95 * searched(0, 7, 3)[2]


def test_the_same_seed_gives_the_same_candidates() -> None:
    assert searched(3, 5, 12) == searched(3, 5, 12, interrupt=True)
    assert searched(3, 5, 12)[0] != searched(4, 5, 12)[0]


def test_a_candidate_without_a_value_never_wins() -> None:
    space = StructureSpace(costs(4), 0.5)
    errors = [[(gene.removed[at] / gene.whole) ** 2 for at in gene.choices] for gene in space.parts]
    spdy = Spdy(space, errors, 0)
    first = spdy.propose(2)
    spdy.tell([None, float("nan")])
    assert spdy.best is None
    second = spdy.propose(1)
    spdy.tell([2.5])
    assert (spdy.best, spdy.value) == (second[0], 2.5) and second[0] not in first


def test_what_does_not_fit() -> None:
    space = StructureSpace(costs(2), 0.5)
    errors = [[0.0] * len(gene.choices) for gene in space.parts]
    spdy = Spdy(space, errors, 0)
    proposed = spdy.propose(1)
    with pytest.raises(InvalidInput, match="1 candidates were proposed and have no value"):
        spdy.propose(1)
    with pytest.raises(InvalidInput, match="2 values for 1"):
        spdy.tell([1.0, *[1.0 for _ in proposed]])
    with pytest.raises(InvalidInput, match=r"block 0 attention has 4 choices, but 1 errors"):
        least_error_genome(space, [[0.0], *errors[1:]], random.Random(0))
