"""The nearest probabilities that add up to a budget."""

from __future__ import annotations

import numpy as np

from evoprune.metrics.errors import InvalidInput
from evoprune.search.policies import Floats


def project(values: Floats, total: float, equality: bool = False) -> Floats:
    """The Euclidean projection onto probabilities with a sum of at most, or of exactly, `total`.

    It is clip(values - v, 0, 1), and v the root of a piecewise linear function, which is found exactly between two of
    its 2 n corners, in O(n log n).

    Args:
        values: [n] float64.
        total: in [0, n]; any larger number if no equality is asked for.

    Raises:
        InvalidInput: no probabilities have this sum.

    Source: the constraint of Gao et al. 2025, arXiv 2406.10576, who find v by bisection.
    """
    if total < 0 or (equality and total > len(values)):
        raise InvalidInput(f"the probabilities of {len(values)} units cannot add up to {total:g}")
    clipped: Floats = np.clip(values, 0.0, 1.0)
    if not equality and clipped.sum() <= total:
        return clipped
    corners = np.unique(np.concatenate([values, values - 1.0]))
    low, high = 0, len(corners) - 1
    # The sum falls from n at the first corner to 0 at the last.
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(values - corners[middle], 0.0, 1.0).sum() >= total:
            low = middle
        else:
            high = middle
    centre = (corners[low] + corners[high]) / 2
    moving = (values > centre) & (values - 1.0 < centre)
    whole = int((values - 1.0 >= centre).sum())
    v = corners[low]
    if moving.any():
        v = (values[moving].sum() + whole - total) / int(moving.sum())
    found: Floats = np.clip(values - v, 0.0, 1.0)
    return found
