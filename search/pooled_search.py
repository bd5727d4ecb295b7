"""What searches over genomes share: a pool of members, measured on the same windows of text, then what follows.

A pool is the barrier of these algorithms: nothing is decided before all of it is measured, so the history depends
neither on the number of workers nor on who finishes first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

from evoprune.metrics.files import content_hash
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.loop import Birth
from evoprune.search.spaces.ladder import Genome, LadderSpace

Space = TypeVar("Space", bound=LadderSpace)


@dataclass(frozen=True)
class Member:
    """A candidate of the present pool.

    Attributes:
        genome: its options.
        origin: ``seed:NAME``, or as whoever bred it says.
        birth: number of the birth that measured it last; None before.
        kl: in nats per token, over the windows `seen`; None where it has no fitness.
        stderr: of `kl`, over windows.
        seen: the windows of text B that it was measured on: the first, and the one after the last; None before.
        generation: in which it was bred; 0 for seeds.
        parents: births that measured what it was bred from.
        rebuild: the one after which it is measured, counted from 1; 0 is none.
    """

    genome: Genome
    origin: str
    birth: int | None = None
    kl: float | None = None
    stderr: float = 0.0
    seen: tuple[int, int] | None = None
    generation: int = 0
    parents: tuple[int, ...] = ()
    rebuild: int = 0

    def before(self, first: int, last: int) -> Member:
        """It, with what it knows of the beginning of these windows; nothing, where it was measured on others."""
        if self.kl is not None and self.seen is not None and self.seen[0] == first and self.seen[1] < last:
            return self
        return self.anew()

    def anew(self) -> Member:
        """It, without what it has been measured on."""
        return replace(self, kl=None, stderr=0.0, seen=None)

    def measured(self, birth: int, first: int, last: int, kl: float, stderr: float) -> Member:
        """It, measured on these windows, which follow those that it has `seen`, if any."""
        if self.kl is None or self.seen is None:
            return replace(self, birth=birth, kl=kl, stderr=stderr, seen=(first, last))
        seen, new = self.seen[1] - self.seen[0], last - first
        count = seen + new
        squares = seen * (seen - 1) * self.stderr**2 + new * (new - 1) * stderr**2
        squares += seen * new / count * (self.kl - kl) ** 2
        return replace(
            self,
            birth=birth,
            kl=(seen * self.kl + new * kl) / count,
            stderr=math.sqrt(squares / (count - 1) / count),
            seen=(self.seen[0], last),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        seen = None if self.seen is None else list(self.seen)
        return {**asdict(self), "genome": list(self.genome), "parents": list(self.parents), "seen": seen}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Member:
        """The member that `to_json` wrote."""
        seen = None if values["seen"] is None else (values["seen"][0], values["seen"][1])
        given = {"genome": tuple(values["genome"]), "parents": tuple(values["parents"]), "seen": seen}
        return cls(**{**values, **given})


class PooledSearch(ABC, Generic[Space]):
    """Births of genomes, pool by pool; each search says what a pool is and what comes after it.

    Args:
        space: what genomes are made of.
        seeds: genomes to start from, by name.
        seed: of the run.
        evaluations: candidates to measure in all, seeds included; the first seeds only, where they do not suffice for
            all. None for no limit.
        identity: hash of everything that an evaluation depends on beside the genome and the windows.
        payload: what every job says beside these.

    Attributes:
        seed_fitness: KL of the seeds that have one, by name.
        best: the best so far.
        generation: the present one; 0 while seeds are measured.
        reasons: how many births ended without a fitness, by reason code.
    """

    def __init__(
        self,
        space: Space,
        seeds: Mapping[str, Genome],
        *,
        seed: int,
        evaluations: int | None,
        identity: str,
        payload: Mapping[str, Any],
    ) -> None:
        self.space = space
        self.seed_fitness: dict[str, float] = {}
        self.best: Member | None = None
        self.generation = 0
        self.reasons: Counter[str] = Counter()
        self.seeds = dict(seeds)
        self.payload = dict(payload)
        self._seed = seed
        self._evaluations = evaluations
        self._identity = identity
        self._births = 0
        self._counted = 0
        self._phase = "seeds"
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
        """Fitness of the best so far, and the range of its sparsities."""
        if self.best is None or self.best.kl is None:
            return None
        return self.best.kl, self.space.words(self.best.genome)

    @abstractmethod
    def _span(self) -> tuple[int, int]:
        """The windows of text B that the present pool is measured on: the first, and the one after the last."""

    @abstractmethod
    def _stage_name(self) -> int | str:
        """What the history calls the present pool."""

    @abstractmethod
    def _counts(self, member: Member) -> bool:
        """Whether a member of the present pool is measured for the first time; only such ones are in the budget."""

    @abstractmethod
    def _advance(self) -> None:
        """All of the pool are measured: choose who goes on, and what comes next."""

    @abstractmethod
    def _origins(self, member: Member) -> tuple[str, list[int], Genome]:
        """What the history calls a member's origin and parents, and the genome that a worker may start from."""

    @abstractmethod
    def conclude(self) -> bool:
        """See `BirthSearch`."""

    def next_birth(self) -> Birth | None:
        if not self._waiting:
            return None
        member = self._pool[self._waiting.popleft()]
        number = self._births
        self._births += 1
        span = first, last = self._span()
        member = self._known_before(member, first, last)
        if member.seen is not None:
            first = member.seen[1]
        counted = self._counts(member)
        self._counted += counted
        origin, parents, start = self._origins(member)
        record = {
            "member": member.to_json(),
            "generation": self.generation,
            "stage": self._stage_name(),
            "origin": origin,
            "parents": parents,
            "windows": list(span),
            "new": [first, last],
        }
        return Birth(number, record, self._job(member, start, first, last), counted)

    def _known_before(self, member: Member, first: int, last: int) -> Member:
        """A member of the present pool, with what it knows of the beginning of these windows."""
        return member.before(first, last)

    def _job(self, member: Member, start: Genome, first: int, last: int) -> Job:
        """Measures a member on these windows; a worker may start from the genome `start`."""
        payload = {
            **self.payload_of(member),
            self.space.job: self.space.spelled(member.genome),
            "parent": self.space.spelled(start),
            "first": first,
            "last": last,
        }
        # The parent only says from where a worker may start: it changes no number.
        return Job(self._key(member, first, last), self.space.job, payload)

    def payload_of(self, member: Member) -> dict[str, Any]:
        """What every job about a member says beside its genome and windows."""
        return self.payload

    def _key(self, member: Member, *asked: Any) -> str:
        """Names what is asked about a member."""
        return content_hash([self._identity, self.space.spelled(member.genome), *asked])

    def _measurement(self, values: Mapping[str, Any], first: int, last: int) -> tuple[float, float]:
        """KL on these windows and its standard error, from what a job of the present pool returned."""
        return values["kl"], values["stderr"]

    def apply(self, birth: Birth, outcome: Outcome | None) -> dict[str, Any]:
        assert outcome is not None and birth.job is not None  # every birth has a job
        member = Member.from_json(birth.record["member"])
        line: dict[str, Any] = {
            "birth": birth.number,
            "origin": birth.record["origin"],
            "parents": birth.record["parents"],
            "generation": birth.record["generation"],
            "stage": birth.record["stage"],
            "windows": list(birth.record["windows"]),
            "genome": self.space.shown(member.genome),
            "counted": birth.counted,
            "kl": None,
            "reason": outcome.reason,
        }
        if outcome.status == "ok":
            first, last = birth.record["new"]
            measured = member.measured(birth.number, first, last, *self._measurement(outcome.values, first, last))
            line |= {"kl": measured.kl, "stderr": measured.stderr}
            if "recovered" in outcome.values:
                line["recovered"] = outcome.values["recovered"]
        else:
            measured = replace(member.anew(), birth=birth.number)
        if line["reason"] is not None:
            self.reasons[line["reason"]] += 1
        line |= self._take_in(measured, birth)
        self._measured.append(measured)
        if len(self._measured) == len(self._pool):
            self._advance()
        return line

    def _take_in(self, member: Member, birth: Birth) -> dict[str, Any]:
        """Learn from one measurement, in the order of births; what the history adds."""
        return {}

    def _ranked(self, members: Sequence[Member]) -> list[Member]:
        """Those with a fitness, the best first; of equals the one that removes more, then by content."""
        return sorted(
            (member for member in members if member.kl is not None),
            key=lambda member: (member.kl, -self.space.removed(member.genome), content_hash(list(member.genome))),
        )

    def _seeds_measured(self, seeds: Sequence[Member]) -> None:
        """Note what the seeds are worth, of several candidates for one name the best."""
        for member in self._ranked(seeds):
            if member.kl is not None:
                self.seed_fitness.setdefault(member.origin.removeprefix("seed:"), member.kl)

    def _enter(self, pool: Sequence[Member]) -> None:
        self._pool = list(pool)
        self._measured = []
        self._waiting = deque(range(len(self._pool)))

    def _break_off(self) -> bool:
        """Measure nobody of the pool who has not been begun; whether all others are measured already."""
        self._pool = [member for at, member in enumerate(self._pool) if at not in self._waiting]
        self._waiting.clear()
        return len(self._measured) == len(self._pool)

    def state(self) -> dict[str, Any]:
        return {
            "births": self._births,
            "counted": self._counted,
            "phase": self._phase,
            "generation": self.generation,
            "best": None if self.best is None else self.best.to_json(),
            self.space.job: None if self.best is None else self.space.spelled(self.best.genome),
            "known": sorted(self._known),
            "measured": [member.to_json() for member in self._measured],
            "pool": [member.to_json() for member in self._pool],
            "waiting": list(self._waiting),
            "seed_fitness": self.seed_fitness,
            "reasons": dict(self.reasons),
            "concluded": self._concluded,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._births = state["births"]
        self._counted = state["counted"]
        self._phase = state["phase"]
        self.generation = state["generation"]
        self.best = None if state["best"] is None else Member.from_json(state["best"])
        self._known = set(state["known"])
        self._measured = [Member.from_json(values) for values in state["measured"]]
        self._pool = [Member.from_json(values) for values in state["pool"]]
        self._waiting = deque(state["waiting"])
        self.seed_fitness = dict(state["seed_fitness"])
        self.reasons = Counter(state["reasons"])
        self._concluded = state["concluded"]
