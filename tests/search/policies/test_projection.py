"""Projection and starting values: worked examples, and what must hold for any input."""

from __future__ import annotations

import numpy as np
import pytest

from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.search.policies.projection import project
from evoprune.search.policies.start import MAPPINGS, start_logits, start_probabilities, z_scores

ONE = np.zeros(4, dtype=np.int64)


def test_worked_examples() -> None:
    assert project(np.array([1.3, 0.9, 0.2, -0.1, 0.6]), 2) == pytest.approx([1, 0.65, 0, 0, 0.35], abs=1e-15)
    stepped = np.array([0.499000, 0.700882, 0.900160, 0.700314])
    assert project(stepped, 2.6) == pytest.approx([0.448911, 0.650793, 0.850071, 0.650225], abs=1e-6)


@pytest.mark.parametrize("equality", [False, True])
def test_it_is_the_nearest(equality: bool) -> None:
    """The optimality conditions: one shift for all that lies inside, and none that would help at the edges."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.choice([rng.normal(0.5, 1, 12), rng.integers(-1, 3, 12) / 2])
        total = float(rng.uniform(0, 12))
        found = project(values, total, equality)
        if equality or np.clip(values, 0, 1).sum() > total:
            assert found.sum() == pytest.approx(total, abs=1e-12)
            inside = (found > 0) & (found < 1)
            shifts = (values - found)[inside]
            v = shifts[0] if len(shifts) else None
            assert v is None or shifts == pytest.approx(v, abs=1e-12)
            if v is not None:
                assert (values[found == 0] <= v + 1e-12).all()
                assert (values[found == 1] >= v + 1 - 1e-12).all()
        else:
            assert np.array_equal(found, np.clip(values, 0, 1))


def test_as_many_channels_as_a_model_has() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.3, 352_256)
    found = project(values, 0.7 * 352_256)
    assert abs(found.sum() - 0.7 * 352_256) < 1e-6
    assert np.array_equal(project(found, 0.7 * 352_256 + 1e-6), found)


def test_edges() -> None:
    assert project(np.array([0.2, 0.3]), 1).tolist() == [0.2, 0.3]
    assert project(np.array([0.2, 0.4]), 1, equality=True) == pytest.approx([0.4, 0.6], abs=1e-15)
    assert project(np.array([0.2, 0.2]), 2, equality=True).tolist() == [1, 1]
    assert project(np.array([0.2, 0.2]), 0).tolist() == [0, 0]
    assert project(np.array([5.0, 5.0, 5.0]), 1.5) == pytest.approx([0.5, 0.5, 0.5])
    with pytest.raises(InvalidInput, match="cannot add up to 3"):
        project(np.array([0.2, 0.2]), 3, equality=True)


def test_worked_examples_of_starts() -> None:
    scores = np.array([1.0, 2, 4, 8])
    found = start_probabilities("sigmap", scores, ONE, 0.7, published=True)
    assert found == pytest.approx([0.498505, 0.569372, 0.727229, 1.0], abs=1e-6)
    assert found[3] == 1
    heavy = np.array([0.0, 1, 2, 3, 100])
    clamped = start_probabilities("sigmap", heavy, np.zeros(5, np.int64), 0.9, published=True)
    assert clamped.mean() == pytest.approx(0.845, abs=5e-4)
    # Min-max is [0, 1/7, 3/7, 1], whose mean is 11/28.
    norm = start_probabilities("norm", scores, ONE, 0.4, published=True)
    assert norm == pytest.approx(np.clip(np.array([0, 1 / 7, 3 / 7, 1]) + 0.4 - 11 / 28, 0, 1), abs=1e-12)
    const = start_probabilities("const", scores, ONE, 0.5, published=True)
    assert const == pytest.approx([0.1, 0.1, 0.9, 0.9])


@pytest.mark.parametrize("mapping", sorted(MAPPINGS))
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_means_are_held(mapping: str, rate: float) -> None:
    scores = np.concatenate([[0.0, 1, 2, 3, 100], np.random.default_rng(0).standard_cauchy(20), [7.0]])
    groups = np.repeat([2, 0, 5], [5, 20, 1])
    found = start_probabilities(mapping, scores, groups, rate)
    for group in (0, 2, 5):
        assert found[groups == group].mean() == pytest.approx(rate, abs=1e-12)
    assert ((found >= 0) & (found <= 1)).all()
    logits = start_logits(mapping, scores, groups, rate)
    assert np.abs(logits).max() <= 6 + 1e-9
    if mapping != "random":
        # Higher scores are never less probable.
        order = np.argsort(scores[groups == 0])
        assert (np.diff(found[groups == 0][order]) >= -1e-12).all()
        assert (np.diff(logits[groups == 0][order]) >= -1e-12).all()


def test_z_scores() -> None:
    found = z_scores(np.array([1.0, 3, 5, 4, 7]), np.array([0, 0, 0, 9, 4]))
    assert found == pytest.approx([-1, 0, 1, 0, 0], abs=1e-7)


def test_unknown_mapping() -> None:
    with pytest.raises(UnknownName, match="did you mean 'sigmap'"):
        start_probabilities("sigmp", np.zeros(4), ONE, 0.5)
    with pytest.raises(InvalidInput, match="outside"):
        start_probabilities("sigmap", np.zeros(4), ONE, 1.5)
