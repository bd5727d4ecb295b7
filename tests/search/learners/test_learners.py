"""Every registered learner on a loss that adds up, with 12 of 32 units planted dead: it finds them, and goes on."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from evoprune.metrics.errors import EvopruneError, InvalidInput, UnknownName
from evoprune.search.estimators import ESTIMATORS
from evoprune.search.learners import DIAGNOSTICS, LEARNERS, Answer, Problem, configured, generator
from evoprune.search.policies import POLICIES, Budget, Knapsack, Strata
from tests.search.masks import answers, learned, planted, problem

# Options, steps and how many of the 12 dead units are found at least; a plug-in that is not listed is given the last.
FINDS: dict[str, tuple[dict[str, Any], int, int]] = {
    "score-function": ({}, 75, 12),
    "released": ({"rate": 0.1}, 300, 9),
    "pgpe": ({}, 75, 11),
    "cma": ({}, 45, 11),
    "gumbel": ({}, 40, 12),
    "random": ({}, 75, 7),
    "": ({}, 100, 10),
}
EVALUATIONS = 800


@pytest.fixture(params=sorted(LEARNERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_dead_units_are_found(name: str) -> None:
    options, steps, least = FINDS.get(name, FINDS[""])
    for seed in range(3):
        learner, found, said = learned(name, options, steps, seed)
        assert found >= least, seed
        assert sum(step["samples"] + (step["reference"] is not None) for step in said) <= EVALUATIONS
        worth, dead = planted(seed)
        p = learner.probabilities()
        assert p.shape == (32,)
        assert ((p >= 0) & (p <= 1)).all()
        assert p[worth > 0].mean() > p[sorted(dead)].mean() + 0.1


@pytest.mark.parametrize("policy", ["cp", "pl", "bernoulli", "pl-knapsack"])
def test_every_policy_finds_them(policy: str) -> None:
    budget = Knapsack(np.ones(32), 20) if policy == "pl-knapsack" else None
    assert learned("score-function", {"policy": policy, "parameters": "free"}, 75, 1, budget)[1] >= 11


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_every_estimator_finds_them(estimator: str) -> None:
    policy = "bernoulli" if ESTIMATORS[estimator].independent else "pl"
    options = {"policy": policy, "estimator": estimator, "parameters": "free"}
    assert learned("score-function", options, 75, 1)[1] >= 10


@pytest.mark.parametrize("policy", ["maskpro", "pl", "cp"])
def test_two_of_each_four(policy: str) -> None:
    """An N:M pattern: the two units of each group that are worth most."""
    rng = np.random.default_rng(0)
    worth = rng.permuted(np.tile([0.1, 0.3, 1.0, 1.5], (10, 1)), axis=1).reshape(-1)
    budget = Strata(np.repeat(np.arange(10), 4), np.full(10, 2))
    of = Problem(budget, np.zeros(40), np.zeros(40), np.zeros(40), 80, 0)
    learner = LEARNERS["score-function"].build(of, {"policy": policy, "parameters": "free"})
    for step in range(80):
        learner.tell(step, answers(learner.ask(step), worth, rng))
    assert np.array_equal(learner.mode(), worth > 0.5)


def test_costs_count() -> None:
    """Eight dear units are worth hardly more than cheap ones: they go first."""
    costs = np.r_[np.full(8, 6), np.ones(24, int)]
    worth = np.r_[np.full(8, 0.5), np.full(24, 0.4)]
    of = Problem(Knapsack(costs, 30), np.zeros(32), np.zeros(32), np.zeros(32), 80, 0)
    learner, rng = LEARNERS["score-function"].build(of, {"parameters": "free"}), np.random.default_rng(0)
    for step in range(80):
        learner.tell(step, answers(learner.ask(step), worth, rng))
    # 24 cheap ones and one dear one cost 30.
    assert learner.mode()[8:].sum() >= 22


def test_groups_are_learned_before_units() -> None:
    """The prior is right inside groups and says nothing of groups: the offset of each is what has to be learned."""
    worth = np.r_[np.linspace(0, 0.2, 16), np.linspace(0.6, 1, 16)]
    groups = np.repeat([0, 1], 16)
    prior = np.tile(np.linspace(-1.5, 1.5, 16), 2)
    for plan, free in (("grouped", False), ("grouped-then-free", True)):
        of = Problem(Strata(np.zeros(32), np.array([16])), groups, prior, prior, 40, 0)
        learner = LEARNERS["score-function"].build(of, {"parameters": plan})
        rng = np.random.default_rng(0)
        for step in range(40):
            before = learner.probabilities()
            said = learner.tell(step, [Answer(None)] * 8 if step == 19 else answers(learner.ask(step), worth, rng))
            if step == 19:
                # Nothing was learned in this step, at the end of which logits are freed: they stay where they are.
                assert learner.probabilities() == pytest.approx(before, abs=1e-9)
                assert said["kl"] is None
        assert learner.state()["free"] is free
        assert learner.mode()[16:].sum() >= 14


def test_a_restored_learner_goes_on_bit_by_bit(name: str) -> None:
    worth, _ = planted(0)
    first, second = (LEARNERS[name].build(problem(60), {}) for _ in range(2))
    for step in range(25):
        told = answers(first.ask(step), worth, np.random.default_rng(step))
        first.tell(step, told)
        if step == 14:
            first.ask(15)
            second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
        if step > 14:
            asked = [trial.mask.tolist() for trial in second.ask(step)]
            assert asked == [trial.mask.tolist() for trial in second.ask(step)]
            # The one that was restored may be asked by another process than the one that is told.
            third = LEARNERS[name].build(problem(60), {})
            third.restore(json.loads(json.dumps(second.state())))
            said = second.tell(step, told)
            assert said == third.tell(step, told)
            assert second.state() == third.state()
    assert first.state() == second.state()
    assert np.array_equal(first.probabilities(), second.probabilities())


def test_masks_meet_the_budget(name: str) -> None:
    pinned = np.arange(12) == 3
    budgets: list[Budget] = [
        Strata(np.arange(12) // 6, np.array([4, 2]), pinned),
        Knapsack(np.tile([1, 3], 6), 13, pinned),
    ]
    for budget in budgets:
        of = Problem(budget, np.arange(12) % 2, np.arange(12.0) % 5 - 2, np.zeros(12), 3, 5)
        learner = LEARNERS[name].build(of)
        worth = np.arange(12) / 10
        for step in range(3):
            trials = learner.ask(step)
            masks = [trial.mask for trial in trials] if learner.exact else []
            for mask in [*masks, learner.mode()]:
                assert mask[3]
                if isinstance(budget, Strata):
                    assert np.bincount(budget.labels[mask], minlength=2).tolist() == [4, 2]
                else:
                    assert budget.costs[mask].sum() <= 13
            learner.tell(step, answers(trials, worth, np.random.default_rng(step)))


def test_what_it_says(name: str) -> None:
    _, _, said = learned(name, {}, 41, 0)
    for step in said:
        assert list(step) == list(DIAGNOSTICS)
        assert all(value is None or math.isfinite(value) for value in step.values())
    assert said[0]["jaccard"] is None
    assert 0 <= said[-1]["jaccard"] <= 1
    assert said[-1]["rho"] > 0


def test_losses_that_are_not_finite(name: str) -> None:
    worth, _ = planted(0)
    learner = LEARNERS[name].build(problem(40))
    for step in range(20):
        told = answers(learner.ask(step), worth, np.random.default_rng(step))
        before = learner.probabilities()
        # One or all but one of the samples, or one that is told as a number that is none.
        bad = {0: range(1), 1: range(len(told) - 1), 2: range(len(told))}.get(step % 4, [])
        for index in bad:
            told[index] = Answer([None, math.inf, math.nan][index % 3])
        said = learner.tell(step, told)
        assert said["failed"] == len(bad)
        assert np.isfinite(learner.probabilities()).all()
        assert all(value is None or math.isfinite(value) for value in said.values())
        if step % 4 == 2:
            assert np.array_equal(learner.probabilities(), before)
    json.dumps(learner.state(), allow_nan=False)


def test_a_ceiling_takes_the_place_of_what_is_not_finite() -> None:
    learner = LEARNERS["score-function"].build(problem(5), {"ceiling": 7.5})
    said = learner.tell(0, [Answer(1.0), Answer(2.0), *[Answer(None)] * 6])
    assert (said["loss"], said["failed"]) == ((1 + 2 + 6 * 7.5) / 8, 6)
    assert learner.tell(1, [Answer(1.0), *[Answer(None)] * 7])["kl"] is None


def test_a_step_is_no_longer_than_it_may_be() -> None:
    learner = LEARNERS["score-function"].build(problem(5), {"kl": 0.01, "parameters": "free", "rate": 50.0})
    before = learner.probabilities()
    said = learner.tell(0, answers(learner.ask(0), planted(0)[0], np.random.default_rng(0)))
    assert said["kl"] == 0.01
    assert 0 < np.abs(learner.probabilities() - before).max() < 0.1


def test_one_outlier_is_clipped() -> None:
    learner = LEARNERS["score-function"].build(problem(5), {"estimator": "loo"})
    rng = np.random.default_rng(0)
    learner.tell(0, [Answer(float(loss)) for loss in rng.normal(0, 1, 8)])
    assert learner.tell(1, [Answer(1e6), *[Answer(float(loss)) for loss in rng.normal(0, 1, 7)]])["clipped"] == 1


def test_samples_follow_the_agreement_of_halves() -> None:
    noise = np.random.default_rng(0)
    learner = LEARNERS["score-function"].build(problem(60), {"samples": "auto", "parameters": "free"})
    counts = []
    for step in range(60):
        trials = learner.ask(step)
        counts.append(len(trials))
        learner.tell(step, [Answer(float(noise.normal())) for _ in trials])
    assert counts[:20] == [8] * 20
    assert counts[20] == 16
    _, _, said = learned("score-function", {"samples": "auto", "parameters": "free", "rate": 1e-6}, 60, 0)
    assert [said[step]["samples"] for step in (19, 20, 40)] == [8, 4, 4]


@pytest.mark.parametrize("windows", [True, False])
def test_rho_is_the_ratio_of_variances(windows: bool) -> None:
    """Minibatches of four windows of variance 1 each, masks of variance 0.5: 1 / 4 over 0.5 + noise / 4."""
    rng = np.random.default_rng(0)
    learner = LEARNERS["score-function"].build(problem(200), {"rate": 1e-9})
    ratios = []
    for step in range(200):
        shared = rng.normal(0, 1, 4)
        told = []
        for _ in learner.ask(step):
            each = shared + rng.normal(0, 0.5**0.5) + rng.normal(0, 0.1, 4)
            told.append(Answer(float(each.mean()), windows=each.tolist() if windows else None))
        ratios.append(learner.tell(step, told)["rho"])
    assert ratios[0] is None
    assert np.mean(ratios[100:]) == pytest.approx(0.25 / 0.5025, rel=0.25)


def test_what_does_not_fit_is_said() -> None:
    many = Problem(Strata(np.zeros(300), np.array([200])), np.arange(300) // 2, np.zeros(300), np.zeros(300), 10, 0)
    alone = Problem(Knapsack(np.array([1, 2, 2]), 3), np.zeros(3), np.zeros(3), np.zeros(3), 10, 0)
    cases: list[tuple[str, Problem, dict[str, Any], str]] = [
        ("cma", many, {}, "takes up to 200 parameters, and these are 300"),
        ("released", alone, {}, "only one costs 1"),
        ("score-function", many, {"estimator": "arm"}, "needs the policy bernoulli"),
        ("score-function", many, {"estimator": "antithetic", "samples": 6, "policy": "pl-knapsack"}, "costs only"),
        ("score-function", many, {"estimator": "antithetic", "samples": 7}, "a multiple of 2; 7 are asked for"),
        ("score-function", many, {"samples": 1}, "at least 2 samples"),
        ("score-function", many, {"rate": -1.0}, "rate -1 is not above 0"),
        ("score-function", many, {"parameters": "some"}, "there are auto, free, grouped"),
        ("score-function", many, {"rat": 1}, "has no parameter 'rat'"),
        ("pgpe", many, {"samples": 5}, "5 is odd"),
    ]
    for name, of, options, message in cases:
        with pytest.raises(InvalidInput, match=message):
            LEARNERS[name].build(of, options)
    with pytest.raises(UnknownName, match="did you mean 'pl'"):
        LEARNERS["score-function"].build(many, {"policy": "p"})
    for wrong in ({"prior": np.zeros(2)}, {"start": np.array([np.nan] * 3)}, {"steps": 0}):
        with pytest.raises(InvalidInput):
            Problem(**{**vars(alone), **wrong})
    with pytest.raises(EvopruneError, match="without its gradient"):
        LEARNERS["gumbel"].build(many).tell(0, [Answer(1.0)] * 4)
    with pytest.raises(EvopruneError, match="3 answers to 8 masks"):
        LEARNERS["score-function"].build(many).tell(0, [Answer(1.0)] * 3)


def test_options_are_those_of_the_plug_in() -> None:
    plugin = configured("score-function", {"samples": "auto", "rate": "0.25", "ceiling": "auto"})
    learner = plugin.build(problem(10), {"clip": 2})
    options = learner._options  # type: ignore[attr-defined]
    assert (options.samples, options.rate, options.ceiling, options.clip) == (0, 0.25, None, 2.0)


def test_generators_depend_on_their_arguments_alone() -> None:
    assert generator(1, "a", 2).random() == generator(1, "a", 2).random()
    assert len({generator(s, n, t).random() for s in (0, 1) for n in "ab" for t in (0, 1)}) == 8


def test_all_policies_are_tried_here() -> None:
    assert set(POLICIES) == {"cp", "pl", "bernoulli", "pl-knapsack", "maskpro"}


def test_nothing_to_choose(name: str) -> None:
    of = Problem(Strata(np.zeros(6), np.array([6])), np.zeros(6), np.arange(6.0), np.zeros(6), 3, 0)
    learner = LEARNERS[name].build(of)
    trials = learner.ask(0)
    assert all(trial.mask.all() for trial in trials)
    assert learner.tell(0, answers(trials, np.ones(6), np.random.default_rng(0)))["entropy"] is None
    assert learner.mode().all()
    assert learner.probabilities().tolist() == [1.0] * 6
