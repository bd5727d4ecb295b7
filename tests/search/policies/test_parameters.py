"""Grouped and free parameters: sums by hand, finite differences, and that freeing changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from evoprune.search.policies import Strata
from evoprune.search.policies.parameters import Free, Grouped, refined

GROUPS = np.array([4, 4, 4, 1, 1, 1, 1, 7])
RNG = np.random.default_rng(0)
PRIOR = RNG.normal(size=8)
BUDGET = Strata(np.zeros(8), np.array([4]))


def grouped(cap: float = 6.0) -> Grouped:
    return Grouped(BUDGET, GROUPS, PRIOR, PRIOR, cap)


def test_gradients_are_sums_over_groups() -> None:
    scores = RNG.normal(size=(2, 8))
    found = grouped().pullback(grouped().start(), scores)
    for row in (0, 1):
        expected = [(scores[row] * PRIOR)[g == GROUPS].sum() for g in (1, 4, 7)]
        expected += [scores[row][g == GROUPS].sum() for g in (1, 4, 7)]
        assert np.abs(found[row] - expected).max() < 1e-10


def test_it_starts_as_close_as_it_can() -> None:
    found = grouped().logits(grouped().start())
    # Only the difference between the groups' centres and the common mean is free: z itself is met exactly.
    assert found - found.mean() == pytest.approx(PRIOR - PRIOR.mean(), abs=1e-12)
    away = Grouped(BUDGET, GROUPS, PRIOR, RNG.normal(size=8))
    best = ((away.logits(away.start()) - away._start + away._start.mean()) ** 2).sum()
    for move in 0.01 * np.eye(6):
        assert ((away.logits(away.start() + move) - away._start + away._start.mean()) ** 2).sum() >= best


def test_push_is_what_a_small_change_does() -> None:
    parameters = grouped(cap=0.8)
    phi, change = parameters.start(), RNG.normal(size=6)
    moved = (parameters.logits(phi + 1e-7 * change) - parameters.logits(phi)) / 1e-7
    assert parameters.push(phi, change) == pytest.approx(moved, abs=1e-6)
    assert (np.abs(parameters.logits(phi)) <= 0.8).all()


def test_the_natural_step_solves_with_the_information_of_the_groups() -> None:
    parameters, curvature = grouped(), RNG.uniform(0.1, 0.3, 8)
    phi = parameters.start()
    jacobian = np.stack([parameters.push(phi, unit) for unit in np.eye(6)], axis=1)
    # A group of one unit has one number to learn, and two parameters: the ridge decides between them.
    gradient = parameters.pullback(phi, RNG.normal(size=8))
    step = parameters.solve(phi, gradient, curvature, 1.0)
    information = jacobian.T @ (curvature[:, None] * jacobian)
    assert information @ step == pytest.approx(gradient, abs=1e-4)
    assert Free(BUDGET, PRIOR).solve(phi, gradient, np.full(6, 4.0), 0.5) == pytest.approx(gradient / 2)


def test_freed_logits_go_on_where_they_are() -> None:
    parameters = grouped()
    phi = parameters.start() + 0.3
    free = refined(BUDGET, parameters, phi)
    before = parameters.logits(phi)
    assert free.logits(free.start()) == pytest.approx(before - before.mean(), abs=1e-12)


def test_logits_stay_within_the_cap_and_centred() -> None:
    free = Free(Strata([0, 0, 1, 1, 1], np.array([1, 2])), np.zeros(5), cap=2.0)
    assert free.settled(np.array([1.0, 2, 30, 0, 0])) == pytest.approx([-0.5, 0.5, 2, -2, -2])
    pinned = Strata(np.zeros(4), np.array([2]), np.array([True, False, False, False]))
    assert Free(pinned, np.zeros(4)).settled(np.array([5.0, 1, 2, 3])) == pytest.approx([5, -1, 0, 1])
