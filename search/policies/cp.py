"""Conditional Poisson: independent units, given that exactly so many of each stratum are kept."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from evoprune.metrics.errors import InvalidInput
from evoprune.search.policies import POLICIES, Draws, Floats, Mask, PolicyPlugin, Strata, Table, chunks

# Numbers of its tables: 160 MB.
_MOST = 20_000_000


class ConditionalPoisson:
    """A mask's probability is the exponential of the logits that it keeps over the sum of that of all such masks.

    With e_j(i) the j-th elementary symmetric polynomial of exp(logit) of units i, i + 1, ..., unit i is kept with
    probability exp(logit_i) e_{j-1}(i+1) / e_j(i) if j are to be kept of it and what follows.

    Source: Chen, Dempster, Liu 1994, "Weighted finite population sampling to maximize entropy".

    Raises:
        InvalidInput: the tables would be too large.
    """

    exact: ClassVar[bool] = True
    plain: ClassVar[bool] = True

    def __init__(self, budget: Strata) -> None:
        self.budget = budget
        self.n = budget.n
        if (numbers := sum(table.units.size * (table.keep + 1) for table in budget.tables)) > _MOST:
            raise InvalidInput(
                f"the policy cp needs tables of {numbers:,} numbers, more than {_MOST:,}: take the policy pl, or "
                "larger or fewer units"
            )
        self._known: tuple[Floats, list[tuple[Floats, Floats]]] | None = None

    def sample(self, logits: Floats, count: int, rng: np.random.Generator) -> Draws:
        parts = chunks(count, self.n)
        found = [self.draw(logits, rng.random((part.stop - part.start, self.n))).masks for part in parts]
        return Draws(np.concatenate(found))

    def draw(self, logits: Floats, uniforms: Floats) -> Draws:
        """One unit of each stratum after another, kept if its u is below its probability; as in `Policy.draw`."""
        masks = np.repeat(self.budget.always[None], len(uniforms), axis=0)
        for table, (chances, _) in zip(self.budget.tables, self._chances(logits), strict=True):
            strata, size = table.units.shape
            left = np.full((len(uniforms), strata), table.keep)
            for place in range(size):
                units = table.units[:, place]
                kept = np.minimum(uniforms[:, units], 1 - 2.0**-53) < chances[place][left, np.arange(strata)]
                masks[:, units] = kept
                left -= kept
        return Draws(masks)

    def log_prob(self, logits: Floats, draws: Draws) -> Floats:
        found = np.zeros(len(draws.masks))
        for table, (_, totals) in zip(self.budget.tables, self._chances(logits), strict=True):
            found += np.where(draws.masks[:, table.units], logits[table.units], 0.0).sum(axis=(1, 2)) - totals.sum()
        return found

    def score(self, logits: Floats, draws: Draws) -> Floats:
        """[K, n]: mask - inclusion."""
        return draws.masks - self.inclusion(logits)

    def inclusion(self, logits: Floats) -> Floats:
        """[n]: exact."""
        found = self.budget.always.astype(np.float64)
        for table, (chances, _) in zip(self.budget.tables, self._chances(logits), strict=True):
            # [keep + 1, strata]: probability that so many are still to be kept.
            left = np.zeros((table.keep + 1, len(table.units)))
            left[-1] = 1.0
            for place, chance in enumerate(chances):
                kept = left * chance
                found[table.units[:, place]] = kept.sum(axis=0)
                left -= kept
                left[:-1] += kept[1:]
        return found

    def mode(self, logits: Floats) -> Mask:
        """[n] bool: the most probable mask."""
        return self.budget.best(logits)

    def _chances(self, logits: Floats) -> list[tuple[Floats, Floats]]:
        """For each table, `_chances`; those of the logits that were asked for last are kept."""
        if self._known is None or not np.array_equal(self._known[0], logits):
            self._known = logits.copy(), [_chances(logits, table) for table in self.budget.tables]
        return self._known[1]


def _chances(logits: Floats, table: Table) -> tuple[Floats, Floats]:
    """Probabilities to keep, and the logarithms of the sums over all masks.

    Returns:
        [size, keep + 1, strata]: of each unit of each stratum, if so many are to be kept of it and what follows;
        [strata] log e_keep(0).
    """
    strata, size = table.units.shape
    chances = np.zeros((size, table.keep + 1, strata))
    after = np.full((table.keep + 1, strata), -np.inf)
    after[0] = 0.0
    for place in range(size - 1, -1, -1):
        kept = logits[table.units[:, place]] + after[:-1]
        here = after.copy()
        here[1:] = np.logaddexp(after[1:], kept)
        # More than there are units left cannot be asked for.
        possible = min(table.keep, size - place)
        chances[place, 1 : possible + 1] = np.exp(kept[:possible] - here[1 : possible + 1])
        after = here
    return chances, after[-1]


POLICIES.add("cp", PolicyPlugin("conditional Poisson, exact counts", ConditionalPoisson, (Strata,)))
