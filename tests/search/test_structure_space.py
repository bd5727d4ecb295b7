"""Shapes of models: the budget holds to a neuron whatever is done, and what a genome says is what it costs."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import pytest

from evoprune.fitness.part_merges import merges_of, read_block
from evoprune.fitness.unit_costs import AttentionCost, CostTable, Kept, MlpCost, UnitCosts
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site
from evoprune.metrics.shape import BlockWidths
from evoprune.search.spaces.structure import StructureSpace, part_sparsities
from evoprune.search.surrogate import Surrogate

BLOCKS = 4
HIDDEN, HEAD = 16, 4


def parameters(groups: int, heads: int, neurons: int, *, biased: bool = False, blocks: int = BLOCKS) -> UnitCosts:
    """Counted as in a gated model with a norm before each part; `biased` adds biases to all matrices."""
    width = BlockWidths(groups, heads, neurons)
    attention = AttentionCost(
        HIDDEN + biased * HIDDEN, 2 * HEAD * HIDDEN + biased * 2 * HEAD, 2 * HEAD * HIDDEN + biased * HEAD
    )
    mlp = MlpCost(HIDDEN + biased * HIDDEN, 3 * HIDDEN + biased * 2)
    return UnitCosts("parameters", 1000, (width,) * blocks, (attention,) * blocks, (mlp,) * blocks)


def cache(groups: int, heads: int, neurons: int) -> UnitCosts:
    width = BlockWidths(groups, heads, neurons)
    return UnitCosts("kv_bytes", 0, (width,) * BLOCKS, (AttentionCost(0, 16, 0),) * BLOCKS, (MlpCost(0, 0),) * BLOCKS)


def times(seed: int = 0) -> UnitCosts:
    """Nanoseconds with noise: what keeps less is not always faster."""
    rng = random.Random(seed)
    width = BlockWidths(4, 8, 64)
    attentions = [
        CostTable(
            tuple(((k, q), 1000 + 700 * k + 400 * k * q + rng.randrange(900)) for k in range(1, 5) for q in (1, 2))
        )
        for _ in range(BLOCKS)
    ]
    mlps = [CostTable(tuple(((n,), 900 + 50 * n + rng.randrange(150)) for n in range(4, 65, 4))) for _ in range(BLOCKS)]
    return UnitCosts("latency", 5000, (width,) * BLOCKS, tuple(attentions), tuple(mlps))


def kept_parameters(shape: list[Kept], *, biased: bool) -> int:
    """By hand: matrices, their biases and norms of what stays."""
    total = 0
    for groups, heads, neurons in shape:
        if groups:
            query, key = groups * heads * HEAD, groups * HEAD
            total += HIDDEN * (2 * query + 2 * key) + HIDDEN + biased * (query + 2 * key + HIDDEN)
        if neurons:
            total += 3 * HIDDEN * neurons + HIDDEN + biased * (2 * neurons + HIDDEN)
    return total


CASES: dict[str, tuple[UnitCosts, dict[str, Any]]] = {
    "mha": (parameters(8, 8, 96), {}),
    "mha, drops": (parameters(8, 8, 96), {"drop": "parts", "heads": "groups"}),
    "gqa": (parameters(4, 16, 96), {}),
    "gqa, drops": (parameters(4, 16, 96), {"drop": "parts"}),
    "gqa, balanced": (parameters(4, 16, 96), {"heads": "balanced"}),
    "gqa, whole attentions": (parameters(4, 16, 96), {"heads": "whole", "drop": "parts", "multiple": 8}),
    "biased": (parameters(4, 16, 97, biased=True), {}),
    "biased, drops": (parameters(4, 8, 97, biased=True), {"drop": "parts", "step": 7}),
    "multiples": (parameters(4, 8, 96), {"multiple": 16, "residual": False}),
    "as servers load": (parameters(4, 8, 96), {"heads": "whole", "drop": "parts", "multiple": 8, "residual": False}),
    "cache": (cache(8, 16, 96), {"heads": "groups"}),
    "cache, drops": (cache(8, 16, 96), {"drop": "parts"}),
    "times": (times(), {"drop": "parts"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hundred_thousand_random_operators_keep_the_budget(case: str) -> None:
    """Allocation chapter, list 3: 13 cases of 8,000 calls; switches, drops, crossings of pairs and of families."""
    costs, options = CASES[case]
    space = StructureSpace(costs, 0.4, **options)
    rng = random.Random(case)
    base = genome = space.near(space.even(), rng)
    children, made, seen = [], 0, set()
    for call in range(8000):
        if call % 5 == 3:
            found = space.merged(base, children, rng)
            base, children = genome, []
        elif call % 5 == 4:
            found = space.crossed(base, genome, rng)
        else:
            found = space.switched(base, rng, space.spans)
            children += [found] if found is not None else []
        if found is None:
            continue
        made += 1
        genome = found
        seen.add(found)
        check(space, found)
    assert made > 4000 and len(seen) > 300, (made, len(seen))


def check(space: StructureSpace, genome: tuple[int, ...]) -> None:
    """The budget, counted anew, the ends of all ladders, and where MLPs stand."""
    costs, shape = space.costs, space.shape(genome)
    removed = costs.dense - costs.of(shape)
    assert removed == space.removed(genome)
    assert space.budget <= removed <= space.budget + space.tolerance
    if costs.quantity == "parameters":
        assert costs.of(shape) == kept_parameters(shape, biased=costs.mlp[0].at(1) > 4 * HIDDEN)
    options = space.to_json()
    step = options["step"] or max(round(costs.widths[0].neurons / 32 / options["multiple"]), 1) * options["multiple"]
    off = 0
    for (groups, heads, neurons), width in zip(shape, costs.widths, strict=True):
        assert 0 <= groups <= width.groups and 0 <= heads <= width.heads_per_group and (groups > 0) == (heads > 0)
        assert options["drop"] == "parts" or (groups and neurons)
        if costs.quantity == "latency":
            continue
        assert neurons == 0 or step <= neurons <= width.neurons
        off += neurons % step != 0 and neurons != width.neurons
        assert options["heads"] in ("balanced", "both") or heads in (0, width.heads_per_group)
        assert options["heads"] in ("groups", "both") or groups in (0, width.groups)
    assert off <= options["residual"]
    merging = space.merging(genome)
    merges_of([(groups > 0, neurons > 0) for groups, _, neurons in shape], merging)  # refuses what cannot be
    assert options.get("merge") or not any(map(any, merging))
    read = [read_block(block) for block in space.spelled(genome)]
    assert ([kept for kept, _ in read], [merged for _, merged in read]) == (shape, merging)


def test_what_is_gone_is_merged_and_no_longer() -> None:
    """Each way by a switch that changes nothing else, and what is merged is dropped to what it may be merged into."""
    costs = parameters(4, 16, 96)
    space = StructureSpace(costs, 0.5, drop="parts", merge=True)
    rng = random.Random(0)
    whole, gone = (4, 4, 96), (0, 0, 0)
    start = space.near_shape([whole, gone, whole, gone], rng)
    assert space.shape(start) == [whole, gone, whole, gone]
    seen = {start}
    for _ in range(3):
        for genome in [*seen]:
            made = (space.switched(genome, rng, space.spans) for _ in range(150))
            seen |= {child for child in made if child and space.shape(child) == space.shape(start)}
    assert len(seen) == 16
    ways = {tuple(space.merging(genome)) for genome in seen}
    assert len(ways) == 16 and all(way[0] == way[2] == (False, False) for way in ways)
    assert {space.merged_as(start, space.merging(genome)) for genome in seen} == seen
    assert space.merged_as(start, [(True, True)] * 4) == space.merged_as(start, [(False, False), (True, True)] * 2)
    assert {gene.merged for gene in StructureSpace(costs, 0.5, drop="parts").parts} == {None}
    for call in range(600):
        genome = (
            space.crossed(start, genome, rng) if call % 5 == 4 else space.switched(genome, rng, space.spans)
        ) or genome
        check(space, genome)
        start = genome if call % 50 == 0 else start


def test_what_a_switch_trades() -> None:
    """Both kinds of part lose and gain, against their own kind mostly; both axes of attentions are walked."""
    space = StructureSpace(parameters(4, 16, 96), 0.4)
    rng = random.Random(1)
    parent = space.near(space.even(), rng)
    mixed, changes = [], []
    before = costs_of_neurons(space, parent)
    for _ in range(2000):
        child = space.switched(parent, rng, (1,))
        if child is not None:
            changes.append(sum(a != b for a, b in zip(parent, child, strict=True)))
            mixed.append(abs(costs_of_neurons(space, child) - before) >= 3 * HIDDEN * 3)
    assert 0.1 < sum(mixed) / len(mixed) < 0.6
    assert sorted(changes)[len(changes) // 2] <= 4
    shapes = {space.shape(child)[0][:2] for _ in range(3000) if (child := space.switched(parent, rng, space.spans))}
    assert len({groups for groups, _ in shapes}) >= 3 and len({heads for _, heads in shapes}) >= 3


def costs_of_neurons(space: StructureSpace, genome: tuple[int, ...]) -> int:
    return sum(3 * HIDDEN * neurons for _, _, neurons in space.shape(genome))


def test_published_trades_are_exact() -> None:
    """Allocation chapter, 5.1: three heads of a Llama 2 are 512 neurons, three query heads of a Llama 3.1 are 256."""
    width = BlockWidths(32, 32, 11008)
    costs = UnitCosts(
        "parameters",
        0,
        (width,) * 2,
        (AttentionCost(4096, 2 * 128 * 4096, 2 * 128 * 4096),) * 2,
        (MlpCost(4096, 3 * 4096),) * 2,
    )
    space = StructureSpace(costs, 0.5)
    rng = random.Random(0)
    genome = space.near_shape([(16, 1, 5504), (16, 1, 5504)], rng)
    assert space.near_shape([(13, 1, 5504 + 512), (16, 1, 5504)], rng) != genome
    assert costs.of([(13, 1, 5504 + 512), (16, 1, 5504)]) == costs.of([(16, 1, 5504), (16, 1, 5504)])


def test_wishes_are_met_nearly() -> None:
    space = StructureSpace(parameters(8, 16, 960), 0.5, step=10)
    rng = random.Random(2)
    wanted = [0.3, 0.5, 0.6, 0.4, 0.5, 0.7, 0.7, 0.4]
    mean = sum(share * gene.whole for share, gene in zip(wanted, space.parts, strict=True)) / space.costs.dense
    wanted = [share - mean + 0.5 for share in wanted]
    genome = space.near(wanted, rng)
    check(space, genome)
    for gene, option, share in zip(space.parts, genome, wanted, strict=True):
        assert abs(gene.removed[option] / gene.whole - share) < 0.15


def test_wishes_for_matrices_are_means_of_parts() -> None:
    shapes = {"self_attn.q_proj": (4, 8), "self_attn.o_proj": (8, 12), "mlp.up_proj": (6, 8), "mlp.down_proj": (8, 6)}
    sites = [Site(f"{block}.{kind}", kind, block, 2, *shape) for block in range(2) for kind, shape in shapes.items()]
    found = part_sparsities(sites, [0.1, 0.5, 0.2, 0.4, 0.0, 1.0, 0.3, 0.3])
    assert found == pytest.approx([(3.2 + 48) / 128, 0.3, 96 / 128, 0.3])


def test_a_surrogate_learns_shapes() -> None:
    """What it is told is linear in what goes, so the cheapest of the new ones is what it names first."""
    space = StructureSpace(parameters(4, 16, 96), 0.4, drop="parts")
    rng = random.Random(0)
    parent = space.near(space.even(), rng)
    surrogate = Surrogate(space)

    def loss(genome: tuple[int, ...]) -> float:
        return math.fsum(at * gene.removed[genome[at]] for at, gene in enumerate(space.parts))

    for _ in range(300):
        if (child := space.switched(parent, rng, space.spans)) is not None:
            surrogate.tell(0, child, loss(child))
    fresh = [child for _ in range(50) if (child := space.switched(parent, rng, space.spans)) is not None]
    assert loss(surrogate.best(fresh, 1)[0]) <= sorted(map(loss, fresh))[2]


def test_shapes_are_read_back() -> None:
    space = StructureSpace(parameters(4, 16, 96, biased=True), 0.37, drop="parts")
    rng = random.Random(3)
    genome = space.near(space.even(), rng)
    for _ in range(200):
        genome = space.switched(genome, rng, space.spans) or genome
        assert space.near_shape(space.shape(genome), random.Random(0)) == genome
    again = StructureSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert [gene.removed for gene in again.parts] == [gene.removed for gene in space.parts]
    assert again.shape(genome) == space.shape(genome) and again.budget == space.budget


def test_a_shape_of_another_budget_is_a_start() -> None:
    space = StructureSpace(parameters(4, 16, 96), 0.6)
    check(space, space.near_shape([(4, 4, 96)] * BLOCKS, random.Random(0)))
    check(space, space.near_shape([(1, 1, 3)] * BLOCKS, random.Random(0)))


@pytest.mark.parametrize(
    ("case", "fraction"),
    [
        *((case, fraction) for case in CASES if "drops" in case for fraction in (0.001, 0.05, 0.9, 0.96)),
        ("mha, drops", 0.99),
        ("gqa, drops", 0.99),
        ("times", 0.05),
        ("times", 0.9),
    ],
)
def test_ends_of_the_range(case: str, fraction: float) -> None:
    costs, options = CASES[case]
    space = StructureSpace(costs, fraction, **options)
    rng = random.Random(0)
    genome = space.near(space.even(), rng)
    for _ in range(100):
        genome = space.switched(genome, rng, space.spans) or genome
        check(space, genome)


def test_no_option_that_nobody_would_want() -> None:
    """A cache is as large with fewer query heads, and what is slower with less is not worth it."""
    space = StructureSpace(cache(8, 16, 96), 0.5)
    assert {gene.kept for gene in space.parts} == {tuple((groups, 2) for groups in range(8, 0, -1))}
    costs = times()
    for gene in StructureSpace(costs, 0.4).parts:
        pairs = [(kept, removed) for kept, removed in zip(gene.kept, gene.removed, strict=True)]
        for kept, removed in pairs:
            for other, cheaper in pairs:
                larger = all(more >= less for more, less in zip(other, kept, strict=True))
                assert other == kept or not larger or cheaper < removed


def test_the_same_draws_give_the_same_genome() -> None:
    space = StructureSpace(parameters(4, 16, 96), 0.4, drop="parts")
    start = space.near(space.even(), random.Random(0))
    made = [space.switched(start, random.Random(seed), space.spans) for seed in range(50)]
    again = StructureSpace(parameters(4, 16, 96), 0.4, drop="parts")
    assert made == [again.switched(start, random.Random(seed), again.spans) for seed in range(50)]


@pytest.mark.parametrize(
    ("costs", "fraction", "options", "told"),
    [
        (parameters(4, 16, 96), 1.0, {}, r"outside \(0, 1\)"),
        (parameters(4, 16, 96), 0.99, {}, r"makes up 0.9"),
        (parameters(4, 16, 96), 0.7, {"heads": "whole"}, "makes up 0.62"),
        (parameters(8, 8, 96), 0.4, {"heads": "balanced"}, "has one query head"),
        (cache(4, 16, 96), 0.4, {"heads": "balanced"}, "bytes of keys and values: let KV groups go"),
        (cache(4, 16, 96), 0.4, {"heads": "whole"}, "let KV groups go"),
        (parameters(4, 16, 96), 0.4, {"multiple": 256}, "multiples of 256: give 1 to 48"),
        (parameters(4, 16, 96), 0.4, {"multiple": 8, "step": 12}, "steps of 12 neurons: give a multiple of 8"),
        (parameters(4, 16, 96), 0.4, {"step": 49}, "of at most 48"),
        (parameters(4, 16, 96), 0.4, {"merge": True}, "nothing goes as a whole that could be merged"),
    ],
)
def test_budgets_and_options_that_cannot_be(
    costs: UnitCosts, fraction: float, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidInput, match=told):
        StructureSpace(costs, fraction, **options)


@pytest.mark.parametrize("fraction", [0.99, 0.995])
def test_a_budget_between_all_shapes_says_which_is_near(fraction: float) -> None:
    """The least that a part can keep costs more than a hundredth here, so all has to go: which is no model."""
    costs, options = CASES["biased, drops"]
    space = StructureSpace(costs, fraction, **options)
    with pytest.raises(InvalidInput, match=r"no shape was found .* such as 0.9884"):
        space.near(space.even(), random.Random(0))
    again = StructureSpace(costs, 0.9884, **options)
    assert again.removed(again.near(again.even(), random.Random(0))) >= again.budget
    assert 1 - parameters(4, 8, 97, biased=True).attention[0].at(1, 1) / costs.dense == pytest.approx(0.9885, abs=1e-4)


def test_wishes_and_shapes_of_another_model() -> None:
    space = StructureSpace(parameters(4, 16, 96), 0.4)
    with pytest.raises(InvalidInput, match="7 sparsities for 8 parts"):
        space.near([0.4] * 7, random.Random(0))
    with pytest.raises(InvalidInput, match="3 blocks for a model of 4"):
        space.near_shape([(1, 1, 1)] * 3, random.Random(0))


def test_coarse_budgets_are_met_wherever_some_sum_of_steps_meets_them() -> None:
    """Against all shapes that there are."""
    costs = parameters(4, 8, 96, blocks=3)
    options: dict[str, Any] = {"heads": "whole", "drop": "parts", "multiple": 48, "residual": False}
    genes = StructureSpace(costs, 0.5, **options).parts
    sums = {sum(gone) for gone in itertools.product(*([gene.removed[at] for at in gene.choices] for gene in genes))}
    for fraction in (at / 100 for at in range(2, 98, 3)):
        space = StructureSpace(costs, fraction, **options)
        assert any(space.budget <= total <= space.budget + space.tolerance for total in sums)
        genome = space.near(space.even(), random.Random(0))
        assert space.budget <= space.removed(genome) <= space.budget + space.tolerance
