"""Plackett-Luce: units are picked one after another, each by a softmax over those that are left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from evoprune.search.policies import POLICIES, Draws, Floats, Ints, Mask, PolicyPlugin, Strata, Table, chunks, joined
from evoprune.search.policies.shift import RACE, shifts

# Logits of a row further below its largest are taken as this far: weights stay positive, and so do their sums.
_FURTHEST = 600.0


class PlackettLuce:
    """Exactly so many of each stratum, picked without replacement; all strata of one size at a time.

    Source: Gumbel-top-k: Kool et al. 2019, arXiv:1903.06059.
    """

    exact: ClassVar[bool] = True
    plain: ClassVar[bool] = False

    def __init__(self, budget: Strata) -> None:
        self.budget = budget
        self.n = budget.n

    def sample(self, logits: Floats, count: int, rng: np.random.Generator) -> Draws:
        """Independent masks with their orders, [K, picks]."""
        return joined([self.draw(logits, rng.random((_length(part), self.n))) for part in chunks(count, self.n)])

    def draw(self, logits: Floats, uniforms: Floats) -> Draws:
        """The units of each stratum whose clocks of rate exp(logit) ring first, at -log(u) / exp(logit).

        Args:
            uniforms: [K, n] in [0, 1).
        """
        times = race_times(logits, uniforms)
        masks = np.repeat(self.budget.always[None], len(uniforms), axis=0)
        orders = []
        for table in self.budget.tables:
            first = np.argsort(times[:, table.units], axis=2)[:, :, : table.keep]
            picks = np.take_along_axis(table.units[None], first, axis=2)
            orders.append(picks.reshape(len(uniforms), -1))
        order = np.concatenate([np.zeros((len(uniforms), 0), np.int64), *orders], axis=1)
        np.put_along_axis(masks, order, True, axis=1)
        return Draws(masks, order)

    def log_prob(self, logits: Floats, draws: Draws) -> Floats:
        """[K]: log-probability of the picks in their order."""
        found = np.zeros(len(draws.masks))
        for part in chunks(len(found), self.n):
            for _, _, weights, sums in self._picks(logits, draws, part):
                found[part] += (np.log(weights) - np.log(sums)).sum(axis=(1, 2))
        return found

    def score(self, logits: Floats, draws: Draws) -> Floats:
        """[K, n]: 1 - w_i H_j of the j-th pick of a stratum, -w_i H_keep of what is not picked.

        Here w = exp(logit), c_j is the sum of w over what is left before the j-th pick, and H_j = sum over t <= j of
        1 / c_t.
        """
        found = np.zeros(draws.masks.shape)
        for part in chunks(len(found), self.n):
            rows = found[part]
            for table, picks, weights, sums in self._picks(logits, draws, part):
                held = np.cumsum(1.0 / sums, axis=2)
                rows[:, table.units] = -row_weights(logits, table)[None] * held[:, :, -1:]
                flat = (len(rows), -1)
                np.put_along_axis(rows, picks.reshape(flat), (1.0 - weights * held).reshape(flat), axis=1)
        return found

    def _picks(self, logits: Floats, draws: Draws, part: slice) -> Iterator[tuple[Table, Ints, Floats, Floats]]:
        """For each table: picks, their weights, and the weight that was left before each, [draws, strata, keep]."""
        assert draws.order is not None
        begin = 0
        for table in self.budget.tables:
            strata = len(table.units)
            picks = draws.order[part, begin : begin + strata * table.keep].reshape(-1, strata, table.keep)
            begin += strata * table.keep
            by_unit = np.empty(self.n)
            by_unit[table.units] = row_weights(logits, table)
            weights = by_unit[picks]
            rest = np.where(draws.masks[part][:, table.units], 0.0, by_unit[table.units]).sum(axis=2)
            sums = rest[:, :, None] + np.cumsum(weights[:, :, ::-1], axis=2)[:, :, ::-1]
            yield table, picks, weights, sums

    def inclusion(self, logits: Floats) -> Floats:
        """[n]: exact where one or two of a stratum are kept.

        Else the approximation 1 - exp(-w_i t), with t so that the probabilities add up to the count: units whose
        clocks ring before a time that does not depend on them (Rosén 1972). Its error is about 0.01 for ten units and
        vanishes as strata grow.
        """
        found = self.budget.always.astype(np.float64)
        for table in self.budget.tables:
            rows = logits[table.units]
            if table.keep <= 2:
                found[table.units] = _few(row_weights(logits, table), table.keep)
            else:
                found[table.units] = RACE.value(rows + shifts(rows, table.keep, RACE)[:, None])
        return found

    def mode(self, logits: Floats) -> Mask:
        """[n] bool: the most probable order of picks."""
        return self.budget.best(logits)


def race_times(logits: Floats, uniforms: Floats) -> Floats:
    """[K, n]: logarithms of the times at which clocks of rate exp(logit) ring."""
    safe = np.clip(uniforms, 2.0**-54, 1.0 - 2.0**-53)
    found: Floats = np.log(-np.log(safe)) - logits
    return found


def bounded_weights(rows: Floats) -> Floats:
    """exp(logit) over the largest of each row, [rows, size], positive."""
    largest = rows.max(axis=-1, keepdims=True, initial=-np.inf)
    found: Floats = np.exp(np.maximum(rows - largest, -_FURTHEST))
    return found


def _few(weights: Floats, keep: int) -> Floats:
    """[rows, size]: inclusion if one is kept, w_i / sum w; or two: that, and first another and then i."""
    first = weights / weights.sum(axis=1, keepdims=True)
    if keep == 1:
        return first
    odds = weights / sums_of_others(weights)
    return first + first * (odds.sum(axis=1, keepdims=True) - odds)


def sums_of_others(weights: Floats) -> Floats:
    """[..., size]: the sum of each row less the unit itself, added up from both sides.

    A difference would lose it where one weight is nearly all there is.
    """
    found = np.zeros(weights.shape)
    found[..., 1:] = np.cumsum(weights[..., :-1], axis=-1)
    found[..., :-1] += np.cumsum(weights[..., :0:-1], axis=-1)[..., ::-1]
    return found


def row_weights(logits: Floats, table: Table) -> Floats:
    """[strata, size]: `bounded_weights` of the units of a table."""
    return bounded_weights(logits[table.units])


def _length(part: slice) -> int:
    return int(part.stop) - int(part.start)


POLICIES.add("pl", PolicyPlugin("Plackett-Luce, exact counts", PlackettLuce, (Strata,)))
