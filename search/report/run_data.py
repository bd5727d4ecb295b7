"""What the report of any search says of its run: no figures, no markup, nothing computed twice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from evoprune.metrics.errors import InvalidInput
from evoprune.search.config import validated_as
from evoprune.search.config_sections import SearchConfig, with_window
from evoprune.search.result import check_one_text
from evoprune.search.rundir import RunDirectory

# Outcomes that depend on the machine; another run of the same seed need not repeat them.
MACHINE_REASONS = ("TIMEOUT", "OOM", "WORKER_LOST", "ERROR")

OF_WINNER = ("winner", "replayed", "refitted")
"""Rows of the held-out table that are the winner, whatever becomes of its weights."""

Config = TypeVar("Config", bound=SearchConfig)


@dataclass(frozen=True)
class Contender:
    """A row of the held-out table.

    Attributes:
        name: ``dense``, one of `OF_WINNER`, or a baseline's name.
        what: a metric's expression, or the range of an allocation; empty for the dense model.
        heldout: loss, perplexity, kl, stderr and tokens, on text C.
        difference: loss of the winner minus loss of this one, over the same windows, and its standard error.
    """

    name: str
    what: str
    heldout: Mapping[str, float]
    difference: Mapping[str, float] | None = None

    @property
    def above(self) -> float:
        """Its loss minus the winner's."""
        return 0.0 if self.difference is None else 0.0 - self.difference["loss"]


class RunData(ABC, Generic[Config]):
    """A run as a report reads it; each kind of search adds what is its own.

    Args:
        run: finished or not.
        config_class: of the kind of search.

    Raises:
        InvalidInput: a search of another kind, or its files are damaged.
    """

    kind: ClassVar[str]

    def __init__(self, run: RunDirectory, config_class: type[Config]) -> None:
        if run.kind != self.kind:
            raise InvalidInput(f"run {run.run_id} is a search of kind {run.kind!r}, not of kind {self.kind!r}")
        self.run = run
        self.identity = run.identity
        self.state = run.state
        self.seconds = run.seconds
        self.result: dict[str, Any] | None = run.result
        self.config = validated_as(config_class, run.config)
        if "window" in run.identity:
            self.config = with_window(self.config, run.identity["window"])
        self.lines: list[dict[str, Any]] = list(run.history())

    @abstractmethod
    def what(self, values: Mapping[str, Any]) -> str:
        """What the winner or a baseline is, from its part of the result; see `Contender`."""

    @cached_property
    def contenders(self) -> list[Contender]:
        """The held-out table, best loss first after the dense model; empty before the run is finished.

        Raises:
            InvalidInput: its rows were measured on different text.
        """
        if self.result is None:
            return []
        best = self.result["best"]
        rows = [Contender("winner", self.what(best), best["heldout"])]
        if best.get("replayed") is not None:
            rows.append(Contender("replayed", self.what(best), best["replayed"], best["winner_minus_replayed"]))
        if best.get("refitted") is not None:
            rows.append(Contender("refitted", self.what(best), best["refitted"], best["winner_minus_refitted"]))
        rows += [
            Contender(row["name"], self.what(row), row["heldout"], row["winner_minus_this"])
            for row in self.result["baselines"]
        ]
        rows.sort(key=lambda row: row.heldout["loss"])
        rows.insert(0, Contender("dense", "", self.result["dense"]["heldout"]))
        check_one_text({row.name: row.heldout for row in rows})
        return rows

    def contender(self, name: str) -> Contender | None:
        """The row of that name."""
        return next((row for row in self.contenders if row.name == name), None)

    @property
    def n_births(self) -> int:
        """Births that were applied."""
        return self.result["births"] if self.result is not None else len(self.lines)

    @property
    @abstractmethod
    def n_evaluations(self) -> int:
        """Candidates that cost a forward pass."""

    @property
    @abstractmethod
    def n_removed(self) -> int | None:
        """Weights that the winner removes; None where the result does not say."""

    def evaluated(self, line: Mapping[str, Any]) -> bool:
        """Whether a birth cost a forward pass."""
        return True

    @cached_property
    def reasons(self) -> list[tuple[str, bool, int]]:
        """(reason code, whether it took a forward pass, births), commonest first; all cuts of the race are ``CUT``."""
        found = Counter(
            ("CUT" if line["reason"].startswith("CUT") else line["reason"], self.evaluated(line))
            for line in self.lines
            if line.get("reason")
        )
        return [
            (code, forward, n) for (code, forward), n in sorted(found.items(), key=lambda item: (-item[1], item[0]))
        ]

    @property
    def n_machine_outcomes(self) -> int:
        """Evaluations that ended in a way that depends on the machine."""
        return sum(n for code, _, n in self.reasons if code in MACHINE_REASONS)
