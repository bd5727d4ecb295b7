"""Allocation search by generations: level switches, more text for fewer candidates, the best is the next parent.

A generation is a number of children of one parent. Each stage measures them on the same windows of text and keeps the
best few for the next stage, which has more; the parent joins the last one, on equal terms. Windows are drawn anew for
every generation, so that nobody wins by fitting them. The last parents and the best seed are then compared on one long
text, the same for all, and the best of them is the result.
Source: Sieberling et al. 2025 (EvoPress, arXiv:2410.14649), section 3; layerwise sparsity allocation, section 5.3a.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from evoprune.metrics.files import content_hash, derived_seed
from evoprune.metrics.ranks import GONE
from evoprune.search.breeders import Breeder
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.kinds.allocation import span_text
from evoprune.search.loop import Birth
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace

FINALISTS = 8


@dataclass(frozen=True)
class Stage:
    """One round of selection.

    Attributes:
        windows: of text, that each candidate is measured on.
        survivors: how many go on.
    """

    windows: int
    survivors: int


@dataclass(frozen=True)
class Member:
    """A candidate of the present stage.

    Attributes:
        genome: its options.
        origin: ``seed:NAME``, or as the breeder says.
        birth: number of the birth that measured it last; None before.
        kl: what was measured then, in nats per token; None where it has no fitness.
        stderr: of `kl`, over windows.
        generation: in which it was bred; 0 for seeds.
    """

    genome: Genome
    origin: str
    birth: int | None = None
    kl: float | None = None
    stderr: float = 0.0
    generation: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return {**asdict(self), "genome": list(self.genome)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Member:
        """The member that `to_json` wrote."""
        return cls(**{**values, "genome": tuple(values["genome"])})


class AllocationSearch:
    """Births of level vectors, by generations.

    Args:
        space: what genomes are made of.
        seeds: genomes to start from, by name.
        breeder: makes the children.
        stages: of a generation, each with more windows than the one before and fewer survivors; the last keeps one.
        windows: windows of text B that there are.
        final_windows: of these, how many the seeds and the finalists are measured on, from the first.
        offspring: children of a generation.
        seed: of the run.
        evaluations: candidates to measure in all, seeds included; the first seeds only, where they do not suffice for
            all. None for no limit.
        identity: hash of everything that an evaluation depends on beside the genome and the windows.
        payload: what every job says beside these.
    """

    def __init__(
        self,
        space: LevelSpace,
        seeds: Mapping[str, Genome],
        breeder: Breeder,
        stages: Sequence[Stage],
        *,
        windows: int,
        final_windows: int,
        offspring: int,
        seed: int,
        evaluations: int | None,
        identity: str,
        payload: Mapping[str, Any],
    ) -> None:
        self.space = space
        self.seed_fitness: dict[str, float] = {}
        self.best: Member | None = None
        self.finals: list[Member] = []
        self.generation = 0
        self.reasons: Counter[str] = Counter()
        self._breeder = breeder
        self._stages = tuple(stages)
        self._windows = windows
        self._final_windows = final_windows
        self._offspring = offspring
        self._seed = seed
        self._evaluations = evaluations
        self._identity = identity
        self.seeds = dict(seeds)
        self.payload = dict(payload)
        self._births = 0
        self._counted = 0
        self._phase = "seeds"
        self._stage = 0
        self._parent: Member | None = None
        self._parents: list[Member] = []
        self._known: set[str] = set()
        self._measured: list[Member] = []
        self._pool: list[Member] = []
        self._waiting: deque[int] = deque()
        self._concluded = False
        self._enter([Member(genome, f"seed:{name}") for name, genome in [*seeds.items()][:evaluations]])

    @property
    def births(self) -> int:
        """Births so far."""
        return self._births

    @property
    def last_generation(self) -> int:
        """The last one that had children; the finals bear the next number."""
        return self.generation - (self._phase == "final")

    @property
    def leader(self) -> tuple[float, str] | None:
        """Fitness of the present parent, and the range of its sparsities."""
        if self.best is None or self.best.kl is None:
            return None
        return self.best.kl, span_text(level / GONE for level in self.space.levels(self.best.genome))

    def next_birth(self) -> Birth | None:
        if not self._waiting:
            return None
        member = self._pool[self._waiting.popleft()]
        number = self._births
        self._births += 1
        first, last = self._span()
        counted = self._phase == "seeds" or (self._phase == "generation" and self._stage == 0)
        self._counted += counted
        parent = member if self._parent is None else self._parent
        record = {
            "member": member.to_json(),
            "generation": self.generation,
            "stage": self._stage_name(),
            "origin": "parent" if self._phase == "generation" and member.genome == parent.genome else member.origin,
            "parents": [parent.birth] if counted and self._phase == "generation" else [],
        }
        payload = {
            **self.payload,
            "levels": self.space.levels(member.genome),
            "parent": self.space.levels(parent.genome),
            "first": first,
            "last": last,
        }
        # The parent only says from where a worker may start: it changes no number.
        key = content_hash([self._identity, payload["levels"], first, last])
        return Birth(number, record, Job(key, "levels", payload), counted)

    def apply(self, birth: Birth, outcome: Outcome | None) -> dict[str, Any]:
        assert outcome is not None and birth.job is not None  # every birth has a job
        member = Member.from_json(birth.record["member"])
        line: dict[str, Any] = {
            "birth": birth.number,
            "origin": birth.record["origin"],
            "parents": birth.record["parents"],
            "generation": birth.record["generation"],
            "stage": birth.record["stage"],
            "windows": [birth.job.payload["first"], birth.job.payload["last"]],
            "genome": self.space.gene_levels(member.genome),
            "counted": birth.counted,
            "kl": None,
            "reason": outcome.reason,
        }
        if outcome.status == "ok":
            line |= {name: outcome.values[name] for name in ("kl", "stderr")}
        if line["reason"] is not None:
            self.reasons[line["reason"]] += 1
        line |= self.note(member.genome)
        if birth.counted and isinstance(line["stage"], int):
            self._breeder.tell(member.genome, line["kl"])
        self._measured.append(replace(member, birth=birth.number, kl=line["kl"], stderr=line.get("stderr", 0.0)))
        if len(self._measured) == len(self._pool):
            self._advance()
        return line

    def _advance(self) -> None:
        """All of the stage are measured: choose who goes on, and what comes next."""
        ranked = self._ranked(self._measured)
        if self._phase == "seeds":
            self.seed_fitness = {
                member.origin.removeprefix("seed:"): member.kl for member in ranked if member.kl is not None
            }
            self._follow(ranked[:1])
        elif self._phase == "final":
            self.best = ranked[0] if ranked else None
            self.finals = ranked
            self._enter([])
        elif self._concluded and self._stage + 1 < len(self._stages):
            self._finish()
        elif not ranked:
            self._breed()  # nobody of this generation can be measured, but the parent has other children
        elif self._stage + 1 < len(self._stages):
            survivors = ranked[: self._stages[self._stage].survivors]
            self._stage += 1
            if self._stage + 1 == len(self._stages):
                assert self._parent is not None
                survivors = [*survivors, self._parent]
            self._enter(survivors)
        else:
            self._follow(ranked[:1])

    def _follow(self, winners: Sequence[Member]) -> None:
        """The winner of a generation is the parent of the next; without one, nothing can go on."""
        if not winners:
            self._enter([])
            return
        (winner,) = winners
        if self._parent is None or winner.genome != self._parent.genome:
            self._parents.append(winner)
        self._parent = self.best = winner
        self._known.add(content_hash(list(winner.genome)))
        self._breed()

    def _breed(self) -> None:
        """The next generation, or the finals if the budget is spent or nothing new is found."""
        left = self._offspring if self._evaluations is None else self._evaluations - self._counted
        self.generation += 1
        self._stage = 0
        children = [] if self._concluded else self._children(min(self._offspring, left))
        if children:
            self._phase = "generation"
            self._enter(children)
        else:
            self._finish()

    def _finish(self) -> None:
        """The finals: the last parents, the best seed and whom the breeder names, on one long text."""
        self._phase = "final"
        seen: dict[Genome, Member] = {member.genome: member for member in self._parents[:1]}
        seen |= {member.genome: member for member in self._parents[-FINALISTS:]}
        for genome, generation in self._breeder.finalists().items():
            seen.setdefault(genome, Member(genome, self._breeder.origin, generation=generation))
        self._enter(list(seen.values()))

    def note(self, genome: Genome) -> Mapping[str, Any]:
        """What the breeder says of a candidate beside its genome."""
        return self._breeder.note(genome)

    def _children(self, count: int) -> list[Member]:
        assert self._parent is not None
        if count < 1:
            return []
        rng = random.Random(derived_seed(self._seed, "generation", self.generation))
        made = self._breeder.children(self._parent.genome, count, rng)
        return [
            Member(genome, self._breeder.origin, generation=self.generation)
            for genome in made
            if content_hash(list(genome)) not in self._known
        ]

    def _ranked(self, members: Sequence[Member]) -> list[Member]:
        """Those with a fitness, the best first; of equals the one that removes more, then by content."""
        return sorted(
            (member for member in members if member.kl is not None),
            key=lambda member: (member.kl, -self.space.removed(member.genome), content_hash(list(member.genome))),
        )

    def _enter(self, pool: Sequence[Member]) -> None:
        self._pool = list(pool)
        self._measured = []
        self._waiting = deque(range(len(self._pool)))

    def _span(self) -> tuple[int, int]:
        """The windows of the present stage."""
        if self._phase != "generation":
            return 0, self._final_windows
        windows = self._stages[self._stage].windows
        if not self._breeder.redraw:
            return 0, windows
        offset = derived_seed(self._seed, f"windows-{self._stage}", self.generation) % (self._windows - windows + 1)
        return offset, offset + windows

    def _stage_name(self) -> int | str:
        return self._stage if self._phase == "generation" else self._phase

    def conclude(self) -> bool:
        if not self._concluded:
            self._concluded = True
            # The last stage has cost the most, and is nearly over.
            if self._phase == "generation" and self._stage + 1 < len(self._stages):
                self._pool = [member for at, member in enumerate(self._pool) if at not in self._waiting]
                self._waiting.clear()
                if len(self._measured) == len(self._pool):
                    self._finish()
        return True

    def state(self) -> dict[str, Any]:
        return {
            "births": self._births,
            "counted": self._counted,
            "phase": self._phase,
            "generation": self.generation,
            "stage": self._stage,
            "parent": None if self._parent is None else self._parent.to_json(),
            "parents": [member.to_json() for member in self._parents],
            "best": None if self.best is None else self.best.to_json(),
            "finals": [member.to_json() for member in self.finals],
            "levels": None if self.best is None else self.space.levels(self.best.genome),
            "known": sorted(self._known),
            "measured": [member.to_json() for member in self._measured],
            "pool": [member.to_json() for member in self._pool],
            "waiting": list(self._waiting),
            "seed_fitness": self.seed_fitness,
            "reasons": dict(self.reasons),
            "breeder": self._breeder.state(),
            "concluded": self._concluded,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._births = state["births"]
        self._counted = state["counted"]
        self._phase = state["phase"]
        self.generation = state["generation"]
        self._stage = state["stage"]
        self._parent = None if state["parent"] is None else Member.from_json(state["parent"])
        self._parents = [Member.from_json(values) for values in state["parents"]]
        self.best = None if state["best"] is None else Member.from_json(state["best"])
        self.finals = [Member.from_json(values) for values in state["finals"]]
        self._known = set(state["known"])
        self._measured = [Member.from_json(values) for values in state["measured"]]
        self._pool = [Member.from_json(values) for values in state["pool"]]
        self._waiting = deque(state["waiting"])
        self.seed_fitness = dict(state["seed_fitness"])
        self.reasons = Counter(state["reasons"])
        self._breeder.restore(state["breeder"])
        self._concluded = state["concluded"]
