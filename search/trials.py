"""A line of the history as a trial of the board."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evoprune.metrics.expression import parse
from evoprune.search.engine.executor import Outcome
from evoprune.search.engine.trial_record import Range, TrialRecord

# What the dashboard may correlate with the fitness, with ranges that stay the same for a run's whole life.
DESCRIPTORS: dict[str, Range] = {
    "height": (0, 32),
    "nodes": (1, 256),
    "complexity": (0, 512),
    "root": ["add", "sub", "mul", "div", "min", "max", "other"],
    "uses_gradient": [False, True],
    "uses_activation": [False, True],
}


def trial_record(line: Mapping[str, Any], rungs: int, outcome: Outcome | None = None) -> TrialRecord | None:
    """The trial of a birth; None for one that was answered without a forward pass.

    Args:
        line: of the history.
        rungs: length of the ladder.
        outcome: adds times, which the history does not have.
    """
    values = line.get("rungs")
    if not values:
        return None
    expression = parse(line["expression"])
    finished = len(values) == rungs
    telemetry = {} if outcome is None else outcome.telemetry
    known_roots = DESCRIPTORS["root"]
    assert isinstance(known_roots, list)
    return TrialRecord(
        state="complete" if finished else "pruned",
        value=values[-1] if finished else None,
        rungs=dict(enumerate(values)),
        attributes={
            "birth": line["birth"],
            "expression": line["expression"],
            "operator": line["origin"],
            "parents": line["parents"],
            "generation": line["birth"],
            "island": line["island"],
            "complexity": line["complexity"],
            "signature": line["signature"],
            "reason": line["reason"],
        },
        descriptors={
            "height": expression.height,
            "nodes": expression.size,
            "complexity": expression.complexity,
            "root": expression.head if expression.head in known_roots else "other",
            "uses_gradient": any(name.startswith("G") for name in expression.terminals),
            "uses_activation": any(name.startswith("X") for name in expression.terminals),
        },
        front=finished and bool(line.get("front")),
        started=telemetry.get("started"),
        finished=telemetry.get("finished"),
    )
