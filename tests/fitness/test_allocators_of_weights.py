"""Allocators that read shapes, scores or spectra, each against a reference written here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from evoprune.fitness.allocators import ALLOCATORS, configured
from evoprune.fitness.allocators.alpha_pruning import tail_exponent
from evoprune.fitness.allocators.dsa import block_value
from evoprune.fitness.allocators.erdos_renyi import erdos_renyi
from evoprune.fitness.allocators.global_cut import layerwise_adaptive
from evoprune.metrics.allocation import repair
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.global_cut import removed_by_global_cut
from evoprune.metrics.records import Site, removed_count
from tests.fitness.planted_evidence import SHAPES, Planted, mean_sparsity

pytestmark = pytest.mark.usefixtures("one_thread")


# Shapes alone


def water_filled(sites: Sequence[Site], density: float, power: float, dense: Sequence[int]) -> list[float]:
    """min(1, scale * raw) by bisection on the scale: what the recursion over the dense set must arrive at."""
    raw = [((site.out_features + site.in_features) / (site.out_features * site.in_features)) ** power for site in sites]

    def densities(scale: float) -> list[float]:
        return [1.0 if index in dense else min(1.0, scale * value) for index, value in enumerate(raw)]

    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(share * site.weights for share, site in zip(densities(middle), sites, strict=True))
        low, high = (middle, high) if kept < density * sum(site.weights for site in sites) else (low, middle)
    return densities(low)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_erdos_renyi(power: float, density: float) -> None:
    """Allocation chapter, section 8, check 12."""
    sites = Planted(shapes=((64, 64), (2, 8), (128, 64), (16, 16))).sites
    found = erdos_renyi(sites, density, power)
    assert found == pytest.approx(water_filled(sites, density, power, []), abs=1e-9)
    assert mean_sparsity(sites, found) == pytest.approx(density, abs=1e-6)
    assert density == 0.1 or power == 0 or found.count(1.0) > 0  # the dense set was needed
    with_last = erdos_renyi(sites, 0.9, power, [3])
    assert with_last == pytest.approx(water_filled(sites, 0.9, power, [3]), abs=1e-9)


def test_erk_of_three_matrices_by_hand() -> None:
    sites = Planted(n_blocks=1, shapes=((4, 4), (8, 8), (2, 2))).sites
    # Raw densities 1/2, 1/4, 1; 84 weights of which 42 stay. The third is dense at a scale of 42/28 = 1.5, then
    # 38 are left for (1/2) * 16 + (1/4) * 64 = 24.
    assert erdos_renyi(sites, 0.5) == pytest.approx([38 / 48, 38 / 96, 1])


def test_named_matrices_stay_dense() -> None:
    evidence = Planted(target=0.5)
    weights = np.array([site.weights for site in evidence.sites])
    dense = [site.name in ("m.0.0", "m.0.1", "m.0.2", "m.2.1") for site in evidence.sites]
    found = configured("uniform+", {"dense": "m.0.*, m.2.1"}).request(evidence)
    share = 0.5 * weights.sum() / weights[~np.array(dense)].sum()
    assert found == pytest.approx([0 if stays else share for stays in dense])
    repaired = repair(found, evidence.sites, 0.5)
    assert [share for share, stays in zip(repaired, dense, strict=True) if stays] == [0.0] * 4
    assert ALLOCATORS["uniform+"].request(evidence) == ALLOCATORS["uniform"].request(evidence) == [0.5] * 12
    last = ALLOCATORS["erk+"].request(evidence)
    assert last[-1] == 0 and min(last[:-1]) > 0
    assert configured("erk+", {"dense": "m.0.1"}).request(evidence)[1] == 0
    for name, message in (("uniform+", "with 'm.*' dense"), ("erk+", "the matrices that stay dense hold more")):
        with pytest.raises(InvalidInput, match="cannot be reached") as refused:
            configured(name, {"dense": "m.*"}).request(evidence)
        assert message.replace("*", "*") in str(refused.value)
        with pytest.raises(InvalidInput, match=r"no matrix is called 'h\.0\.\*'; one is m\.0\.0"):
            configured(name, {"dense": "m.0.0,h.0.*"}).request(evidence)


# One cut through all scores


def below_the_cut(scores: list[np.ndarray], removed: int) -> list[int]:
    order = np.argsort(np.concatenate([matrix.ravel() for matrix in scores]), kind="stable")[:removed]
    owner = np.repeat(np.arange(len(scores)), [matrix.size for matrix in scores])
    return np.bincount(owner[order], minlength=len(scores)).tolist()


def test_the_cut_is_that_of_a_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(9, 7, generator=generator) * scale for scale in (1, 0.1, 1e-30, 1e30)]
    matrices += [torch.zeros(3, 3), -torch.zeros(2, 2), torch.randint(-2, 3, (8, 8), generator=generator).float()]
    total = sum(matrix.numel() for matrix in matrices)
    for removed in (0, 1, 17, total // 2, total - 1, total):
        found = removed_by_global_cut(lambda: iter(matrices), removed)
        assert found == below_the_cut([matrix.numpy() for matrix in matrices], removed)
    assert sum(removed_by_global_cut(lambda: iter(matrices), total + 5)) == total


def lamp_scores(weight: Tensor) -> np.ndarray:
    """Each weight's square over the sum of all squares that are not smaller, pair by pair."""
    squares = weight.double().numpy().ravel() ** 2
    return np.array([square / squares[squares >= square].sum() for square in squares]).astype(np.float32)


@pytest.mark.parametrize("name", ["global-magnitude", "global-wanda", "lamp"])
@pytest.mark.parametrize("target", [0.3, 0.7, 0.95])
def test_global_cuts(name: str, target: float) -> None:
    evidence = Planted(target=target)
    scores = []
    for site in evidence.sites:
        weight = evidence.weight(site)
        wanda = (weight.abs() * evidence.statistic(site, "X_l2")).numpy()
        scores.append(
            {
                "global-magnitude": weight.abs().numpy(),
                "global-wanda": wanda / np.float32(wanda.mean(dtype=np.float64)),
                "lamp": lamp_scores(weight),
            }[name]
        )
    removed = below_the_cut(scores, removed_count(target, sum(site.weights for site in evidence.sites)))
    requested = ALLOCATORS[name].request(evidence)
    found = [share * site.weights for share, site in zip(requested, evidence.sites, strict=True)]
    assert found == pytest.approx(removed, abs=1)  # a float32 rounding may decide at the cut
    if name == "lamp":
        assert all(count < site.weights for count, site in zip(removed, evidence.sites, strict=True))


def test_lamp_by_hand() -> None:
    weight = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    assert layerwise_adaptive(weight).flatten().tolist() == pytest.approx([4 / 13, 1 / 14, 0, 1])
    assert not layerwise_adaptive(torch.zeros(2, 2)).any()


# Scores of the criterion inside


def test_owl() -> None:
    """Against numpy; check 12: the range is 2 * lambda, the mean of the blocks is the target."""
    evidence = Planted(target=0.6)
    ratios = []
    for block in range(evidence.n_blocks):
        scores = np.concatenate(
            [evidence.scores(site).numpy().ravel() for site in evidence.sites if site.block == block]
        )
        ratios.append((scores > 3 * scores.mean(dtype=np.float64)).mean())
    scaled = (np.array(ratios) - min(ratios)) / (max(ratios) - min(ratios)) * 0.2
    expected = 0.6 - (scaled - scaled.mean())
    requested = configured("owl", {"spread": 0.1, "outlier": 3}).request(evidence)
    assert requested[:: len(SHAPES)] == pytest.approx(expected.tolist())
    assert max(requested) - min(requested) == pytest.approx(0.2)
    assert np.mean(requested) == pytest.approx(0.6)


def test_more_outliers_mean_less_sparsity() -> None:
    """Multimodal allocation chapter, 7.10."""
    flat = torch.ones(8, 12)
    evidence = Planted(shapes=((8, 12),), scores_of={f"m.{block}.0": flat.clone() for block in range(4)})
    assert ALLOCATORS["owl"].request(evidence) == [0.5] * 4
    for outliers in (1, 3, 9):
        evidence.scores_of["m.1.0"].view(-1)[:outliers] = 1000.0
        requested = ALLOCATORS["owl"].request(evidence)
        assert requested[1] == min(requested) < 0.5
    evidence.scores_of["m.3.0"].view(-1)[:12] = 1000.0
    assert ALLOCATORS["owl"].request(evidence)[3] == min(ALLOCATORS["owl"].request(evidence))


def test_dsa() -> None:
    evidence = Planted(target=0.6)
    values = []
    for block in range(evidence.n_blocks):
        scores = np.concatenate(
            [evidence.scores(site).double().numpy().ravel() for site in evidence.sites if site.block == block]
        )
        angle = np.arctan(np.log(np.abs(scores)).var(ddof=1))
        values.append(np.arcsin(angle) if angle <= 1 else np.pi / 2 + angle - 1)
    x = (np.array(values) - min(values)) / (max(values) - min(values))
    keep = 2 * 0.08 * (1 - x)
    expected = 1 - (keep - keep.mean() + 0.4)
    assert ALLOCATORS["dsa"].request(evidence)[:: len(SHAPES)] == pytest.approx(expected.tolist())


def test_the_winner_of_dsa_ranks_large_variances_highest() -> None:
    """Where the published code has a NaN, which it takes for 0: arcsin of more than 1."""
    generator = torch.Generator().manual_seed(0)
    values = [
        block_value((torch.randn(500, generator=generator) * width).exp(), ["abslog"], "var", ["atan", "asin"])
        for width in (0.1, 0.5, 1.0, 2.0, 4.0)
    ]
    assert values == sorted(set(values))
    assert values[0] == pytest.approx(math.asin(math.atan(0.1**2)), rel=0.2)
    assert values[-1] > math.pi / 2


def test_every_step_of_dsa() -> None:
    scores = torch.tensor([0.0, 0.5, 1.0, 2.0])
    x = scores.double().numpy()
    logs = np.log([1, 0.5, 1, 2])
    softmax = np.exp(x) / np.exp(x).sum()
    for pre, reduce, post, expected in (
        (["id"], "mean", ["id"], x.mean()),
        (["square", "exp"], "std", ["log"], np.log(np.exp(x**2).std(ddof=1))),
        (["log"], "l1", ["sin"], np.sin(np.abs(logs).mean())),
        (["standardise"], "var", ["cos"], np.cos(1)),
        (["minmax"], "fro", ["tan"], np.tan(np.sqrt(((x / 2) ** 2).sum()))),
        (["tanh"], "mean", ["acos"], np.arccos(np.tanh(x).mean())),
        (["sigmoid"], "mean", ["softplus"], np.log1p(np.exp((1 / (1 + np.exp(-x))).mean()))),
        (["abs"], "geomean", ["tanh", "exp"], np.exp(np.tanh(np.exp(logs.mean())))),
        ([], "entropy", ["sigmoid", "abs"], 1 / (1 + np.exp((softmax * np.log(softmax)).sum()))),
    ):
        assert block_value(scores, pre, reduce, post) == pytest.approx(expected), (pre, reduce, post)


# Spectra


def reference_exponent(values: np.ndarray, beyond: float) -> float:
    """The fit of the chapter with loops: the start up to 1.5 times the mode whose tail fits best."""
    values = np.sort(values)
    counts, edges = np.histogram(np.log10(values), bins=100)
    bound = beyond * 10 ** edges[counts.argmax()]
    best = (math.inf, 0.0)
    for start in range(len(values) - 1):
        if values[start] > bound and start:
            break
        tail = values[start:]
        alpha = 1 + len(tail) / sum(math.log(value / tail[0]) for value in tail)
        distance = max(
            abs(1 - (value / tail[0]) ** (1 - alpha) - index / len(tail)) for index, value in enumerate(tail)
        )
        best = min(best, (distance, alpha))
    return best[1]


@pytest.mark.parametrize("fit", ["peak", "median"])
@pytest.mark.parametrize("exponent", [2.0, 3.0, 5.0])
def test_the_exponent_of_a_pareto_spectrum(fit: str, exponent: float) -> None:
    """Allocation chapter, section 8, check 12: to 5 %."""
    uniform = (np.arange(1000) + 0.5) / 1000
    spectrum = torch.tensor(0.3 * uniform ** (-1 / (exponent - 1)))
    assert tail_exponent(spectrum, fit) == pytest.approx(exponent, rel=0.05)


def test_the_exponent_is_that_of_loops() -> None:
    for seed in range(3):
        weight = torch.randn(48, 30, generator=torch.Generator().manual_seed(seed)) ** 3
        values = torch.linalg.svdvals(weight).double().square()
        assert tail_exponent(values) == pytest.approx(reference_exponent(values.numpy(), 1.5))
    tail = values.sort().values[14:]
    assert tail_exponent(values, "median") == pytest.approx(1 + 16 / (tail / tail[0]).log().sum().item())
    for degenerate in (torch.ones(5), torch.tensor([1.0, 0.0, 0.0])):
        with pytest.raises(InvalidInput, match="fewer than two different"):
            tail_exponent(degenerate)


def test_alpha_pruning() -> None:
    evidence = Planted(target=0.6, shapes=((24, 30), (12, 40)))
    exponents = []
    for block in range(evidence.n_blocks):
        spectra = [
            np.linalg.svd(evidence.weight(site).numpy(), compute_uv=False)
            for site in evidence.sites
            if site.block == block
        ]
        exponents.append(np.mean([reference_exponent(values.astype(np.float64) ** 2, 1.5) for values in spectra]))
    x = (np.array(exponents) - min(exponents)) / (max(exponents) - min(exponents))
    ratio = 1 - 0.2 + 2 * 0.2 * x
    requested = configured("alpha-pruning", {"spread": 0.2}).request(evidence)
    assert requested[::2] == pytest.approx((ratio * 0.6 * len(ratio) / ratio.sum()).tolist(), rel=1e-3)
    # The published form has no clamp: at 0.8 and 0.3 it asks for more than all of a matrix.
    high = Planted(target=0.8, shapes=((24, 30), (12, 40)))
    assert max(ALLOCATORS["alpha-pruning"].request(high)) > 1
    assert max(repair(ALLOCATORS["alpha-pruning"].request(high), high.sites, 0.8)) < 1
