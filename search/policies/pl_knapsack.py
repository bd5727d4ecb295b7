"""Plackett-Luce for unequal costs: each pick by a softmax over what still fits."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from evoprune.search.policies import (
    POLICIES,
    Draws,
    Floats,
    Ints,
    Knapsack,
    Mask,
    PolicyPlugin,
    chunks,
    fitting,
    joined,
)
from evoprune.search.policies.pl import bounded_weights, race_times
from evoprune.search.policies.shift import RACE, shifts

_FEW, _LOOKS = 400, 1000


class PlackettLuceKnapsack:
    """Picks until nothing fits any more: what is left of the budget is less than the cheapest unit that is not kept.

    In the race of clocks that Plackett-Luce is, units that no longer fit when their clock rings are passed over.
    """

    exact: ClassVar[bool] = True
    plain: ClassVar[bool] = False

    def __init__(self, budget: Knapsack) -> None:
        self.budget = budget
        self.n = budget.n
        self._units = np.flatnonzero(budget.open)
        self._costs = budget.costs[self._units]

    def sample(self, logits: Floats, count: int, rng: np.random.Generator) -> Draws:
        """Independent masks with their orders, [K, most picks], -1 after the last pick."""
        parts = chunks(count, self.n)
        return joined([self.draw(logits, rng.random((part.stop - part.start, self.n))) for part in parts])

    def draw(self, logits: Floats, uniforms: Floats) -> Draws:
        """Units by the times at which their clocks ring, each taken if it still fits; arguments as in `Policy.draw`."""
        masks = np.repeat(self.budget.always[None], len(uniforms), axis=0)
        first = np.argsort(race_times(logits[self._units], uniforms[:, self._units]), axis=1)
        taken = fitting(self._costs[first], self.budget.left)
        # Picks to the left, in their order.
        places = np.argsort(~taken, axis=1, kind="stable")
        counts = taken.sum(axis=1)
        width = int(counts.max(initial=0))
        order = self._units[np.take_along_axis(first, places, axis=1)[:, :width]]
        order[np.arange(width) >= counts[:, None]] = -1
        rows, columns = np.nonzero(order >= 0)
        masks[rows, order[rows, columns]] = True
        return Draws(masks, order)

    def log_prob(self, logits: Floats, draws: Draws) -> Floats:
        """[K]: log-probability of the picks in their order."""
        weights = bounded_weights(logits[self._units])
        found = np.zeros(len(draws.masks))
        for part in chunks(len(found), self.n):
            picks, real, _, sums = self._replay(weights, draws, part)
            found[part] = np.where(real, np.log(weights[picks]) - np.log(sums), 0.0).sum(axis=1)
        return found

    def score(self, logits: Floats, draws: Draws) -> Floats:
        """[K, n]: whether i was picked, less w_i times the sum of 1 / c_t over the picks t for which i stood ready.

        w = exp(logit); c_t is the sum of w over what stood ready for pick t: not yet picked, and it fitted.
        """
        weights = bounded_weights(logits[self._units])
        found = np.zeros(draws.masks.shape)
        for part in chunks(len(found), self.n):
            _, _, ready, sums = self._replay(weights, draws, part)
            held = np.concatenate([np.zeros((len(sums), 1)), np.cumsum(1.0 / sums, axis=1)], axis=1)
            picked = draws.masks[part][:, self._units]
            found[part, self._units] = picked - weights * np.take_along_axis(held, ready, axis=1)
        return found

    def _replay(self, weights: Floats, draws: Draws, part: slice) -> tuple[Ints, Mask, Ints, Floats]:
        """What stood ready when.

        Returns:
            [K, picks] picks as places among the open units, whether they are picks or fill a row up; [K, open] for how
            many picks each unit stood ready; [K, picks] c_t of each pick, 1 for what fills up.
        """
        assert draws.order is not None
        order = draws.order[part]
        real = order >= 0
        picks = np.searchsorted(self._units, np.where(real, order, 0)).clip(max=max(0, len(self._units) - 1))
        costs = np.where(real, self._costs[picks], 0)
        left = np.where(real, self.budget.left - np.cumsum(costs, axis=1) + costs, -1)
        # What is left falls, so a unit stands ready for the first few picks: until it is picked or does not fit.
        ready = np.zeros((len(order), len(self._units)), dtype=np.int64)
        for cost in np.unique(self._costs):
            ready[:, self._costs == cost] = (left >= cost).sum(axis=1)[:, None]
        rows, places = np.nonzero(real)
        ready[rows, picks[rows, places]] = places + 1
        width = order.shape[1] + 1
        flat = (np.arange(len(order))[:, None] * width + ready).reshape(-1)
        spread = np.broadcast_to(weights, ready.shape).reshape(-1)
        by_ready = np.bincount(flat, weights=spread, minlength=len(order) * width).reshape(-1, width)
        sums = np.cumsum(by_ready[:, ::-1], axis=1)[:, ::-1][:, 1:]
        return picks.astype(np.int64), real, ready, np.where(real, sums, 1.0)

    def inclusion(self, logits: Floats) -> Floats:
        """[n]: an approximation.

        Up to 400 units, how often each is in 1,000 masks that are made of always the same numbers (standard error below
        0.016). For more 1 - exp(-w_i t) with t so that expected costs are the budget, as if all units were taken whose
        clocks ring before one time; this is the better the smaller costs are beside the budget.
        """
        if self.n <= _FEW:
            looks = np.random.Generator(np.random.Philox(key=0)).random((_LOOKS, self.n))
            return self.draw(logits, looks).masks.mean(axis=0)
        found = self.budget.always.astype(np.float64)
        if len(self._units):
            rows = logits[self._units][None]
            shift = shifts(rows, self.budget.left, RACE, self._costs.astype(np.float64))
            found[self._units] = RACE.value(rows[0] + shift[0])
        return found

    def mode(self, logits: Floats) -> Mask:
        return self.budget.best(logits)


POLICIES.add("pl-knapsack", PolicyPlugin("Plackett-Luce while something fits", PlackettLuceKnapsack, (Knapsack,)))
