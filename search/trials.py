"""Lines of the history as trials of the board."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from evoprune.metrics.expression import parse
from evoprune.search.engine.executor import Outcome
from evoprune.search.engine.trial_record import Range, TrialRecord

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


class Trials:
    """Makes trials of the lines of one history, which it must be told all, in their order.

    Args:
        rungs: length of the ladder.
    """

    def __init__(self, rungs: int) -> None:
        self._rungs = rungs
        self._generations: dict[int, int] = {}

    def record(self, line: Mapping[str, Any], telemetry: Mapping[str, Any] | None = None) -> TrialRecord | None:
        """The trial of the next birth; None for one that was answered without a forward pass.

        Args:
            line: of the history.
            telemetry: of its outcome; adds times, which the history does not have.
        """
        generation = self._generation(line)
        if "same_as" in line:
            return None
        values = line.get("rungs") or []
        expression = parse(line["expression"])
        finished = len(values) == self._rungs
        times = telemetry or {}
        known_roots = DESCRIPTORS["root"]
        assert isinstance(known_roots, list)
        return TrialRecord(
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

    def records(self, lines: Iterable[Mapping[str, Any]], outcomes: Iterable[Outcome] = ()) -> Iterator[TrialRecord]:
        """The trials of the births so far.

        Args:
            lines: of the history.
            outcomes: of the evaluation log, for the times. The history does not name them, but fitness at every rung
                and its error, digit by digit, do; candidates that agree in all that take turns in the log's order.
        """
        telemetry: defaultdict[tuple[float, ...], deque[Mapping[str, Any]]] = defaultdict(deque)
        for outcome in outcomes:
            if outcome.values.get("rungs"):
                telemetry[_measured(outcome.values)].append(outcome.telemetry)
        for line in lines:
            known = telemetry[_measured(line)] if line.get("rungs") else None
            if (record := self.record(line, known.popleft() if known else None)) is not None:
                yield record

    def _generation(self, line: Mapping[str, Any]) -> int:
        """Length of the longest line of ancestors: 0 for what was given or drawn."""
        known = [self._generations[parent] + 1 for parent in line["parents"] if parent in self._generations]
        self._generations[line["birth"]] = max(known, default=0)
        return self._generations[line["birth"]]


def _measured(values: Mapping[str, Any]) -> tuple[float, ...]:
    """Fitness at every rung, and the error of the last."""
    return (*values["rungs"], values["stderr"])
