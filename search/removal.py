"""What takes weights away in a search, in words and as options: a criterion, a compressor, or both."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

PLAIN = "mask"
"""The compressor that only masks, which nobody need mention."""

COMPRESSOR = (
    "what becomes of the weights that stay: a name from `evoprune list compressors`, perhaps with parameters, such as "
    "obq:bits=3"
)
"""What the option of that name means, in all searches that have it."""


def removed_by(metric: str, compressor: str) -> str:
    """Such as ``wanda``, or ``sparsegpt``, which reads no criterion."""
    return " and ".join(_parts(metric, compressor).values())


def removal_options(metric: str, compressor: str) -> str:
    """Such as ``--metric wanda`` or ``--compressor sparsegpt``, for a command line."""
    return " ".join(f"{option} {shlex.quote(value)}" for option, value in _parts(metric, compressor).items())


def followed_by(compressor: str) -> str:
    """Such as `` followed by refit``, of a metric; nothing of the mask alone."""
    return "" if compressor == PLAIN else f" followed by {compressor}"


def in_brackets(compressor: str) -> str:
    """Such as `` (refit)``, after what is removed; nothing of the mask alone."""
    return "" if compressor == PLAIN else f" ({compressor})"


def compressor_option(result: Mapping[str, Any]) -> str:
    """Such as `` --compressor refit`` for a command line that prunes as a search of metrics did.

    Nothing of the mask alone, unless the allocation beside the metric was searched for another compressor, which
    `prune` would take.

    Args:
        result: of the search.
    """
    compressor = result.get("compressor", PLAIN)
    beside = (result.get("allocation") or {}).get("compressor", PLAIN)
    return "" if compressor == PLAIN == beside else f" --compressor {shlex.quote(compressor)}"


def _parts(metric: str, compressor: str) -> dict[str, str]:
    if compressor == PLAIN:
        return {"--metric": metric}
    from evoprune.fitness.compressors import compressor_of

    inside = {"--metric": metric} if compressor_of(compressor).reads_criterion else {}
    return {**inside, "--compressor": compressor}
