"""Mask policies by brute force: the probability of every mask of a few units; a toy loss with planted dead units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from evoprune.search.learners import LEARNERS, Answer, Diagnostics, Learner, Problem, Trial
from evoprune.search.policies import POLICIES, Budget, Floats, Knapsack, Mask, Policy, Strata

N = 10
# For each policy a budget of ten units that it takes; every budget has a pinned unit, and two have several strata.
HALVES = Strata(np.repeat([0, 1], 5), np.array([3, 2]), np.arange(N) == 1)
BUDGETS: dict[str, Budget] = {
    "cp": Strata(np.zeros(N), np.array([5])),
    "pl": Strata(np.zeros(N), np.array([5]), np.arange(N) == 3),
    "maskpro": HALVES,
    "bernoulli": HALVES,
    "pl-knapsack": Knapsack(np.array([3, 1, 2, 1, 5, 2, 1, 4, 2, 1]), 11, np.arange(N) == 2),
}


def policy_of(name: str) -> Policy:
    return POLICIES[name].build(BUDGETS[name])


def codes(masks: Mask) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Masks as numbers, unit i in bit i."""
    return masks @ (1 << np.arange(masks.shape[1]))


def mask_of(code: int, n: int) -> Mask:
    return (code >> np.arange(n) & 1).astype(bool)


def probabilities(name: str, budget: Budget, logits: Floats) -> Floats:
    """[2^n]: probability of each mask, from the definition of the policy."""
    return {"cp": _conditional, "bernoulli": _independent}.get(name, _sequential)(budget, logits)


def _conditional(budget: Budget, logits: Floats) -> Floats:
    assert isinstance(budget, Strata)
    assert len(budget.keep) == 1
    found = np.zeros(2**budget.n)
    for kept in combinations(range(budget.n), int(budget.keep[0])):
        found[sum(1 << i for i in kept)] = np.exp(sum(logits[i] for i in kept))
    return found / found.sum()


def _independent(budget: Budget, logits: Floats) -> Floats:
    assert isinstance(budget, Strata)
    p = np.zeros(budget.n)
    for stratum, keep in enumerate(budget.keep):
        units = (budget.labels == stratum) & ~budget.always
        wanted = keep - budget.always[budget.labels == stratum].sum()
        low, high = -50.0, 50.0
        for _ in range(200):
            middle = (low + high) / 2
            enough = (1 / (1 + np.exp(-logits[units] - middle))).sum() > wanted
            low, high = (low, middle) if enough else (middle, high)
        p[units] = 1 / (1 + np.exp(-logits[units] - low))
    p[budget.always] = 1
    masks = np.stack([mask_of(code, budget.n) for code in range(2**budget.n)])
    return np.where(masks, p, 1 - p).prod(axis=1)


def _sequential(budget: Budget, logits: Floats) -> Floats:
    """One pick after another, each by a softmax over what may still be picked; all strata at once."""
    weights = np.exp(logits)
    begin = 0 if budget.pinned is None else int(codes(budget.pinned[None])[0])
    reached, final = {begin: 1.0}, np.zeros(2**budget.n)
    while reached:
        later: dict[int, float] = {}
        for code, chance in reached.items():
            ready = _ready(budget, mask_of(code, budget.n))
            if not ready:
                final[code] += chance
            total = sum(weights[j] for j in ready)
            for i in ready:
                later[code | 1 << i] = later.get(code | 1 << i, 0.0) + chance * weights[i] / total
        reached = later
    return final


def _ready(budget: Budget, mask: Mask) -> list[int]:
    """Units that may be picked next: of the first stratum that wants one, or those that fit."""
    if isinstance(budget, Knapsack):
        left = budget.budget - budget.costs[mask].sum()
        return [i for i in range(budget.n) if not mask[i] and budget.costs[i] <= left]
    for stratum, keep in enumerate(budget.keep):
        inside = budget.labels == stratum
        if mask[inside].sum() < keep:
            return np.flatnonzero(inside & ~mask).tolist()
    return []


def slopes(function: Callable[[Floats], float], at: Floats, step: float = 1e-5) -> Floats:
    """[n]: central differences."""
    moves = step * np.eye(len(at))
    return np.array([(function(at + move) - function(at - move)) / (2 * step) for move in moves])


def planted(seed: int) -> tuple[Floats, set[int]]:
    """[32] what the loss is greater by without each unit, and the 12 for which that is nothing."""
    rng = np.random.default_rng(seed)
    worth = rng.uniform(0.5, 1.5, 32)
    dead = rng.permutation(32)[:12]
    worth[dead] = 0
    return worth, {int(unit) for unit in dead}


def answers(trials: Sequence[Trial], worth: Floats, rng: np.random.Generator, windows: int = 4) -> list[Answer]:
    """Additive losses with noise of the minibatch, shared by its masks, and of the mask."""
    shared = rng.normal(0, 0.02, windows)
    found = []
    for trial in trials:
        values = trial.mask if trial.values is None else trial.values
        each = ((1 - values) * worth).sum() / 5 + shared + rng.normal(0, 0.004, windows)
        gradient = None if trial.values is None else -worth / 5
        found.append(Answer(float(each.mean()), gradient, [float(loss) for loss in each]))
    return found


def problem(steps: int, seed: int = 0, budget: Budget | None = None) -> Problem:
    """32 units of which 20 are kept, with nothing known of them."""
    budget = budget or Strata(np.zeros(32), np.array([20]))
    return Problem(budget, np.arange(32) // 4, np.zeros(32), np.zeros(32), steps, seed)


def learned(
    name: str, options: Mapping[str, Any], steps: int, seed: int, budget: Budget | None = None
) -> tuple[Learner, int, list[Diagnostics]]:
    """A learner after so many steps; how many of the 12 dead units it removes; what it said."""
    worth, dead = planted(seed)
    learner = LEARNERS[name].build(problem(steps, seed, budget), options)
    rng = np.random.default_rng(seed + 100)
    said = [learner.tell(step, answers(learner.ask(step), worth, rng)) for step in range(steps)]
    return learner, len(dead - set(np.flatnonzero(learner.mode()).tolist())), said
