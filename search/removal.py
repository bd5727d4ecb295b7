"""What takes weights away in an allocation search, in words and as options: a criterion, a compressor, or both."""

from __future__ import annotations

import shlex

PLAIN = "mask"
"""The compressor that only masks, which nobody need mention."""


def removed_by(metric: str, compressor: str) -> str:
    """Such as ``wanda``, or ``sparsegpt``, which reads no criterion."""
    return " and ".join(_parts(metric, compressor).values())


def removal_options(metric: str, compressor: str) -> str:
    """Such as ``--metric wanda`` or ``--compressor sparsegpt``, for a command line."""
    return " ".join(f"{option} {shlex.quote(value)}" for option, value in _parts(metric, compressor).items())


def _parts(metric: str, compressor: str) -> dict[str, str]:
    if compressor == PLAIN:
        return {"--metric": metric}
    from evoprune.fitness.compressors import compressor_of

    inside = {"--metric": metric} if compressor_of(compressor).reads_criterion else {}
    return {**inside, "--compressor": compressor}
