"""Every registered policy against the definition of its distribution, summed up over all masks of ten units."""

from __future__ import annotations

import numpy as np
import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.policies import POLICIES, Draws, Knapsack, Strata
from evoprune.search.policies.pl import PlackettLuce
from tests.search.masks import BUDGETS, N, codes, policy_of, probabilities, slopes

DRAWS = 100_000


@pytest.fixture(params=sorted(POLICIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(7).normal(0, 1, N)


def test_masks_come_as_often_as_they_should(name: str, logits: np.ndarray) -> None:
    expected = probabilities(name, BUDGETS[name], logits)
    policy = policy_of(name)
    draws = policy.sample(logits, DRAWS, np.random.default_rng(1))
    counts = np.bincount(codes(draws.masks), minlength=2**N)
    assert counts[expected == 0].sum() == 0
    often = expected * DRAWS > 5
    z = (counts - expected * DRAWS)[often] / np.sqrt(DRAWS * expected * (1 - expected))[often]
    assert np.abs(z).max() < 4.5
    scores = policy.score(logits, draws)
    assert np.abs(scores.mean(axis=0)).max() <= 4.5 * (scores.std(axis=0) / DRAWS**0.5).max()
    assert not scores[:, ~policy.budget.open].any()


def test_inclusion(name: str, logits: np.ndarray) -> None:
    expected = probabilities(name, BUDGETS[name], logits)
    exact = ((np.arange(2**N)[:, None] >> np.arange(N) & 1) * expected[:, None]).sum(axis=0)
    found = policy_of(name).inclusion(logits)
    # Plackett-Luce of more than two, and of costs, says that it is approximate.
    assert np.abs(found - exact).max() < {"pl": 0.02, "pl-knapsack": 0.05}.get(name, 1e-9)


def test_scores_are_slopes_of_log_probabilities(name: str, logits: np.ndarray) -> None:
    policy = policy_of(name)
    draws = policy.sample(logits, 20, np.random.default_rng(3))
    scores = policy.score(logits, draws)
    for row in range(20):
        draw = draws.take([row])
        expected = slopes(lambda at, draw=draw: float(policy.log_prob(at, draw)[0]), logits)
        assert scores[row] == pytest.approx(expected, abs=1e-8)


def test_what_a_logit_tells(name: str, logits: np.ndarray) -> None:
    """Natural steps divide by p (1 - p): of plain policies that is the information, but for a shift of all logits."""
    policy = policy_of(name)
    scores = policy.score(logits, policy.sample(logits, 20_000, np.random.default_rng(9)))
    p = policy.inclusion(logits)
    ratio = ((scores**2).mean(axis=0) / np.maximum(p * (1 - p), 1e-12))[policy.budget.open]
    if policy.plain:
        assert ratio.min() > 0.5 and ratio.max() < 1.05
    elif name == "pl":
        assert ratio.max() > 1.3


def test_log_probabilities(name: str, logits: np.ndarray) -> None:
    policy = policy_of(name)
    draws = policy.sample(logits, 3000, np.random.default_rng(4))
    expected = probabilities(name, BUDGETS[name], logits)
    found = np.exp(policy.log_prob(logits, draws))
    if draws.order is None or name == "maskpro":
        assert found == pytest.approx(expected[codes(draws.masks)], rel=1e-10)
    else:
        # Those of all orders of one mask add up to that of the mask.
        code = int(codes(draws.masks)[0])
        same = codes(draws.masks) == code
        orders = {tuple(order): p for order, p in zip(draws.order[same].tolist(), found[same], strict=True)}
        assert 0 < sum(orders.values()) <= expected[code] * (1 + 1e-12)


def test_the_same_masks_from_the_same_numbers(name: str, logits: np.ndarray) -> None:
    policy = policy_of(name)
    sampled = policy.sample(logits, 50, np.random.default_rng(5))
    drawn = policy.draw(logits, np.random.default_rng(5).random((50, N)))
    assert np.array_equal(sampled.masks, drawn.masks)
    # A shift of all logits changes nothing, and the edges of [0, 1] are numbers like others.
    assert np.array_equal(policy.sample(logits + 3, 50, np.random.default_rng(5)).masks, sampled.masks)
    edges = policy.draw(logits, np.stack([np.zeros(N), np.ones(N)]))
    assert np.isfinite(policy.score(logits, edges)).all()


def test_budgets_are_met(name: str, logits: np.ndarray) -> None:
    policy = policy_of(name)
    budget = policy.budget
    draws = policy.sample(logits, 200, np.random.default_rng(6))
    masks = [*draws.masks] if policy.exact else []
    for mask in [*masks, policy.mode(logits), policy.mode(np.zeros(N)), policy.mode(np.full(N, -1e3))]:
        assert budget.pinned is None or mask[budget.pinned].all()
        if isinstance(budget, Strata):
            assert np.array_equal(np.bincount(budget.labels[mask]), budget.keep)
        else:
            left = budget.budget - budget.costs[mask].sum()
            assert 0 <= left < budget.costs[~mask].min()


def test_certain_logits_give_finite_scores(name: str) -> None:
    policy = policy_of(name)
    logits = np.where(np.arange(N) % 2, 1000.0, -1000.0)
    draws = policy.sample(logits, 5, np.random.default_rng(8))
    assert np.isfinite(policy.score(logits, draws)).all()
    assert np.isfinite(policy.inclusion(logits)).all()


def test_all_or_nothing_leaves_nothing_to_learn(name: str) -> None:
    full = Knapsack(np.ones(4), 4) if name == "pl-knapsack" else Strata([0, 0, 1, 1], np.array([2, 0]))
    policy = POLICIES[name].build(full)
    expected = np.ones(4) if name == "pl-knapsack" else np.array([1, 1, 0, 0])
    draws = policy.sample(np.arange(4.0), 3, np.random.default_rng(0))
    assert np.array_equal(draws.masks, np.repeat(expected[None], 3, axis=0))
    assert not policy.score(np.arange(4.0), draws).any()
    assert not policy.log_prob(np.arange(4.0), draws).any()
    assert np.array_equal(policy.inclusion(np.arange(4.0)), expected)


def test_ties_keep_the_lower_unit() -> None:
    assert np.flatnonzero(Strata([1, 0, 1, 0, 1], np.array([1, 2])).best(np.zeros(5))).tolist() == [0, 1, 2]
    assert np.flatnonzero(Knapsack(np.array([3, 2, 2, 1]), 5).best(np.zeros(4))).tolist() == [0, 1]
    # The second does not fit any more, so those after it get their turn.
    assert np.flatnonzero(Knapsack(np.array([4, 2, 2, 1]), 5).best(np.array([9.0, 8, 7, 6]))).tolist() == [0, 3]


def test_what_alone_would_fit_fits_together() -> None:
    budget = Knapsack(np.array([9, 2, 2]), 5)
    assert budget.best(np.zeros(3)).tolist() == [False, True, True]
    assert POLICIES["bernoulli"].build(budget).inclusion(np.zeros(3)).tolist() == [0, 1, 1]


def test_bernoulli_meets_a_budget_of_costs_on_average(logits: np.ndarray) -> None:
    policy = POLICIES["bernoulli"].build(BUDGETS["pl-knapsack"])
    assert isinstance(policy.budget, Knapsack)
    assert (policy.inclusion(logits) * policy.budget.costs).sum() == pytest.approx(11, abs=1e-10)
    draw = policy.sample(logits, 1, np.random.default_rng(0))
    expected = slopes(lambda at: float(policy.log_prob(at, draw)[0]), logits)
    assert policy.score(logits, draw)[0] == pytest.approx(expected, abs=1e-8)


def test_inclusion_of_many_costs() -> None:
    """The approximation for many units against how often they are drawn."""
    rng = np.random.default_rng(0)
    budget = Knapsack(np.r_[np.full(20, 40), np.full(480, 3)], 1200)
    policy, logits = POLICIES["pl-knapsack"].build(budget), rng.normal(0, 1, 500)
    often = policy.sample(logits, 4000, rng).masks.mean(axis=0)
    assert np.abs(policy.inclusion(logits) - often).max() < 0.05


def test_conditional_poisson_of_many_units() -> None:
    rng = np.random.default_rng(0)
    budget = Strata(rng.permutation(np.repeat([0, 1, 2], [300, 300, 100])), np.array([210, 210, 3]))
    policy, logits = POLICIES["cp"].build(budget), rng.normal(0, 2, 700)
    inclusion = policy.inclusion(logits)
    assert np.abs(np.bincount(budget.labels, weights=inclusion) - budget.keep).max() < 1e-9
    draws = policy.sample(logits, 50, rng)
    assert all(np.array_equal(np.bincount(budget.labels[mask]), budget.keep) for mask in draws.masks)


def test_plackett_luce_of_strata_of_one_size_is_that_of_each() -> None:
    rng = np.random.default_rng(2)
    labels = rng.permutation(np.repeat(np.arange(50), 4))
    keep = rng.integers(0, 5, 50)
    logits = rng.normal(0, 2, 200)
    policy = POLICIES["pl"].build(Strata(labels, keep))
    uniforms = rng.random((1, 200))
    draws = policy.draw(logits, uniforms)
    scores, total = policy.score(logits, draws)[0], 0.0
    for stratum in range(50):
        units = np.flatnonzero(labels == stratum)
        alone = POLICIES["pl"].build(Strata(np.zeros(4), keep[[stratum]]))
        drawn = alone.draw(logits[units], uniforms[:, units])
        assert np.array_equal(drawn.masks[0], draws.masks[0, units])
        assert scores[units] == pytest.approx(alone.score(logits[units], drawn)[0], abs=1e-13)
        assert policy.inclusion(logits)[units] == pytest.approx(alone.inclusion(logits[units]), abs=1e-12)
        total += float(alone.log_prob(logits[units], drawn)[0])
    assert policy.log_prob(logits, draws)[0] == pytest.approx(total, rel=1e-12)


def test_plackett_luce_scores_pick_by_pick() -> None:
    """The O(n K) form: one softmax over what is left for each pick."""
    rng = np.random.default_rng(3)
    logits, policy = rng.normal(0, 1.5, 60), PlackettLuce(Strata(np.zeros(60), np.array([40])))
    draws = policy.sample(logits, 4, rng)
    assert draws.order is not None
    for order, scores in zip(draws.order, policy.score(logits, draws), strict=True):
        expected, left = np.zeros(60), np.ones(60, bool)
        for pick in order:
            softmax = np.where(left, np.exp(logits), 0)
            expected += (np.arange(60) == pick) - softmax / softmax.sum()
            left[pick] = False
        assert np.abs(scores - expected).max() < 1e-12


@pytest.mark.slow
def test_plackett_luce_of_700_000_groups() -> None:
    budget = Strata(np.repeat(np.arange(700_000), 4), np.full(700_000, 2))
    policy = POLICIES["pl"].build(budget)
    logits = np.random.default_rng(0).normal(size=budget.n)
    draws = policy.sample(logits, 1, np.random.default_rng(1))
    assert (draws.masks.reshape(-1, 4).sum(axis=1) == 2).all()
    assert np.abs(policy.score(logits, draws).reshape(-1, 4).sum(axis=1)).max() < 1e-12
    assert np.abs(policy.inclusion(logits).reshape(-1, 4).sum(axis=1) - 2).max() < 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Strata([0, 0], np.array([3])), "stratum 0 of 2 units, 0 of them pinned, cannot keep 3"),
        (lambda: Strata([0, 0], np.array([1]), np.array([True, True])), "2 of them pinned, cannot keep 1"),
        (lambda: Strata([0, 2], np.array([1])), "not in 0 .. 0"),
        (lambda: Strata([], np.array([1])), "at least one unit"),
        (lambda: Strata([0, 0], np.array([1]), np.array([True])), "pinned says something of 1 units"),
        (lambda: Knapsack(np.array([0, 2]), 1), "costs less than 1"),
        (lambda: Knapsack(np.array([1, 2]), 1, np.array([False, True])), "pinned units cost 2"),
        (lambda: POLICIES["pl"].build(Knapsack(np.array([1, 2]), 1)), "takes a budget of counts only"),
        (lambda: POLICIES["pl-knapsack"].build(Strata([0, 0], np.array([1]))), "takes a budget of costs only"),
        (lambda: POLICIES["cp"].build(Strata(np.zeros(10_000), np.array([5000]))), "take the policy pl"),
        (lambda: POLICIES["maskpro"].build(Strata(np.zeros(8), np.array([3]))), "take the policy pl"),
    ],
)
def test_what_does_not_fit_is_said(make, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_draws_can_be_taken_apart() -> None:
    draws = Draws(np.eye(3, dtype=bool), np.arange(3)[:, None], np.zeros((3, 3)))
    some = draws.take([2, 0])
    assert some.order is not None
    assert some.order.tolist() == [[2], [0]]
    assert some.masks.tolist() == [[False, False, True], [True, False, False]]
