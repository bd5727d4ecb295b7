"""Every registered estimator against the exact gradient of the expected loss, summed up over all masks of ten units."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.estimators import ESTIMATORS, Estimator, Losses
from evoprune.search.policies import POLICIES, Policy, Strata
from tests.search.masks import BUDGETS, N, codes, policy_of, probabilities, slopes

DRAWS, K, BATCHES = 100_000, 8, 100
LOGITS = np.random.default_rng(7).normal(0, 0.7, N)
# Of each mask, with what single units and pairs of units do.
LOSS = np.random.default_rng(11).normal(1, 0.5, 2**N) - (np.arange(2**N)[:, None] >> np.arange(N) & 1) @ (
    np.random.default_rng(12).uniform(0, 0.5, N)
)
# An estimator with each policy is a long list: the fast tests see each at least once.
PAIRS = [(e, "bernoulli" if ESTIMATORS[e].independent else "pl") for e in ESTIMATORS]
PAIRS += [("loo", p) for p in POLICIES if p != "pl"] + [("antithetic", "cp"), ("antithetic", "pl-knapsack")]
MORE = [
    pytest.param(e, p, marks=pytest.mark.slow)
    for e in ESTIMATORS
    for p in POLICIES
    if (e, p) not in PAIRS and (p == "bernoulli" or not ESTIMATORS[e].independent)
]


@cache
def gradient_of(policy: str) -> np.ndarray:
    return slopes(lambda at: float(probabilities(policy, BUDGETS[policy], at) @ LOSS), LOGITS)


def advantages(estimator: Estimator, values: np.ndarray, mode: float, rng: np.random.Generator) -> np.ndarray:
    """Step after step, each with its own minibatch."""
    found = []
    for part in values.reshape(-1, K):
        shift = rng.normal(0, 0.5)
        losses = Losses(part + shift, mode + shift if estimator.reference else None, rho=0.1)
        found.append(estimator.advantages(losses))
        estimator.update(losses)
    return np.concatenate(found)


def batches(estimator: Estimator, policy: Policy, seed: int = 0) -> np.ndarray:
    """[batches, n]: gradients from equal shares of all draws."""
    rng = np.random.default_rng(seed)
    draws = estimator.draw(policy, LOGITS, DRAWS, rng)
    values = LOSS[codes(draws.masks)]
    each = advantages(estimator, values, float(LOSS[codes(policy.mode(LOGITS)[None])[0]]), rng)
    parts = np.arange(DRAWS).reshape(BATCHES, -1)
    return np.stack([estimator.gradient(policy, LOGITS, draws.take(part), each[part]).whole for part in parts])


@pytest.mark.parametrize(("estimator", "policy"), [*PAIRS, *MORE])
def test_it_is_unbiased(estimator: str, policy: str) -> None:
    made = policy_of(policy)
    found = batches(ESTIMATORS[estimator].build(made), made)
    errors = found.std(axis=0, ddof=1) / BATCHES**0.5
    difference = found.mean(axis=0) - gradient_of(policy)
    assert np.abs(difference).max() < 0.05
    varies = made.budget.open
    # Slopes by differences are known to 1e-9, which counts where a stratum leaves nothing to chance.
    assert np.abs(difference[varies] / (errors[varies] + 1e-9)).max() < 4.5
    assert not difference[~varies].any()


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_a_step_by_hand(name: str) -> None:
    """Means of the halves and of all, from advantages that the test chose."""
    policy = policy_of("bernoulli")
    estimator = ESTIMATORS[name].build(policy)
    draws = estimator.draw(policy, LOGITS, 4, np.random.default_rng(0))
    weights = np.array([1.0, -1.0, 2.0, -2.0])
    found = estimator.gradient(policy, LOGITS, draws, weights)
    assert found.halves is not None
    assert found.whole == pytest.approx(found.halves.mean(axis=0))
    if not ESTIMATORS[name].independent:
        each = weights[:, None] * policy.score(LOGITS, draws)
        assert found.whole == pytest.approx(each.mean(axis=0))
        even = [0, 1] if estimator.block == 2 else [0, 2]
        assert found.halves[0] == pytest.approx(each[even].mean(axis=0))
    alone = estimator.gradient(policy, LOGITS, draws.take(range(estimator.block)), weights[: estimator.block])
    assert alone.halves is None


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_state_comes_back(name: str) -> None:
    policy = policy_of("bernoulli")
    first, second = (ESTIMATORS[name].build(policy) for _ in range(2))
    losses = [Losses(np.random.default_rng(i).normal(size=4), 0.3, 0.01) for i in range(4)]
    for earlier in losses[:3]:
        first.update(earlier)
    second.restore(first.state())
    assert np.array_equal(first.advantages(losses[3]), second.advantages(losses[3]))
    assert first.baseline(losses[3]) == second.baseline(losses[3])


def test_advantages_by_hand() -> None:
    def of(name: str, *steps: Losses) -> list[float]:
        estimator = ESTIMATORS[name].build(policy_of("bernoulli"))
        for step in steps[:-1]:
            estimator.update(step)
        found: list[float] = estimator.advantages(steps[-1]).tolist()
        return found

    first, second = Losses(np.array([1.0, 2, 6]), 1.0), Losses(np.array([4.0, 5, 6]), 2.0)
    assert of("loo", second) == [-1.5, 0, 1.5]
    # Means of steps 3 and 5: the second step is not in its own baseline.
    assert of("moving-average", first, second) == [1, 2, 3]
    assert of("moving-average", first, second, second) == pytest.approx([0.6, 1.6, 2.6])
    assert of("self-critical", second) == [2, 3, 4]
    assert of("residual", first, second) == [0, 1, 2]
    assert of("residual", first, second, second) == pytest.approx([-0.01, 0.99, 1.99])
    assert of("antithetic", Losses(np.array([1.0, 3, 5, 5]))) == [-4, -2, 3, 3]
    assert of("arm", Losses(np.array([1.0, 3, 5, 2]))) == [-2, 2, 3, -3]


@pytest.mark.parametrize(
    ("rho", "as_"), [(None, "loo"), (0.15, "loo"), (0.14, "moving-average"), (0.0, "moving-average")]
)
def test_auto_switches_at_one_over_k_less_one(rho: float | None, as_: str) -> None:
    policy = policy_of("cp")
    losses = Losses(np.random.default_rng(0).normal(size=8), None, rho)
    estimators = [ESTIMATORS[name].build(policy) for name in ("auto", as_)]
    for estimator in estimators:
        estimator.update(Losses(np.array([2.0, 3.0])))
    found = [estimator.advantages(losses).tolist() for estimator in estimators]
    assert found[0] == found[1]


@pytest.mark.parametrize("batch", [0.0, 1.0])
def test_which_baseline_has_less_variance(batch: float) -> None:
    """Leave one out f / (K - 1), a constant as good as a moving average (f + b) / K; f = 1."""
    policy, rng = POLICIES["cp"].build(BUDGETS["cp"]), np.random.default_rng(0)
    logits = np.zeros(N)
    draws = policy.sample(logits, DRAWS // 2, rng)
    noise = rng.normal(0, 1, DRAWS // 2)
    shared = rng.normal(0, batch**0.5, len(noise) // K).repeat(K)
    scores = policy.score(logits, draws)
    leave, fixed = ESTIMATORS["loo"].build(policy), ESTIMATORS["moving-average"].build(policy)
    fixed.restore(0.0)
    values = (noise + shared).reshape(-1, K)
    variances = []
    for estimator in (leave, fixed):
        each = np.concatenate([estimator.advantages(Losses(row)) for row in values])
        steps = (each[:, None] * scores).reshape(-1, K, N).mean(axis=1)
        variances.append(steps.var(axis=0).mean())
    assert variances[1] / variances[0] == pytest.approx((1 + batch) / K * (K - 1), rel=0.06)


@pytest.mark.parametrize("n", [100, 1000])
def test_signal_to_noise(n: int) -> None:
    """E losses of n units that add up give a gradient of cosine 1 / sqrt(1 + n / E)."""
    evaluations, rng = 3000, np.random.default_rng(1)
    worth = rng.normal(0, 1, n)
    estimator = ESTIMATORS["loo"].build(policy := POLICIES["bernoulli"].build(Strata(np.zeros(n), np.array([n // 2]))))
    draws = estimator.draw(policy, np.zeros(n), evaluations, rng)
    losses = Losses(-(draws.masks @ worth))
    found = estimator.gradient(policy, np.zeros(n), draws, estimator.advantages(losses)).whole
    truth = -(worth - worth.mean())
    cosine = found @ truth / np.linalg.norm(found) / np.linalg.norm(truth)
    assert cosine == pytest.approx(1 / np.sqrt(1 + n / evaluations), abs=0.03)


@pytest.mark.parametrize("name", ["arm", "disarm"])
def test_independent_units_are_needed(name: str) -> None:
    with pytest.raises(InvalidInput, match="needs the policy bernoulli"):
        ESTIMATORS[name].build(policy_of("cp"))


def test_disarm_has_less_variance_than_arm() -> None:
    policy = policy_of("bernoulli")
    spreads = {name: batches(ESTIMATORS[name].build(policy), policy, 3).var(axis=0).sum() for name in ("arm", "disarm")}
    assert spreads["disarm"] < spreads["arm"]
