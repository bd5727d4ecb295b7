"""LPViT's curves against the matrix form, and its slopes against the best of all allocations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from evoprune.fitness.allocators.lpvit import STEPS, LPViT, _slopes, equal_slopes

SHARES = np.arange(STEPS + 1) / STEPS


@pytest.mark.parametrize("score", ["taylor", "magnitude"])
def test_the_curve_is_the_quadratic_form_written_out(score: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    curve, blocks = LPViT(2, 2, score=score).curve(weight, gradient)
    assert blocks == 4
    ranked = (weight * gradient if score == "taylor" else weight).abs()
    order = sorted(product(range(2), range(2)), key=lambda at: ranked.view(2, 2, 2, 2)[at[0], :, at[1]].mean())
    form = gradient.flatten().outer(gradient.flatten()) + 1e-7 * torch.eye(16, dtype=torch.float64)
    for gone in range(5):
        change = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
        for row, column in order[:gone]:
            change[row, :, column] = -weight.view(2, 2, 2, 2)[row, :, column]
        flat = change.flatten()
        expected = (flat * gradient.flatten()).square().mean() + 0.5 * flat @ form @ flat
        assert curve[gone * 25] == pytest.approx(expected.item())


def test_blocks_at_the_edges_count_by_their_mean() -> None:
    weight = torch.ones(3, 5)
    weight[2, 4] = 0.5  # a block of one weight, the lowest
    curve, blocks = LPViT(2, 2, score="magnitude").curve(weight, torch.ones(3, 5))
    assert blocks == 6
    assert curve[17] == pytest.approx(0.25 / 15 + 0.5 * (0.25 + 1e-7 * 0.25))


@pytest.mark.parametrize("target", [0.2, 0.5, 0.7])
def test_slopes_give_the_best_of_all_allocations(target: float) -> None:
    """Convex curves over matrices of different size: brute force over sparsities in steps of 5 %."""
    sizes = [100, 200, 400]
    curves = [3 * SHARES**2, 1 * SHARES**3 + 0.1 * SHARES, 2 * np.exp(SHARES)]
    found = equal_slopes(curves, sizes, target)
    share = sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes)
    assert share == pytest.approx(target, abs=1e-3)
    cost = sum(np.interp(s, SHARES, curve) for s, curve in zip(found, curves, strict=True))
    best = min(
        sum(curve[at] for at, curve in zip(places, curves, strict=True))
        for places in product(range(0, STEPS + 1, 5), repeat=3)
        if sum(at * n for at, n in zip(places, sizes, strict=True)) >= target * STEPS * sum(sizes)
    )
    assert cost <= best + 1e-3


def test_derivatives_are_those_of_a_polynomial() -> None:
    np.testing.assert_allclose(_slopes(SHARES**3)[8:-8], 3 * SHARES[8:-8] ** 2, atol=1e-12)


def test_no_matrix_loses_more_than_it_may() -> None:
    found = equal_slopes([1e-6 * SHARES**2, SHARES**2], [100, 100], 0.6, most=0.8)
    assert found[0] == pytest.approx(0.8)
    assert found[1] == pytest.approx(0.4, abs=1e-2)


def test_where_blocks_take_more_power_more_of_them_go() -> None:
    class Two:
        """Two matrices of equal curves: the power of a wide one falls faster."""

        class _Site:
            def __init__(self, out_features: int, in_features: int) -> None:
                self.out_features, self.in_features, self.weights = (
                    out_features,
                    in_features,
                    out_features * in_features,
                )

        sites = (_Site(64, 16), _Site(16, 64))
        target = 0.5

        def weight(self, site: Two._Site) -> torch.Tensor:
            values = torch.rand(1024, generator=torch.Generator().manual_seed(0))
            return values.view(site.out_features, site.in_features)

        def statistic(self, site: Two._Site, name: str) -> torch.Tensor:
            return torch.ones(site.out_features, site.in_features)

    narrow, wide = LPViT(1, 1, power=1).request(Two())  # type: ignore[arg-type]
    assert wide > narrow + 0.05
    narrow, wide = LPViT(1, 1).request(Two())  # type: ignore[arg-type]
    assert wide == pytest.approx(narrow)
