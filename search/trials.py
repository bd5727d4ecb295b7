"""Lines of the history as trials of the board."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evoprune.search.engine.executor import Outcome
from evoprune.search.engine.trial_record import TrialRecord


class Trials(ABC):
    """Makes trials of the lines of one history, which it must be told all, in their order.

    Args:
        steps: rungs or stages that a candidate may get to.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @abstractmethod
    def take(self, line: Mapping[str, Any], telemetry: Mapping[str, Any] | None = None) -> Sequence[TrialRecord]:
        """The trials that are complete with the next birth.

        Args:
            line: of the history.
            telemetry: of its outcome; adds times, which the history does not have.
        """

    @abstractmethod
    def reached(self, line: Mapping[str, Any]) -> Iterable[int]:
        """The steps that a birth adds a candidate to."""

    @abstractmethod
    def measured(self, values: Mapping[str, Any]) -> tuple[float, ...]:
        """The numbers of an outcome that its line of the history has too, digit by digit; none without a fitness."""

    def records(self, lines: Iterable[Mapping[str, Any]], outcomes: Iterable[Outcome] = ()) -> Iterator[TrialRecord]:
        """The trials of the births so far.

        Args:
            lines: of the history.
            outcomes: of the evaluation log, for the times. The history does not name them, but what they measured
                does; candidates that agree in all that take turns in the log's order, and share the last where the
                same evaluation answered several.
        """
        telemetry: defaultdict[tuple[float, ...], deque[Mapping[str, Any]]] = defaultdict(deque)
        for outcome in outcomes:
            if measured := self.measured(outcome.values):
                telemetry[measured].append(outcome.telemetry)
        for line in lines:
            measured = self.measured(line)
            known = telemetry[measured] if measured else None
            yield from self.take(line, (known.popleft() if len(known) > 1 else known[0]) if known else None)
