"""Candidates of a search by generations as trials of the board."""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from evoprune.fitness.part_merges import read_block
from evoprune.search.config_allocation import seed_stage
from evoprune.search.engine.trial_record import Range, TrialRecord
from evoprune.search.trials import Trials


@dataclass
class _Candidate:
    """What is known of one child of the present generation."""

    line: Mapping[str, Any]
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)


class GenerationTrials(Trials):
    """One trial for each candidate: a seed at once, a child once its generation is over.

    Args:
        steps: stages of a generation.
        beside: what lines of the history call the costs of a front beside the first.

    Attributes:
        genome: what the board calls the numbers of a genome.
    """

    genome: ClassVar[str]

    @abstractmethod
    def descriptors(self, genome: Sequence[int]) -> dict[str, Any]:
        """What the dashboard may correlate with the fitness, beside the generation."""

    def __init__(self, steps: int, beside: Sequence[str] = ()) -> None:
        super().__init__(steps)
        self._beside = tuple(beside)
        self._children: dict[tuple[int, ...], _Candidate] = {}
        self._generation = 0

    def take(self, line: Mapping[str, Any], telemetry: Mapping[str, Any] | None = None) -> Sequence[TrialRecord]:
        records: list[TrialRecord] = []
        if line["stage"] == "rebuild":
            return records
        if line["generation"] != self._generation or line["stage"] == "final":
            records += [self._record(child) for child in self._children.values()]
            self._children.clear()
            self._generation = line["generation"]
        genome = tuple(line["genome"])
        if line["stage"] == "seeds":
            seed = _Candidate(line, telemetry or {})
            if line["kl"] is not None:
                seed.values[seed_stage(self.steps)] = line["kl"]
            records.append(self._record(seed))
        elif line["counted"]:
            self._children[genome] = _Candidate(line, telemetry or {})
        child = self._children.get(genome)
        if child is not None and line["reason"] is not None:
            child.line = {**child.line, "reason": line["reason"]}
        elif child is not None:
            child.values[line["stage"]] = line["kl"]
        return records

    def reached(self, line: Mapping[str, Any]) -> Iterable[int]:
        return (line["stage"],) if isinstance(line["stage"], int) and line["origin"] != "parent" else ()

    def measured(self, values: Mapping[str, Any]) -> tuple[float, ...]:
        if "recovered" in values:  # its windows are those of the whole text, and those of a line are few of them
            return (values["recovered"],)
        # Held-out losses, which have no line, stand in the log as well.
        return (values["kl"], values["stderr"]) if "stderr" in values else ()

    def _record(self, candidate: _Candidate) -> TrialRecord:
        line, values = candidate.line, candidate.values
        last = seed_stage(self.steps) if line["stage"] == "seeds" else self.steps - 1
        finished = last in values
        return TrialRecord(
            state="complete" if finished else "pruned" if values else "fail",
            value=values[last] if finished else None,
            rungs=values,
            attributes={
                "birth": line["birth"],
                self.genome: line["genome"],
                "operator": line["origin"],
                "parents": line["parents"],
                "generation": line["generation"],
                "reason": line["reason"],
                **{name: line[name] for name in ("cost", *self._beside) if name in line},
            },
            descriptors={"generation": line["generation"], **self.descriptors(line["genome"])},
            front=finished and bool(line.get("front")),
            beside=[line[name] for name in self._beside],
            started=candidate.telemetry.get("started"),
            finished=candidate.telemetry.get("finished"),
        )


GENERATIONS: Range = (0, 1_000_000)


class AllocationTrials(GenerationTrials):
    """Of levels, in steps of 1/256."""

    genome = "levels"
    ranges: ClassVar[dict[str, Range]] = {
        "generation": GENERATIONS,
        "lowest level": (0, 255),
        "highest level": (0, 255),
        "spread of levels": (0.0, 128.0),
    }

    def descriptors(self, genome: Sequence[int]) -> dict[str, Any]:
        return {
            "lowest level": min(genome),
            "highest level": max(genome),
            "spread of levels": statistics.pstdev(genome),
        }


class StructureTrials(GenerationTrials):
    """Of what blocks keep: KV groups, query heads in each, and neurons, block by block."""

    genome = "shape"
    ranges: ClassVar[dict[str, Range]] = {
        "generation": GENERATIONS,
        "query heads": (0, 1_000_000),
        "neurons": (0, 1_000_000_000),
        "parts dropped": (0, 10_000),
    }

    def descriptors(self, genome: Sequence[int]) -> dict[str, Any]:
        kept = [read_block(block)[0] for block in zip(genome[::3], genome[1::3], genome[2::3], strict=True)]
        return {
            "query heads": sum(groups * each for groups, each, _ in kept),
            "neurons": sum(neurons for _, _, neurons in kept),
            "parts dropped": sum((not groups) + (not neurons) for groups, _, neurons in kept),
        }
