"""What the report of any search by generations says: who started, who had children, and who won."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from evoprune.metrics.files import canonical_json
from evoprune.search.config_allocation import AllocationSearchConfig, seed_stage
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.report.run_data import RunData
from evoprune.search.result import closed_gap

Line = Mapping[str, Any]
"""A birth, as the history has it."""

SearchedConfig = TypeVar("SearchedConfig", AllocationSearchConfig, StructureSearchConfig)
Plan = TypeVar("Plan")
"""What a genome does to the model, as a kind of search shows it."""


@dataclass(frozen=True)
class Found(Generic[Plan]):
    """The winner; in a run that is not finished, the present parent.

    Attributes:
        birth: that measured it last.
        generation: in which it was bred, 0 for a seed.
        origin: ``seed:NAME``, or what bred it.
        kl: to the dense model on text B, in nats per token, with its standard error over windows.
        tokens: that these are from.
        plan: what it does to the model.
    """

    birth: int
    generation: int
    origin: str
    kl: float
    stderr: float
    tokens: int
    plan: Plan


@dataclass(frozen=True)
class Generation:
    """A generation and who won it.

    Attributes:
        number: from 1 upwards.
        reached: children that were measured in each stage.
        evaluations: of the whole search up to its end.
        winner: the birth in its last stage that became the next parent; None where no stage decided that.
        before: the old parent's birth in that stage.
    """

    number: int
    reached: tuple[int, ...]
    evaluations: int
    winner: Line | None
    before: Line | None

    @property
    def kept(self) -> bool:
        """Whether the old parent won."""
        return self.winner is not None and self.winner["origin"] == "parent"

    @property
    def accepted(self) -> bool:
        """Whether a child won."""
        return self.winner is not None and not self.kept

    @property
    def gain(self) -> float | None:
        """KL of the old parent minus that of the winner, on the same windows."""
        if self.winner is None or self.before is None or self.before["kl"] is None:
            return None
        return float(self.before["kl"] - self.winner["kl"])

    @property
    def moves(self) -> list[int]:
        """By how much each number of the genome moved that did; none where the parent stayed."""
        if self.winner is None or self.before is None:
            return []
        pairs = zip(self.winner["genome"], self.before["genome"], strict=True)
        return [new - old for new, old in pairs if new != old]


class GenerationData(RunData[SearchedConfig], Generic[SearchedConfig, Plan]):
    """A run of a search by generations as a report reads it.

    Attributes:
        starters: what the seeds are, in words.
        genome: the entry of the result that holds a genome.
    """

    starters: ClassVar[str]
    genome: ClassVar[str]

    @property
    @abstractmethod
    def reference(self) -> str:
        """What everything is compared with, by name."""

    @abstractmethod
    def decoded(self, line: Line) -> Plan:
        """What the genome of a birth does."""

    @abstractmethod
    def plan_of(self, values: Mapping[str, Any]) -> Plan:
        """What the winner or a baseline does, from its part of the result."""

    @abstractmethod
    def changes(self, generation: Generation) -> Mapping[str, Sequence[float]]:
        """By how much what moved did in a generation, in per cent points, by what it is."""

    @property
    def n_evaluations(self) -> int:
        return self.result["evaluations"] if self.result is not None else sum(line["counted"] for line in self.lines)

    # Texts

    @property
    def stage_tokens(self) -> list[int]:
        """Tokens of text B that each stage reads."""
        return [stage.windows * self.config.data.window for stage in self.config.searcher.stages]

    @property
    def seed_tokens(self) -> int:
        """Tokens that seeds are measured on."""
        return self.stage_tokens[seed_stage(len(self.stage_tokens))]

    @property
    def redrawn(self) -> bool:
        """Whether generations read different windows; a searcher that learns from all of them keeps the same."""
        return len({tuple(line["windows"]) for line in self.lines if line["stage"] == 0}) > 1

    @property
    def final_tokens(self) -> int:
        """Tokens of text B in all, which finalists are measured on."""
        return self.config.searcher.windows * self.config.data.window

    # What was found

    @cached_property
    def best(self) -> Found[Plan] | None:
        """The winner; so far, if the run is not finished."""
        if self.result is not None:
            best = self.result["best"]
            return Found(
                best["birth"],
                best["generation"],
                best["origin"],
                best["fitness"],
                best["stderr"],
                self.result["final_tokens"],
                self.plan_of(best),
            )
        if not self.parents:
            return None
        line = self.parents[-1]
        origin, generation = self.ancestry[tuple(line["genome"])]
        tokens = (line["windows"][1] - line["windows"][0]) * self.config.data.window
        return Found(line["birth"], generation, origin, line["kl"], line["stderr"], tokens, self.decoded(line))

    @property
    def gap(self) -> float | None:
        """See `evoprune.search.result.closed_gap`; None too where the dense model is no better than uniform."""
        if self.result is None:
            return None
        uniform, dense = self.contender("uniform"), self.contender("dense")
        if uniform is None or dense is None or uniform.heldout["loss"] <= dense.heldout["loss"]:
            return None
        return closed_gap(self.result)

    @cached_property
    def alike(self) -> list[list[str]]:
        """Names of seeds whose genomes are equal, where there is more than one."""
        groups: dict[str, list[str]] = {}
        for row in self.placed:
            groups.setdefault(canonical_json(row[self.genome]), []).append(row["name"])
        return [names for names in groups.values() if len(names) > 1]

    @property
    def placed(self) -> list[Mapping[str, Any]]:
        """Baselines that are candidates of the search; empty before the run is finished."""
        return [] if self.result is None else list(self.result["baselines"])

    @property
    def rivals(self) -> list[tuple[str, Plan]]:
        """Seeds by name, the best first: on held-out text, or by KL on text B if the run is not finished."""
        if self.result is None:
            return [(name, self.decoded(line)) for name, line in self.best_seeds.items()]
        rows = sorted(self.placed, key=lambda row: row["heldout"]["loss"])
        return [(row["name"], self.plan_of(row)) for row in rows]

    def best_rivals(self, most: int) -> list[tuple[str, Plan]]:
        """The best few that differ from the reference, from the winner and from each other."""
        seen = [plan for name, plan in self.rivals if name == self.reference]
        seen += [] if self.best is None else [self.best.plan]
        found = []
        for name, plan in self.rivals:
            if plan not in seen:
                seen.append(plan)
                found.append((name, plan))
        return found[:most]

    # How the search went

    @cached_property
    def seeds(self) -> list[Line]:
        """Seeds that have a fitness, as births on the text of the last stage but one; equal ones are one birth."""
        return [line for line in self.lines if line["stage"] == "seeds" and line["kl"] is not None]

    @cached_property
    def best_seeds(self) -> dict[str, Line]:
        """Of these the best of each name, the best first."""
        found: dict[str, Line] = {}
        for line in sorted(self.seeds, key=lambda line: (line["kl"], line["birth"])):
            found.setdefault(line["origin"].removeprefix("seed:"), line)
        return found

    @cached_property
    def finals(self) -> list[Line]:
        """Finalists, as births on all of text B."""
        return [line for line in self.lines if line["stage"] == "final" and line["kl"] is not None]

    @cached_property
    def generations(self) -> list[Generation]:
        """Those that had children, oldest first."""
        children: dict[int, list[Line]] = {}
        for line in self.lines:
            if isinstance(line["stage"], int):
                children.setdefault(line["generation"], []).append(line)
        by_birth = {line["birth"]: line for line in self.lines}
        n_stages, evaluations = len(self.config.searcher.stages), sum(line["stage"] == "seeds" for line in self.lines)
        found = []
        for number, lines in sorted(children.items()):
            stages = [[line for line in lines if line["stage"] == stage] for stage in range(n_stages)]
            evaluations += sum(line["counted"] for line in lines)
            later = children.get(number + 1)
            # Whom the next generation descends from is certain; who was best at the end of the last has to be.
            winner = by_birth.get(later[0]["parents"][0]) if later else self._undisputed(number, stages)
            before = next((line for line in stages[-1] if line["origin"] == "parent"), None)
            reached = tuple(sum(line["origin"] != "parent" for line in stage) for stage in stages)
            found.append(Generation(number, reached, evaluations, winner, before))
        return found

    def _undisputed(self, number: int, stages: Sequence[Sequence[Line]]) -> Line | None:
        """The best of the last generation, if its last stage was measured to the end."""
        *_, before_last, last = stages
        measured = sum(line["kl"] is not None and line["origin"] != "parent" for line in before_last)
        whole = len(last) == min(measured, self.config.searcher.stages[-2].survivors) + 1
        # A generation that was cut short is followed by finals of its own number: nobody won it.
        cut = any(line["stage"] == "final" and line["generation"] == number for line in self.lines)
        ranked = sorted((line["kl"], line["birth"]) for line in last if line["kl"] is not None)
        if not whole or cut or not ranked:
            return None
        return next(line for line in last if line["birth"] == ranked[0][1])

    @cached_property
    def parents(self) -> list[Line]:
        """The best seed, then the winner of each generation, by the birth that made it a parent."""
        if not self.seeds:
            return []
        bred = next((line for line in self.lines if line["stage"] == 0), None)
        first = (
            min(self.seeds, key=lambda line: (line["kl"], line["birth"]))
            if bred is None
            else next(line for line in self.seeds if line["birth"] == bred["parents"][0])
        )
        return [first, *(generation.winner for generation in self.generations if generation.winner is not None)]

    @cached_property
    def ancestry(self) -> dict[tuple[int, ...], tuple[str, int]]:
        """Origin and generation in which it was bred, of every genome that became a parent."""
        found: dict[tuple[int, ...], tuple[str, int]] = {}
        for line in self.parents:
            found.setdefault(tuple(line["genome"]), (line["origin"], line["generation"]))
        return found

    def evaluations_until(self, line: Line) -> int:
        """How many candidates had been measured when this genome became a parent."""
        _, generation = self.ancestry.get(tuple(line["genome"]), ("", 0))
        ends = {found.number: found.evaluations for found in self.generations}
        return ends.get(generation, sum(seed["stage"] == "seeds" for seed in self.lines))
