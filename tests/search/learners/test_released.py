"""The released algorithm: the worked example, and its mean over all pairs of masks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from evoprune.search.learners import LEARNERS, Answer, Problem
from evoprune.search.learners.released import ReleasedOptions, released_gradient
from evoprune.search.policies import Knapsack, Strata
from evoprune.search.policies.projection import project
from tests.search.masks import mask_of, slopes


def test_a_worked_step() -> None:
    p = np.array([0.5, 0.7, 0.9, 0.7])
    masks = np.array([[1, 0, 1, 1], [0, 1, 1, 1]], dtype=bool)
    gradient, mean = released_gradient(p, masks, np.array([3.0, 2.5]), 2.9, ReleasedOptions())
    assert mean == pytest.approx(2.87)
    assert gradient == pytest.approx([0.5, -0.440800, -0.08, -0.157117], abs=1e-6)
    moved = p - 0.002 * gradient
    assert moved == pytest.approx([0.499000, 0.700882, 0.900160, 0.700314], abs=1e-6)
    assert project(moved, 2.6) == pytest.approx([0.448911, 0.650793, 0.850071, 0.650225], abs=1e-6)


@pytest.mark.parametrize("formula", ["released", "paper"])
def test_the_mean_over_all_pairs_of_masks(formula: str) -> None:
    """1.8 sqrt(p (1 - p)) times the slope of the expected loss; as in the paper 0.9 times the slope, K = 2, T = 5."""
    loss = np.random.default_rng(0).normal(size=16)
    p = np.array([0.2, 0.5, 0.7, 0.9])
    masks = np.stack([mask_of(code, 4) for code in range(16)])

    def chances(at: np.ndarray) -> np.ndarray:
        return np.where(masks, at, 1 - at).prod(axis=1)

    slope = slopes(lambda at: float(chances(at) @ loss), p)
    options, found = ReleasedOptions(formula=formula), np.zeros(4)
    for a, b in product(range(16), repeat=2):
        gradient, _ = released_gradient(p, masks[[a, b]], loss[[a, b]], 0.3, options)
        found += chances(p)[a] * chances(p)[b] * gradient
    ratio = found / (np.sqrt(p * (1 - p)) * slope if formula == "released" else slope)
    assert ratio == pytest.approx(1.8 if formula == "released" else 0.9, rel=1e-5)


def test_the_learner_takes_this_step() -> None:
    prior = np.array([1.0, 2, 4, 8])
    of = Problem(Strata(np.zeros(4), np.array([2])), np.zeros(4), prior, np.zeros(4), 10, 3)
    learner = LEARNERS["released"].build(of, {"rate": 0.05})
    p = learner.probabilities()
    # Clamping takes nothing from these, so that half is kept on average.
    assert p.mean() == pytest.approx(0.5)
    masks = np.stack([trial.mask for trial in learner.ask(0)])
    learner.tell(0, [Answer(1.0), Answer(2.0)])
    gradient, _ = released_gradient(p, masks, np.array([1.0, 2.0]), None, ReleasedOptions())
    assert np.array_equal(learner.probabilities(), project(p - 0.05 * gradient, 2))


def test_a_penalty_on_the_entropy_decides() -> None:
    p = np.array([0.2, 0.8])
    gradient, _ = released_gradient(p, np.array([[1, 0], [0, 1]], bool), np.ones(2), None, ReleasedOptions(penalty=1.0))
    assert gradient == pytest.approx([np.log(4), -np.log(4)], abs=1e-5)


def test_kinds_of_equal_cost_keep_the_same_share() -> None:
    budget = Knapsack(np.r_[np.full(4, 10), np.ones(20, int)], 30)
    of = Problem(budget, np.arange(24) // 4, np.arange(24.0), np.zeros(24), 10, 0)
    learner = LEARNERS["released"].build(of, {"start": "problem"})
    assert learner.probabilities() == pytest.approx(0.5)
    mask = learner.mode()
    assert (mask[:4].sum(), mask[4:].sum()) == (2, 10)
