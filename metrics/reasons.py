"""Why a candidate got no fitness: the closed list of reason codes, stored with every rejected candidate."""

from __future__ import annotations

REASONS = {
    "TYPE": "the tree breaks the type system",
    "LIMIT": "height, node count or constant outside the limits",
    "NO_J": "the score is constant along a row",
    "NO_ELEM": "the score uses neither the weights nor a per-element gradient",
    "DUP_KEY": "the canonical form was born before",
    "DUP_SIG": "the probe ranking was evaluated before",
    "NONFINITE": "a score is NaN or infinite",
    "TIES": "too many rows tie at the cut",
    "STAT_MISSING": "a statistic is not in the cache",
    "STAT_DEAD": "a statistic is zero along too many rows",
    "CUT": "raced out at a rung",
    "TIMEOUT": "the deadline passed",
    "OOM": "out of memory",
    "WORKER_LOST": "the worker died",
    "ERROR": "the evaluation raised an error",
}
