"""One number of a benchmark, beside what it should be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A measured ratio.

    Attributes:
        what: one line.
        value: the ratio.
        target: what it should reach.
        at_most: whether smaller is better.
        details: the numbers behind it.
    """

    what: str
    value: float
    target: float
    at_most: bool = True
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value <= self.target if self.at_most else self.value >= self.target

    @property
    def target_text(self) -> str:
        """The target, for people."""
        return f"{'at most' if self.at_most else 'at least'} {self.target:g}"
