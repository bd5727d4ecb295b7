"""Plackett-Luce sets of one or two: the score of what was picked, whichever came first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from evoprune.metrics.errors import InvalidInput
from evoprune.search.policies import POLICIES, Draws, Floats, Mask, PolicyPlugin, Strata, Table, chunks
from evoprune.search.policies.pl import PlackettLuce, row_weights, sums_of_others


class MaskPro(PlackettLuce):
    """The masks of Plackett-Luce, with less variance of the score, for groups of which at most two are kept.

    With p the softmax of a group's logits, a pair has probability p_i p_j (1 / (1 - p_i) + 1 / (1 - p_j)).

    Source: MaskPro, arXiv 2506.12876.

    Raises:
        InvalidInput: more than two of a stratum are kept.
    """

    def __init__(self, budget: Strata) -> None:
        super().__init__(budget)
        if (most := max((table.keep for table in budget.tables), default=0)) > 2:
            raise InvalidInput(f"the policy maskpro keeps one or two of each stratum, not {most}: take the policy pl")

    def log_prob(self, logits: Floats, draws: Draws) -> Floats:
        """[K]: log-probability of the masks."""
        found = np.zeros(len(draws.masks))
        for part in chunks(len(found), self.n):
            for table, kept, p, rest in self._rows(logits, draws, part):
                found[part] += np.where(kept, np.log(p), 0.0).sum(axis=(1, 2))
                if table.keep == 2:
                    found[part] += np.log(np.where(kept, 1.0 / rest, 0.0).sum(axis=2)).sum(axis=1)
        return found

    def score(self, logits: Floats, draws: Draws) -> Floats:
        """[K, n]: d_i = m_i / p_i + R m_i / (1 - p_i)^2, R = 1 / (sum of m / (1 - p)), through the softmax.

        That is p_i (d_i - sum of p d); without the second term of d where one is kept.
        """
        found = np.zeros(draws.masks.shape)
        for part in chunks(len(found), self.n):
            for table, kept, p, rest in self._rows(logits, draws, part):
                # p d = m + p r / (1 - p), and of that each unit keeps 1 - p, and gives p of it to the others: added up
                # so that nothing is lost where p is nearly 1.
                pulled, own = kept.astype(np.float64), np.where(kept, rest, 0.0)
                if table.keep == 2:
                    each = np.where(kept, 1.0 / rest, 0.0)
                    share = each / each.sum(axis=2, keepdims=True)
                    pulled, own = pulled + p * share * each, own + p * share
                found[part, table.units] = own - p * sums_of_others(pulled)
        return found

    def _rows(self, logits: Floats, draws: Draws, part: slice) -> Iterator[tuple[Table, Mask, Floats, Floats]]:
        """For each table: [draws, strata, size] what is kept; [strata, size] p and 1 - p."""
        for table in self.budget.tables:
            weights = row_weights(logits, table)
            total = weights.sum(axis=1, keepdims=True)
            yield table, draws.masks[part][:, table.units], weights / total, sums_of_others(weights) / total


POLICIES.add("maskpro", PolicyPlugin("Plackett-Luce sets of one or two, exact counts", MaskPro, (Strata,)))
