"""What the report of a metric search says, read from the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evoprune.metrics.expression import Expression, from_json, parse
from evoprune.search.archive import CLASSES
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.racing import kendall_tau
from evoprune.search.report.run_data import RunData
from evoprune.search.rundir import RunDirectory


@dataclass(frozen=True)
class Entry:
    """A candidate with a fitness.

    Attributes:
        birth: its number.
        expression: in canonical form.
        origin: how it came about: ``seed:NAME``, ``random``, ``crossover``, ``mutate:NAME``, ``tune``, ``power``.
        parents: births it was made from.
        rungs: fitness on text B at each rung that it ran, lower is better.
        stderr: of the last of them.
        number: how many candidates had been evaluated with it, 0 where the history does not tell.
    """

    birth: int
    expression: Expression
    origin: str
    parents: tuple[int, ...]
    rungs: tuple[float, ...]
    stderr: float
    number: int = 0

    @classmethod
    def from_values(cls, values: Mapping[str, Any], number: int = 0) -> Entry:
        """The candidate of a line of the history, of the search's state or of the result."""
        written = values["expression"]
        return cls(
            birth=values["birth"],
            # The state writes nested lists; a lone terminal is text in both forms.
            expression=parse(written) if isinstance(written, str) else from_json(written),
            origin=values["origin"],
            parents=tuple(values["parents"]),
            rungs=tuple(values["rungs"]),
            stderr=values["stderr"],
            number=number,
        )

    @property
    def fitness(self) -> float:
        """At the highest rung that it ran."""
        return self.rungs[-1]

    @property
    def family(self) -> str:
        """The origin, with all seeds taken as one."""
        return "seed" if self.origin.startswith("seed:") else self.origin

    @property
    def needs(self) -> str:
        """The dearest pass over data that it needs: data-free, forward, backward or second-order."""
        costs = self.expression.costs
        if costs & {"hessian", "local"}:
            return "second-order"
        if "backward" in costs:
            return "backward"
        return "forward" if costs else "data-free"


class ReportData(RunData[MetricSearchConfig]):
    """A metric search's run as a report reads it.

    Args:
        run: finished or not.

    Raises:
        InvalidInput: not a metric search, or its files are damaged.
    """

    kind = "metric"

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run, MetricSearchConfig)
        self._committed: dict[str, Any] = (run.peek() or {}).get("search", {})

    @cached_property
    def entries(self) -> list[Entry]:
        """Every candidate with a fitness, in the order of birth."""
        entries, number = [], 0
        for line in self.lines:
            number += self.evaluated(line)
            if line.get("rungs"):
                entries.append(Entry.from_values(line, number))
        return entries

    @cached_property
    def by_birth(self) -> dict[int, Entry]:
        """The same by number of birth."""
        return {entry.birth: entry for entry in self.entries}

    @property
    def n_rungs(self) -> int:
        """Length of the ladder."""
        return len(self.config.racing.rungs)

    @property
    def rung_tokens(self) -> list[int]:
        """Tokens of text B that were read up to each rung."""
        return [windows * self.config.data.window for windows in self.config.racing.rungs]

    @cached_property
    def finalists(self) -> list[Entry]:
        """Candidates that were measured at the top rung."""
        return [entry for entry in self.entries if len(entry.rungs) == self.n_rungs]

    @cached_property
    def best(self) -> Entry | None:
        """The winner; so far, if the run is not finished."""
        if self.result is not None:
            return self._entry(self.result["best"])
        return min(self.front or self.entries, key=lambda entry: (-len(entry.rungs), entry.fitness), default=None)

    @cached_property
    def front(self) -> list[Entry]:
        """Candidates that no other beats in both fitness and complexity, simplest first."""
        members = self.result["front"] if self.result is not None else self._archive("any")
        return [self._entry(member) for member in members]

    @property
    def finals(self) -> list[tuple[Entry, Mapping[str, Any]]]:
        """The finalists, the winner first, each with its row of the result; empty where there was nothing to choose."""
        rows = [] if self.result is None else self.result.get("finalists", [])
        # A finalist of a run whose history is missing has no entry.
        known = [(self.by_birth.get(row["birth"]), row) for row in rows if len(rows) > 1]
        return [(entry, row) for entry, row in known if entry is not None]

    @cached_property
    def classes(self) -> dict[str, Entry | None]:
        """The best candidate by what it needs at most, in the order of `CLASSES`."""
        if self.result is not None:
            found = self.result["classes"]
            return {name: found[name] and self._entry(found[name]) for name in CLASSES}
        fronts = {name: map(self._entry, self._archive(name)) for name in CLASSES}
        return {name: min(members, key=lambda entry: entry.fitness, default=None) for name, members in fronts.items()}

    @cached_property
    def fronts(self) -> dict[str, list[Entry]]:
        """The front among metrics that need no more than each of `CLASSES` says, simplest first.

        Where the search's own state is missing, the best of each class stands for its front.
        """
        fronts = {name: [self._entry(member) for member in self._archive(name)] for name in CLASSES}
        fronts["any"] = self.front
        return {name: members or [best for best in [self.classes[name]] if best] for name, members in fronts.items()}

    @cached_property
    def levels(self) -> dict[str, float]:
        """Fitness at the top rung of the named seeds that got there, and of the tuned power product."""
        levels = {
            entry.origin.removeprefix("seed:"): entry.fitness for entry in self.finalists if entry.family == "seed"
        }
        power = [entry.fitness for entry in self.finalists if entry.origin == "power"]
        return {**levels, **({"power": min(power)} if power else {})}

    def what(self, values: Mapping[str, Any]) -> str:
        return str(values["expression"])

    # How the search went

    @property
    def n_evaluations(self) -> int:
        return self.result["evaluations"] if self.result is not None else sum(map(self.evaluated, self.lines))

    @property
    def n_removed(self) -> int | None:
        return None if self.result is None else self.result.get("removed")

    @property
    def n_distinct(self) -> int:
        """Different rank signatures."""
        if self.result is not None:
            return self.result["distinct"]
        return len({line["signature"] for line in self.lines if line.get("signature")})

    @property
    def n_evolved_parent(self) -> int:
        """Births with a parent that was itself bred or tuned."""
        source = self.result if self.result is not None else self._committed
        return source.get("evolved_parents", 0)

    @cached_property
    def correlations(self) -> list[tuple[float | None, int]]:
        """Per pair of neighbouring rungs, Kendall's tau over candidates promoted at random, and how many they are."""
        if self.result is not None:
            return [(row["tau"], row["n"]) for row in self.result["rung_correlations"]]
        kept = self._committed.get("racing", {}).get("pairs", [[] for _ in range(self.n_rungs - 1)])
        pairs = [[(first, second) for first, second in found] for found in kept]
        return [(kendall_tau(found) if len(found) > 1 else None, len(found)) for found in pairs]

    @cached_property
    def agreement(self) -> dict[str, dict[str, float]]:
        """By criterion, then site: intersection over union of what it and the winner prune; empty if not measured."""
        return {} if self.result is None else self.result.get("agreement", {})

    def evaluated(self, line: Mapping[str, Any]) -> bool:
        # A birth that was answered without a forward pass says what it is the same as, or null.
        return "same_as" not in line

    def _archive(self, name: str) -> list[Any]:
        return self._committed.get("archive", {}).get(name, [])

    def _entry(self, values: Mapping[str, Any]) -> Entry:
        """The candidate as the history has it, else as these values have it."""
        return self.by_birth.get(values["birth"]) or Entry.from_values(values)
