"""Searchers: which candidate comes next. One file each."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Protocol

from evoprune.metrics.expression import Expression
from evoprune.metrics.registry import Registry
from evoprune.search.archive import Archive
from evoprune.search.candidate import Candidate


@dataclass(frozen=True)
class Proposal:
    """What a searcher wants to be born.

    Attributes:
        expression: as bred; the search simplifies it.
        origin: how it came about.
        parents: births it was made from.
        evolved: bred or tuned, not given or drawn.
        evolved_parent: at least one parent was itself evolved.
        island: where it will live.
        token: for the searcher's own use; comes back with the result.
        rung: where the searcher wants to know the fitness; the candidate is not cut before.
    """

    expression: Expression
    origin: str
    parents: tuple[int, ...] = ()
    evolved: bool = False
    evolved_parent: bool = False
    island: int = 0
    token: tuple[int, int] | None = None
    rung: int = 0


class Searcher(Protocol):
    """Proposes births and learns from results, both in the order of birth numbers."""

    def propose(self, birth: int, rng: random.Random) -> Proposal:
        """What birth number `birth` is; every draw comes from `rng`."""

    def tell(self, proposal: Proposal, candidate: Candidate | None, value: float | None) -> None:
        """The result of a proposal.

        Args:
            candidate: None if the proposal was rejected, known already, or failed.
            value: fitness at the proposal's rung, also where an equivalent candidate was measured before; None if
                unknown.
        """

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as JSON values."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""


SEARCHERS: Registry[type] = Registry("searcher", "evoprune.search.searchers")

__all__ = ["SEARCHERS", "Archive", "Candidate", "Proposal", "Searcher"]
