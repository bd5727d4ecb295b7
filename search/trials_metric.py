"""Births of a metric search as trials of the board."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evoprune.metrics.expression import parse
from evoprune.search.engine.trial_record import Range, TrialRecord
from evoprune.search.trials import Trials

# What the dashboard may correlate with the fitness, with ranges that stay the same for a run's whole life.
DESCRIPTORS: dict[str, Range] = {
    "generation": (0, 10_000),
    "height": (0, 32),
    "nodes": (1, 256),
    "complexity": (0, 512),
    "root": ["add", "sub", "mul", "div", "min", "max", "other"],
    "uses_gradient": [False, True],
    "uses_activation": [False, True],
}


class MetricTrials(Trials):
    """One trial for each birth with a forward pass."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._generations: dict[int, int] = {}

    def take(self, line: Mapping[str, Any], telemetry: Mapping[str, Any] | None = None) -> Sequence[TrialRecord]:
        generation = self._generation(line)
        if "same_as" in line:
            return ()
        values = line.get("rungs") or []
        expression = parse(line["expression"])
        finished = len(values) == self.steps
        times = telemetry or {}
        known_roots = DESCRIPTORS["root"]
        assert isinstance(known_roots, list)
        record = TrialRecord(
            state="complete" if finished else "pruned" if values else "fail",
            value=values[-1] if finished else None,
            rungs=dict(enumerate(values)),
            attributes={
                "birth": line["birth"],
                "expression": line["expression"],
                "operator": line["origin"],
                "parents": line["parents"],
                "generation": generation,
                "island": line["island"],
                "complexity": line["complexity"],
                "signature": line["signature"],
                "reason": line["reason"],
            },
            descriptors={
                "generation": generation,
                "height": expression.height,
                "nodes": expression.size,
                "complexity": expression.complexity,
                "root": expression.head if expression.head in known_roots else "other",
                "uses_gradient": any(name.startswith("G") for name in expression.terminals),
                "uses_activation": any(name.startswith("X") for name in expression.terminals),
            },
            front=finished and bool(line.get("front")),
            started=times.get("started"),
            finished=times.get("finished"),
        )
        return (record,)

    def reached(self, line: Mapping[str, Any]) -> Iterable[int]:
        return range(len(line.get("rungs") or ()))

    def measured(self, values: Mapping[str, Any]) -> tuple[float, ...]:
        return (*values["rungs"], values["stderr"]) if values.get("rungs") else ()

    def _generation(self, line: Mapping[str, Any]) -> int:
        """Length of the longest line of ancestors: 0 for what was given or drawn."""
        known = [self._generations[parent] + 1 for parent in line["parents"] if parent in self._generations]
        self._generations[line["birth"]] = max(known, default=0)
        return self._generations[line["birth"]]
