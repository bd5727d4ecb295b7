"""Text A of a search, and how `prune` gets the same statistics, and so the same masks, from it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from evoprune.search.config_sections import DataConfig


def calibration_facts(data: DataConfig) -> dict[str, Any]:
    """What ``result.json`` says of text A."""
    return {
        "text": data.calibration or data.source,
        "sequences": data.calibration_sequences,
        "window": data.calibration_window,
    }


def calibration_options(facts: Mapping[str, Any], seed: int) -> str:
    """Options of `prune`, each after a space, that differ from its usual ones.

    Args:
        facts: see `calibration_facts`; none of it where a result of an earlier version has none.
        seed: of the run.
    """
    usual = calibration_facts(DataConfig())
    options = [
        (f"--calibration{'' if name == 'text' else f'-{name}'}", facts.get(name, value), value)
        for name, value in usual.items()
    ]
    differing = [(name, value) for name, value, known in [*options, ("--seed", seed, 0)] if value != known]
    return "".join(f" {name} {shlex.quote(str(value))}" for name, value in differing)
