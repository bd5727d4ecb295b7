"""Where learning begins: logits or probabilities from the scores of a criterion, in each group of units by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.search.policies import Floats, Ints
from evoprune.search.policies.parameters import CAP
from evoprune.search.policies.projection import project
from evoprune.search.policies.shift import LOGISTIC, shifts, sigmoid

FLAT = "flat"
"""The mapping by which all units start alike."""

# Of a unit that the criterion keeps, in the mapping const.
_CONST = 0.9


def z_scores(scores: Floats, groups: Ints) -> Floats:
    """[n]: scores less the mean of their group, over its standard deviation (of m - 1) and 1e-8; 0 if it is alone.

    Args:
        scores: [n] float64, finite.
        groups: [n] int.
    """
    places = np.unique(groups, return_inverse=True)[1].reshape(-1)
    counts = np.bincount(places)
    off = scores - (np.bincount(places, weights=scores) / counts)[places]
    spread = np.sqrt(np.bincount(places, weights=off * off) / np.maximum(counts - 1, 1))
    found: Floats = off / (spread + 1e-8)[places]
    return found


def _sigmap(scores: Floats, rate: float, rng: np.random.Generator) -> Floats:
    values = sigmoid(z_scores(scores, np.zeros(len(scores), np.int64)))
    return values + (rate - values.mean())


def _norm(scores: Floats, rate: float, rng: np.random.Generator) -> Floats:
    low, high = scores.min(), scores.max()
    values = (scores - low) / (high - low) if high > low else np.zeros(len(scores))
    found: Floats = values + (rate - values.mean())
    return found


def _const(scores: Floats, rate: float, rng: np.random.Generator) -> Floats:
    order = np.argsort(-scores, kind="stable")
    values = np.full(len(scores), 1 - _CONST)
    values[order[: round(rate * len(scores))]] = _CONST
    return values


def _random(scores: Floats, rate: float, rng: np.random.Generator) -> Floats:
    return _sigmap(rng.standard_normal(len(scores)), rate, rng)


def _flat(scores: Floats, rate: float, rng: np.random.Generator) -> Floats:
    return np.full(len(scores), rate)


def _logit_z(scores: Floats, rate: float, rng: np.random.Generator) -> Floats:
    z = z_scores(scores, np.zeros(len(scores), np.int64))
    if not 0 < rate < 1:
        return np.full(len(scores), rate)
    return sigmoid(z + shifts(z[None], rate * len(z), LOGISTIC)[0])


MAPPINGS: dict[str, Callable[[Floats, float, np.random.Generator], Floats]] = {
    "logit-z": _logit_z,
    "sigmap": _sigmap,
    "norm": _norm,
    "const": _const,
    "random": _random,
    FLAT: _flat,
}
"""From the scores of one group and the share of it that is kept to values whose mean is that share (but for const) and
that may lie outside [0, 1]."""


def start_probabilities(
    mapping: str, scores: Floats, groups: Ints, rates: float | Floats, *, seed: int = 0, published: bool = False
) -> Floats:
    """[n] probabilities to keep.

    Args:
        mapping: one of `MAPPINGS`.
        scores: [n] float64, finite, low = removed first.
        groups: [n] int.
        rates: the share that is kept, of all units or [n] of each (then the mean of a group's counts).
        seed: of the mapping random.
        published: clamp to [0, 1], which moves the mean where scores have heavy tails; else the nearest probabilities
            with the right mean are taken.

    Raises:
        UnknownName: no such mapping.
        InvalidInput: a rate is outside [0, 1].

    Source: sigmap, norm, const, random: the released code of Gao et al. 2025, arXiv 2406.10576 (``init.py``).
    """
    if mapping not in MAPPINGS:
        raise UnknownName("mapping", mapping, MAPPINGS)
    by_unit = np.broadcast_to(np.asarray(rates, dtype=np.float64), scores.shape)
    if by_unit.min() < 0 or by_unit.max() > 1:
        raise InvalidInput("a share of units to keep is outside [0, 1]")
    rng = np.random.Generator(np.random.Philox(key=seed))
    found = np.empty(len(scores))
    order = np.argsort(groups, kind="stable")
    for units in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        rate = float(by_unit[units].mean())
        values = MAPPINGS[mapping](scores[units], rate, rng)
        if published:
            found[units] = np.clip(values, 0.0, 1.0)
        else:
            found[units] = project(values, rate * len(units), equality=True)
    return found


def start_logits(mapping: str, scores: Floats, groups: Ints, rates: float | Floats, *, seed: int = 0) -> Floats:
    """[n] logits, within the cap: z-scores for logit-z, else the log-odds of `start_probabilities`; arguments as there.

    They need no shift: to policies only differences matter.
    """
    if mapping == "logit-z":
        found: Floats = np.clip(z_scores(scores, groups), -CAP, CAP)
        return found
    p = start_probabilities(mapping, scores, groups, rates, seed=seed)
    edge = sigmoid(np.array([CAP]))[0]
    inside = np.clip(p, 1 - edge, edge)
    logits: Floats = np.log(inside) - np.log1p(-inside)
    return logits
