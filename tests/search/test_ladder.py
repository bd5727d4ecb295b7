"""Genomes on ladders: the budget holds whatever is done to them."""

from __future__ import annotations

import random
import statistics

import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.spaces.ladder import Gene, Genome, LadderSpace

SPANS = (1, 2, 4, 8, 16, 32, 64)


class Plain(LadderSpace):
    """Nothing but ladders."""

    job = "options"
    spans = (1, 2)

    def spelled(self, genome: Genome) -> list[int]:
        return list(genome)

    shown = spelled

    def words(self, genome: Genome) -> str:
        return str(genome)


def level_gene(name: str, rows: int, columns: int, block: int = 0) -> Gene:
    return Gene(name, tuple(rows * (level * columns // 256) for level in range(256)), block)


def llama(blocks: int = 3, hidden: int = 192, inner: int = 512, kv: int = 64) -> list[Gene]:
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]
    return [level_gene(f"{b}.{at}", *shape, block=b) for b in range(blocks) for at, shape in enumerate(shapes)]


def space(genes: list[Gene], sparsity: float = 0.6) -> LadderSpace:
    return Plain(genes, int(sparsity * sum(gene.removed[-1] for gene in genes)))


@pytest.mark.parametrize("sparsity", [0.05, 0.6, 0.97])
@pytest.mark.parametrize("kv", [64, 192])
def test_every_operator_keeps_the_budget(sparsity: float, kv: int) -> None:
    """Allocation chapter, list 3; the ends of ladders are reached at both extreme sparsities."""
    ladder = space(llama(kv=kv), sparsity)
    rng = random.Random(1)
    current = ladder.nearest([sparsity * gene.removed[-1] for gene in ladder.genes], rng)
    changed = 0
    for _ in range(3000):
        if (made := ladder.switched(current, rng, SPANS)) is None:
            continue
        changed += 1
        assert made != current
        assert abs(ladder.removed(made) - ladder.budget) <= ladder.tolerance
        assert all(0 <= option < len(gene.removed) for gene, option in zip(ladder.genes, made, strict=True))
        current = made
    assert changed > 1500
    assert ladder.tolerance <= min(gene.removed[-1] for gene in ladder.genes) // 256


def test_changes_of_several_children_come_together() -> None:
    ladder = space(llama())
    rng = random.Random(5)
    base = ladder.nearest([0.6 * gene.removed[-1] for gene in ladder.genes], rng)
    apart, overlapping = 0, 0
    for _ in range(400):
        children = [ladder.switched(base, rng, SPANS) for _ in range(3)]
        if None in children:
            continue
        changes = [{at for at, (a, b) in enumerate(zip(child, base, strict=True)) if a != b} for child in children]
        merged = ladder.merged(base, children, rng)
        if sum(map(len, changes)) == len(set().union(*changes)):  # each keeps the budget, and so do all together
            apart += 1
            expected = tuple(
                next((child[at] for child, changed in zip(children, changes, strict=True) if at in changed), option)
                for at, option in enumerate(base)
            )
            assert merged == expected
        elif merged is not None:
            overlapping += 1
            assert merged not in (base, *children)
            assert abs(ladder.removed(merged) - ladder.budget) <= ladder.tolerance
    assert apart > 20
    assert overlapping > 20
    assert ladder.merged(base, [base, base], rng) is None


def test_equal_genes_switch_as_published() -> None:
    """Between equal ladders a switch is one option up and another down by as much: sums of options never change."""
    ladder = Plain([Gene(str(at), (0, 10, 20, 30, 40)) for at in range(8)], 160)
    rng = random.Random(0)
    genome: Genome = (2,) * 8
    seen = set()
    for _ in range(500):
        made = ladder.switched(genome, rng, spans=(1,))
        if made is not None:
            assert sum(made) == 16
            assert 2 <= sum(a != b for a, b in zip(genome, made, strict=True)) <= 6
            seen.add(made)
    assert len(seen) > 100


def test_a_genome_is_named_once() -> None:
    """Options that remove the same weights are one option: 256 levels of a row of 16 are 16 masks."""
    gene = level_gene("narrow", 4, 16)
    assert {gene.nearest(weights) for weights in range(61)} == {
        min(level for level in range(256) if level * 16 // 256 == columns) for columns in range(16)
    }


def test_what_is_asked_for_is_met_nearly() -> None:
    ladder = space(llama())
    rng = random.Random(3)
    wanted = [rng.uniform(0.3, 0.9) * gene.removed[-1] for gene in ladder.genes]
    scale = ladder.budget / sum(wanted)
    wanted = [scale * weights for weights in wanted]
    made = ladder.nearest(wanted, rng)
    for gene, option, weights in zip(ladder.genes, made, wanted, strict=True):
        assert abs(gene.removed[option] - weights) <= gene.removed[-1] / 8


def test_the_same_draws_give_the_same_genome() -> None:
    ladder = space(llama())
    start = ladder.nearest([0.6 * gene.removed[-1] for gene in ladder.genes], random.Random(0))
    made = [ladder.switched(start, random.Random(seed), SPANS) for seed in range(50)]
    assert made == [ladder.switched(start, random.Random(seed), SPANS) for seed in range(50)]
    assert len(set(made)) > 40


def test_budgets_that_cannot_be() -> None:
    with pytest.raises(InvalidInput, match="nothing to allocate"):
        Plain([], 0)
    with pytest.raises(InvalidInput, match="cannot go: the matrices can lose 3,000 in all"):
        Plain([Gene("a", (0, 1000)), Gene("b", (0, 2000))], 3001)
    with pytest.raises(InvalidInput, match="do not add up to"):
        Plain([Gene("a", (0, 1000)), Gene("b", (0, 3000))], 2000).nearest([0, 0], random.Random(0))


def test_dropping_finds_the_best_set_as_fast_as_theory_says() -> None:
    """Allocation chapter, list 11: additive fitness, n = 32, k = 8, lambda = 32, 40 seeds; sorting is the truth."""
    n, k, offspring, generations = 32, 8, 32, []
    for seed in range(40):
        rng = random.Random(seed)
        cost = [rng.random() for _ in range(n)]
        ladder = Plain([Gene(str(at), (0, 1)) for at in range(n)], k)
        best = set(sorted(range(n), key=cost.__getitem__)[:k])
        current = ladder.nearest([k / n] * n, rng)

        def loss(genome: Genome, cost: list[float] = cost) -> float:
            return sum(cost[at] for at, dropped in enumerate(genome) if dropped)

        generation = 0
        while {at for at, dropped in enumerate(current) if dropped} != best:
            children = [made for _ in range(offspring) if (made := ladder.switched(current, rng, (1,))) is not None]
            current = min([current, *children], key=loss)
            generation += 1
            assert generation < 2000
        generations.append(generation)
    theory = k * (n - k) / offspring
    assert statistics.median(generations) <= 4 * theory
    assert statistics.quantiles(generations, n=10)[-1] <= 8 * theory
