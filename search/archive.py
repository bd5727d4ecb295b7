"""The hall of fame: best fitness for each complexity, for all metrics and for those that do without a costly pass."""

from __future__ import annotations

from typing import Any

from evoprune.metrics.expression import Expression
from evoprune.search.candidate import Candidate

# Fronts by what a metric needs at most, so that users without a backward pass still get a winner.
CLASSES = ("data-free", "forward", "backward", "any")


def needs_class(expression: Expression) -> str:
    """The cheapest of `CLASSES` that an expression belongs to."""
    costs = expression.costs
    if not costs:
        return "data-free"
    if costs == {"forward"}:
        return "forward"
    return "backward" if costs <= {"forward", "backward"} else "any"


class Archive:
    """Candidates that no other beats in both fitness and complexity, among those measured at the top rung.

    Args:
        size: the most to keep per class.
    """

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._fronts: dict[str, list[Candidate]] = {name: [] for name in CLASSES}

    def add(self, candidate: Candidate) -> bool:
        """Take in a candidate measured at the top rung; whether it joined the front of all metrics."""
        first = CLASSES.index(needs_class(candidate.expression))
        for name in CLASSES[first:]:
            front = self._fronts[name]
            if any(_dominates(other, candidate) for other in front):
                continue
            front[:] = [other for other in front if not _dominates(candidate, other)] + [candidate]
            front.sort(key=lambda member: (member.complexity, member.value, member.birth))
            if len(front) > self._size:
                worst = max(front, key=lambda member: (member.value, member.birth))
                front.remove(worst)
        return candidate in self._fronts["any"]

    @property
    def front(self) -> list[Candidate]:
        """Members of the front of all metrics, simplest first."""
        return list(self._fronts["any"])

    @property
    def best(self) -> Candidate | None:
        """The member with the lowest fitness."""
        return min(self.front, key=lambda member: (member.value, member.birth), default=None)

    def by_class(self) -> dict[str, Candidate | None]:
        """The best of each class of needs."""
        return {
            name: min(front, key=lambda member: (member.value, member.birth), default=None)
            for name, front in self._fronts.items()
        }

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as JSON values."""
        return {name: [member.to_json() for member in front] for name, front in self._fronts.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._fronts = {name: [Candidate.from_json(member) for member in front] for name, front in state.items()}


def _dominates(first: Candidate, second: Candidate) -> bool:
    no_worse = first.value <= second.value and first.complexity <= second.complexity
    return no_worse and (first.value < second.value or first.complexity < second.complexity or first is not second)
