"""Independent units, with a shift of all logits at which the budget holds on average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from evoprune.search.policies import POLICIES, Budget, Draws, Floats, Ints, Knapsack, Mask, PolicyPlugin, Strata, chunks
from evoprune.search.policies.shift import LOGISTIC, shifts, sigmoid

# The log-odds of a unit that is always kept; its probability is 1 to the last bit.
_CERTAIN = 1e3


class Bernoulli:
    """Unit i is kept with probability s(logit_i + shift), s the logistic function.

    The shift makes the expected count of a stratum, or the expected cost, meet the budget, and is part of what is
    differentiated. A sampled mask may be over or under the budget; the mode never is.
    """

    exact: ClassVar[bool] = False
    plain: ClassVar[bool] = True

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.n = budget.n
        self._known: tuple[Floats, Floats] | None = None

    def sample(self, logits: Floats, count: int, rng: np.random.Generator) -> Draws:
        inclusion = self.inclusion(logits)
        parts = chunks(count, self.n)
        return Draws(np.concatenate([rng.random((part.stop - part.start, self.n)) < inclusion for part in parts]))

    def draw(self, logits: Floats, uniforms: Floats) -> Draws:
        """Units whose u is below their probability; arguments as in `Policy.draw`."""
        return Draws(uniforms < self.inclusion(logits))

    def log_prob(self, logits: Floats, draws: Draws) -> Floats:
        odds = self.effective(logits)
        each = -np.logaddexp(0.0, np.where(draws.masks, -odds, odds))
        found: Floats = np.where(self.budget.open, each, 0.0).sum(axis=1)
        return found

    def score(self, logits: Floats, draws: Draws) -> Floats:
        return self.pullback(logits, np.where(self.budget.open, draws.masks - self.inclusion(logits), 0.0))

    def inclusion(self, logits: Floats) -> Floats:
        """[n]: exact."""
        return sigmoid(self.effective(logits))

    def mode(self, logits: Floats) -> Mask:
        return self.budget.best(logits)

    def effective(self, logits: Floats) -> Floats:
        """[n]: log-odds, logit + shift; +-1000 for units that are always kept or never."""
        # Those of the logits that were asked for last are kept.
        if self._known is None or not np.array_equal(self._known[0], logits):
            odds = np.where(self.budget.always, _CERTAIN, -_CERTAIN)
            for units, target, weights in self._rows():
                odds[units] = logits[units] + shifts(logits[units], target, LOGISTIC, weights)[:, None]
            self._known = logits.copy(), odds
        return self._known[1]

    def pullback(self, logits: Floats, gradient: Floats) -> Floats:
        """[..., n]: g_i - w_i v_i (sum g) / (sum w v) in each stratum, v = p (1 - p), w costs (1 for counts)."""
        slope = LOGISTIC.slope(self.effective(logits))
        found = gradient.copy()
        for units, _, weights in self._rows():
            part = slope[units] if weights is None else slope[units] * weights
            share = part / part.sum(axis=1, keepdims=True)
            found[..., units] -= share * gradient[..., units].sum(axis=-1, keepdims=True)
        return found

    def _rows(self) -> Iterator[tuple[Ints, float, Floats | None]]:
        """Units by rows that share a shift, what their expected weights add up to, and the weights."""
        if isinstance(self.budget, Knapsack):
            units = np.flatnonzero(self.budget.open)
            costs = self.budget.costs[units].astype(np.float64)
            if len(units):
                yield units[None], float(self.budget.left), costs
        else:
            for table in self.budget.tables:
                yield table.units, float(table.keep), None


POLICIES.add("bernoulli", PolicyPlugin("independent units, the budget on average", Bernoulli, (Strata, Knapsack)))
