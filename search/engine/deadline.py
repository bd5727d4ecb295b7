"""How long an evaluation may take before its worker counts as hung."""

from __future__ import annotations

from typing import Literal

from evoprune.search.engine.executor import Outcome

SHORTEST = 300.0
"""A worker's first evaluation also reads statistics and teacher; a busy machine takes its time over anything."""
PATIENCE = 20.0
"""How often an evaluation may take what it should: scores and masks come on top of the forward passes, workers share
cores, and no evaluation that would have finished should be given up."""


class Deadline:
    """Seconds that a job gets. They depend on the machine, so they are no part of a job's key or of a run's identity.

    Args:
        asked: seconds for every job, None for no limit, or ``auto``: from the work and the speed.
        seconds_per_token: of a forward pass of the dense model, as measured once.
        seconds_before: what a compressor takes before the first of these passes, as measured once.
    """

    def __init__(
        self, asked: float | Literal["auto"] | None, seconds_per_token: float, seconds_before: float = 0.0
    ) -> None:
        self._asked = asked
        self._seconds_per_token = seconds_per_token
        self._seconds_before = seconds_before
        self._longest: dict[int, float] = {}  # seconds by tokens; a search has a handful of these

    def observe(self, outcome: Outcome, tokens: int) -> None:
        """Learn from a finished job over `tokens` tokens: what took one long may take the next long.

        Only one over as many tokens or more: what hangs on the first step need not wait as long as the last one takes.
        """
        self._longest[tokens] = max(self._longest.get(tokens, 0.0), outcome.telemetry.get("seconds", 0.0))

    def seconds(self, tokens: int) -> float | None:
        """For a job with forward passes over `tokens` tokens at most."""
        if self._asked != "auto":
            return self._asked
        longest = max((seconds for size, seconds in self._longest.items() if size <= tokens), default=0.0)
        expected = self._seconds_before + tokens * self._seconds_per_token
        return max(SHORTEST, PATIENCE * expected, PATIENCE * longest)
