"""Bits by matrix: the three sensitivities against what they claim to be, and budgets against brute force."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evoprune.fitness.allocating import ModelEvidence
from evoprune.fitness.allocators import ALLOCATORS, BitAllocator, Level, configured
from evoprune.fitness.allocators.dp import least_error
from evoprune.fitness.canonical_correlation import mean_canonical_correlation, part_correlations
from evoprune.fitness.compressors import Goal, at_bits, compress
from evoprune.fitness.input_noise import noise_sizes
from evoprune.fitness.mixed_precision import LEVELS, BitTarget, allocate_bits, least_cost
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import mask_rule, prune_model
from evoprune.fitness.quantisation import Grid, rounding_error
from evoprune.fitness.statistics import Statistics, collect_statistics
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule
from tests.models import random_windows, tiny_language_model

SHARES_OUT = sorted(name for name in ALLOCATORS if isinstance(ALLOCATORS[name], BitAllocator))
DENSE = MaskRule(0.0)


@dataclass(frozen=True)
class Measured:
    model: LanguageModel
    text: Tensor
    statistics: Statistics

    def bits(
        self,
        name: str,
        mean: float,
        rule: MaskRule = DENSE,
        compressor: str = "sparsegpt",
        levels: tuple[int, ...] = LEVELS,
        **parameters: object,
    ) -> Allocation:
        return allocate_bits(
            self.model,
            name,
            configured(name, parameters),
            BitTarget(mean, levels),
            rule,
            compressor=compressor,
            criterion=CRITERIA["wanda"],
            statistics=self.statistics,
            calibration=self.text,
            search=self.text,
        )

    def evidence(self) -> ModelEvidence:
        silent = lambda what, done, total: None  # noqa: E731
        return ModelEvidence(
            self.model, 0.5, CRITERIA["wanda"], self.statistics, self.text, self.text, silent, compressor="sparsegpt"
        )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A model whose matrices matter by very different amounts, on text that it would write itself."""
    language_model = tiny_language_model()
    with torch.no_grad():
        for place, bound in enumerate(language_model.sites):
            bound.weight().mul_(0.4 + 0.15 * (5 * place % 14))
    text = random_windows(4, 1)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(23):
            last = language_model.model(input_ids=text, use_cache=False).logits[:, -1]
            text = torch.cat([text, torch.multinomial((2 * last).softmax(1), 1)], dim=1)
    folder = tmp_path_factory.mktemp("statistics") / "set"
    return Measured(language_model, text, collect_statistics(language_model, text, ["X_l2", "H"], folder=folder))


# Canonical correlations


def test_an_invertible_transform_keeps_all() -> None:
    """Pruning operators, section 12, check 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    transform = torch.randn(6, 6, generator=generator)
    assert mean_canonical_correlation(x, x @ transform + 3, ridge=0, top=6) == pytest.approx(1, abs=1e-9)
    assert mean_canonical_correlation(x, x, ridge=1e-3, top=6) == pytest.approx(1, abs=2e-3)
    assert mean_canonical_correlation(x, torch.ones(300, 2), ridge=1e-3, top=6) == 1


def test_correlations_of_a_second_computation() -> None:
    """Square roots of the eigenvalues of S_xx⁻¹ S_xy S_yy⁻¹ S_yx, in numpy."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 5)) @ generator.normal(size=(5, 5))
    y = np.tanh(x[:, :3]) @ generator.normal(size=(3, 4)) + generator.normal(size=(200, 4))
    s = np.cov(np.hstack([x, y]).T, bias=True)
    xx, yy = (part + 0.01 * np.diag(part).mean() * np.eye(len(part)) for part in (s[:5, :5], s[5:, 5:]))
    squares = np.linalg.eigvals(np.linalg.solve(xx, s[:5, 5:]) @ np.linalg.solve(yy, s[5:, :5])).real
    expected = np.sqrt(np.sort(squares)[::-1][:3].clip(0)).mean()
    found = mean_canonical_correlation(torch.from_numpy(x), torch.from_numpy(y), ridge=0.01, top=3)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0.1 < found < 0.99


def test_matrices_are_linear_and_blocks_are_not(measured: Measured) -> None:
    model, text = measured.model, measured.text
    parts = {bound.site.name: bound.module for bound in model.sites if "down" not in bound.site.name}
    linear = part_correlations(model, parts, text, tokens=1000, ridge=1e-9, top=8)
    assert list(linear.values()) == pytest.approx([1.0] * len(parts), abs=1e-4)
    blocks = {str(index): block for index, (_, block) in enumerate(model.blocks())}
    assert max(part_correlations(model, blocks, text, tokens=1000, ridge=1e-9, top=32).values()) < 0.999
    evidence = measured.evidence()
    by_block = evidence.correlations("block", 64, 1e-3, 4)
    assert by_block[:7] == [by_block[0]] * 7 != by_block[7:]


# Noise


def test_noise_against_gradients_of_autograd(measured: Measured) -> None:
    model, text = measured.model, measured.text
    sites = [model.sites[index] for index in (1, 6, 12)]
    expected = []
    for bound in sites:
        norms, low, high = [], 0.0, 0.0
        for row in text:
            caught: list[Tensor] = []

            def catch(module: object, args: tuple[Tensor], caught: list[Tensor] = caught) -> tuple[Tensor]:
                caught.append(args[0].detach().requires_grad_())
                return (caught[0],)

            handle = bound.module.register_forward_pre_hook(catch)
            logits = model.model(input_ids=row[None], use_cache=False).logits[0]
            functional.cross_entropy(logits[:-1], row[1:]).backward()
            handle.remove()
            assert caught[0].grad is not None
            norms.append(caught[0].grad.norm().item())
            low, high = min(low, caught[0].min().item()), max(high, caught[0].max().item())
        expected.append(math.sqrt(2 / math.pi) * np.mean(norms) * (high - low) / math.sqrt(12))
    assert noise_sizes(model, sites, text) == pytest.approx(expected, rel=1e-4)
    costs = ALLOCATORS["tdmpq"].level_costs(measured.evidence(), measured_levels(measured))  # type: ignore[attr-defined]
    assert costs[1] == pytest.approx([expected[0] / (2**bits - 1) for bits in LEVELS], rel=1e-4)


def measured_levels(measured: Measured, bits: tuple[int, ...] = LEVELS) -> list[list[Level]]:
    return [[Level(own, 0.0) for own in bits] for _ in measured.model.sites]


def test_the_mean_size_of_a_sum_of_noise() -> None:
    draws = np.random.default_rng(0)
    gradient = draws.normal(size=60)
    step = 0.3
    sums = np.abs(draws.uniform(-step / 2, step / 2, size=(20_000, 60)) @ gradient)
    assert sums.mean() == pytest.approx(math.sqrt(2 / math.pi / 12) * step * np.linalg.norm(gradient), rel=0.02)


# Pruning alone


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def test_pruning_alone_ranks_matrices_as_rounding_alone_does(measured: Measured) -> None:
    """Pruning operators, section 12, check 3: Spearman's correlation above 0.6."""
    evidence = measured.evidence()
    pmpq = configured("pmpq")
    found = pmpq.sensitivities(evidence)  # type: ignore[attr-defined]
    rounded = ((site, Grid.of(evidence.weight(site), 3).nearest(evidence.weight(site))) for site in evidence.sites)
    direct = [loss - evidence.dense_loss() for loss in evidence.losses_with(rounded)]
    assert np.corrcoef(ranks(found), ranks(direct))[0, 1] > 0.6


# Budgets


def best_of_all(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    return min(
        sum(row[level] for row, level in zip(costs, levels, strict=True))
        for levels in itertools.product(*(range(len(row)) for row in costs))
        if sum(row[level] for row, level in zip(sizes, levels, strict=True)) <= budget
    )


def totals(costs: list[list[float]], sizes: list[list[int]], levels: list[int]) -> tuple[float, int]:
    cost = sum(row[level] for row, level in zip(costs, levels, strict=True))
    return cost, sum(row[level] for row, level in zip(sizes, levels, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_costs_less(seed: int) -> None:
    """Pruning operators, section 1.4, check 3: four matrices with three levels, in any order."""
    draw = random.Random(seed)
    weights = [draw.choice((2, 3, 5, 8)) for _ in range(4)]
    sizes = [[count * bits for bits in draw.sample((1, 2, 3, 4, 8), 3)] for count in weights]
    costs = [[draw.random() if seed % 2 else 10 / size + draw.random() for size in row] for row in sizes]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in (least, (least + most) // 2, (least + 3 * most) // 4, most, most + 5):
        cost, size = totals(costs, sizes, least_cost(costs, sizes, budget))
        assert size <= budget
        assert cost == pytest.approx(best_of_all(costs, sizes, budget))


def test_rounded_units_keep_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the program is too coarse to be exact, levels are taken and given back one at a time."""
    monkeypatch.setattr("evoprune.fitness.mixed_precision.least_error", lambda *given: least_error(*given, units=5))
    draw = random.Random(0)
    for _ in range(40):
        weights = [draw.randrange(50, 500) for _ in range(5)]
        sizes = [[count * bits for bits in (2, 3, 4, 8)] for count in weights]
        rates = [draw.random() for _ in weights]
        costs = [[rate * 4.0**-bits for bits in (2, 3, 4, 8)] for rate in rates]
        budget = int(draw.uniform(2, 8) * sum(weights))
        levels = least_cost(costs, sizes, budget)
        left = budget - totals(costs, sizes, levels)[1]
        upgrades = [row[level + 1] - row[level] for row, level in zip(sizes, levels, strict=True) if level < 3]
        assert 0 <= left < min(upgrades, default=math.inf)


@pytest.mark.parametrize("name", SHARES_OUT)
def test_the_budget_is_met(name: str, measured: Measured) -> None:
    """Pruning operators, section 12, check 2; the same again, and the model as it was."""
    before = [bound.weight().clone() for bound in measured.model.sites]
    few: dict[str, Any] = {"levels": (2, 3, 8), **({"points": 1} if name == "pmpq" else {})}
    for mean, rule in ((3.5, MaskRule(0.3)), (2.71, MaskRule(None, (2, 4)))):
        found = measured.bits(name, mean, rule, **few)
        kept = found.weights - found.removed
        assert found.bits is not None and found.bits.total == math.floor(mean * kept + 1e-9)
        levels = [site.bits or 0 for site in found.sites]
        assert set(levels) <= {2, 3, 8}
        left = found.bits.total - found.stored_bits
        upgrades = [
            (3 - bits if bits < 3 else 8 - bits) * (site.weights - site.removed)
            for site, bits in zip(found.sites, levels, strict=True)
            if bits < 8
        ]
        assert 0 <= left < min(upgrades)
        assert len(set(levels)) > 1
        assert abs(found.removed - rule.fraction * found.weights) <= 32
    assert measured.bits(name, mean, rule, **few) == found
    for bound, weight in zip(measured.model.sites, before, strict=True):
        assert torch.equal(bound.weight(), weight)


@pytest.mark.parametrize("compressor", ["obq", "sparsegpt", "awp:width=1024,rounded_steps=3"])
def test_matrices_have_the_bits_that_they_were_given(compressor: str, measured: Measured) -> None:
    rule = MaskRule(None, (2, 4))
    allocation = measured.bits("tdmpq", 3.5, rule, compressor)
    copy = tiny_language_model()
    for bound, dense in zip(copy.sites, measured.model.sites, strict=True):
        bound.weight().copy_(dense.weight())
    layers = prune_model(
        copy, CRITERIA["wanda"], rule, statistics=measured.statistics, compressor=compressor, allocation=allocation
    )
    assert [layer.bits for layer in layers] == [site.bits for site in allocation.sites]
    assert {2, 3, 4} <= set(allocation.bits_by_name().values())
    for bound, bits in zip(copy.sites, allocation.bits_by_name().values(), strict=True):
        weight = bound.weight()
        assert bool(((weight != 0).view(len(weight), -1, 4).sum(2) <= 2).all())
        assert max(len(row.unique()) for row in weight) <= 2**bits


def test_errors_of_the_program_are_those_of_the_compressor(measured: Measured) -> None:
    found = ALLOCATORS["dp"].level_costs(measured.evidence(), measured_levels(measured, (2, 16)))  # type: ignore[attr-defined]
    for index in (0, 6, 9):
        site, weight = measured.model.sites[index].site, measured.model.sites[index].weight()
        gram = measured.statistics.tensor(site.name, "H")
        for bits, cost in zip((2, 16), found[index], strict=True):
            new = compress(f"sparsegpt:bits={bits}", weight, Goal(0), {"H": gram}).weight
            lost = weight - new
            expected = torch.trace(lost @ gram @ lost.T) / torch.trace(weight @ gram @ weight.T)
            assert cost == pytest.approx(expected.item(), rel=1e-3, abs=1e-7)


def test_sparsities_beside_bits(measured: Measured) -> None:
    """At as many bits, what may also choose sparsities costs no more than at one sparsity."""
    joint = measured.bits("dp", 3.0, MaskRule(0.5), levels=(2, 4), sparsities="0, 0.5")
    fixed = measured.bits("dp", 3.0, MaskRule(0.5), levels=(2, 4))
    assert joint.bits == fixed.bits
    assert {site.sparsity for site in joint.sites} <= {0, 0.5}
    assert len({(site.sparsity, site.bits) for site in joint.sites}) > 2
    assert joint.sparsity == joint.removed / joint.weights
    joint.check_budget()
    errors = []
    for allocation in (joint, fixed):
        copy = tiny_language_model()
        for bound, dense in zip(copy.sites, measured.model.sites, strict=True):
            bound.weight().copy_(dense.weight())
        layers = prune_model(
            copy,
            CRITERIA["wanda"],
            MaskRule(allocation.sparsity),
            statistics=measured.statistics,
            compressor="sparsegpt",
            allocation=allocation,
        )
        errors.append(math.fsum(layer.error or 0.0 for layer in layers))
    assert errors[0] < errors[1]


def test_errors_may_be_losses(measured: Measured) -> None:
    allocator, levels = configured("dp", {"error": "loss"}), measured_levels(measured, (2, 4, 16))
    found = allocator.level_costs(measured.evidence(), levels)  # type: ignore[attr-defined]
    assert all(row[-1] == pytest.approx(0, abs=1e-5) for row in found)
    assert sum(row[0] for row in found) > 5 * sum(row[1] for row in found) > 0


# Whole weights, and compressors without bits


@pytest.mark.parametrize("compressor", ["obq", "sparsegpt", "awp"])
def test_sixteen_bits_are_whole(compressor: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(5, 12, generator=generator), torch.randn(80, 12, generator=generator)
    given = {"H": rows.T @ rows / 80}
    goal = Goal.of_mask(mask(weight.abs(), MaskRule(0.5)))
    found = compress(at_bits(compressor, 16), weight, goal, given)
    assert max(len(row.unique()) for row in found.weight) > 5
    if compressor == "obq":  # the least squares on the mask, whose solver here is lstsq
        for new, dense, keep in zip(found.weight, weight, goal.mask, strict=True):  # type: ignore[arg-type]
            best = torch.linalg.lstsq(rows[:, keep].double(), (rows @ dense).double()).solution
            assert new[keep].tolist() == pytest.approx(best.tolist(), abs=0.05)
    assert rounding_error(weight, 16) == 0 < rounding_error(weight, 8) < rounding_error(weight, 2) < 1


def test_what_is_refused(measured: Measured) -> None:
    for compressor, bits, message in (
        ("mask", 4, "compressor 'mask' has no bits: give one that has, awp, obq, sparsegpt"),
        ("obq:bits=3", 4, "says how many bits every weight has"),
        ("obq", 9, r"bits 9 is outside \[2, 8\], and not 16"),
    ):
        with pytest.raises(InvalidInput, match=message):
            at_bits(compressor, bits)
    for mean, levels, message in (
        (1.9, None, "a mean of 1.9 bits cannot be reached: the levels are 2, 3, 4, 8, 16"),
        (float("nan"), None, "a mean of nan bits"),
        (3, "2,x", "levels of bits are '2,x': give whole numbers"),
        (3, (3, 3), "levels of bits are 3,3: give each once"),
        (3, "2,12", "bits 12 is outside"),
    ):
        with pytest.raises(InvalidInput, match=message):
            BitTarget.of(mean, levels)
    with pytest.raises(InvalidInput, match=r"3\.5 bits are none of the levels 2, 3, 4, 8, 16"):
        measured.bits("uniform", 3.5)
    assert {site.bits for site in measured.bits("uniform", 3).sites} == {3}
    with pytest.raises(InvalidInput, match="allocator 'owl' shares out no bits; cmpq, dp, pmpq, tdmpq, uniform do"):
        measured.bits("owl", 3)
    with pytest.raises(InvalidInput, match="a pattern fixes the sparsity of every row"):
        measured.bits("dp", 3, MaskRule(None, (2, 4)), sparsities="0,0.5")
    with pytest.raises(InvalidInput, match=r"the budget is [\d,]+ bits, and the fewest that the levels allow are"):
        measured.bits("dp", 2, MaskRule(0.75), sparsities="0,0.25")
    with pytest.raises(InvalidInput, match="sparsities of allocator 'dp' are tried beside bits"):
        configured("dp", {"sparsities": "0,0.5"}).request(measured.evidence())
    with pytest.raises(InvalidInput, match=r"give some such as 0,0\.25,0\.5"):
        configured("dp", {"sparsities": "0,half"})
    allocation = measured.bits("tdmpq", 3)
    rule = mask_rule(CRITERIA["wanda"], None, "2:4", None)
    with pytest.raises(InvalidInput, match="the allocation's bits are for a sparsity of 0 of"):
        prune_model(measured.model, CRITERIA["wanda"], rule, compressor="obq", allocation=allocation)
    with pytest.raises(InvalidInput, match="its matrices have"):
        replace(allocation, bits=replace(allocation.bits, total=10)).check_budget()  # type: ignore[type-var]
