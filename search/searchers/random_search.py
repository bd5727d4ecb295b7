"""Random search: the control that evolution has to beat with the same seeds and the same budget."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

from evoprune.metrics.expression import Expression
from evoprune.search.archive import Archive
from evoprune.search.candidate import Candidate
from evoprune.search.searchers import SEARCHERS, Proposal
from evoprune.search.spaces.symbolic import MetricSpace


class RandomSearch:
    """The given metrics, then independent draws from the space.

    Args:
        space: what is drawn from.
        archive: kept by the search; not read.
        seeds: given metrics by name, evaluated first.
    """

    def __init__(self, space: MetricSpace, archive: Archive, seeds: Mapping[str, Expression], **options: Any) -> None:
        self._space = space
        self._queue = deque(Proposal(expression, f"seed:{name}") for name, expression in seeds.items())

    def propose(self, birth: int, rng: random.Random) -> Proposal:
        if self._queue:
            return self._queue.popleft()
        return Proposal(self._space.sample(rng), "random")

    def tell(self, proposal: Proposal, candidate: Candidate | None, value: float | None) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"queued": len(self._queue)}

    def restore(self, state: dict[str, Any]) -> None:
        while len(self._queue) > state["queued"]:
            self._queue.popleft()


SEARCHERS.add("random", RandomSearch)
