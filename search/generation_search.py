"""Search by generations: children of one parent, more text for fewer candidates, the best is the next parent.

A generation is a number of children of one parent. Each stage measures them on the same windows of text and keeps the
best few for the next stage, which reads on where this one ended: nothing is measured twice. The parent is measured with
them throughout, so that its hidden states are at hand, and competes in the last stage. Windows are drawn anew for every
generation, so that nobody wins by fitting them. A few children bring together what the best children of the last
parent changed. Seeds are measured on as much text as the last stage but one has; SPDY, if asked, finds one more there.
The last parents and the best seed are then compared on one long text, the same for all, and the best is the result.

Where a selection is given, seeds, the last stage and the finals measure what becomes of a candidate after a recovery,
once for each candidate and on all windows; what a pool reads of it are its own windows.

Where what candidates are made of is rebuilt around the parent, every so many generations, all of the next generation
are measured on what was rebuilt, the parent again too. Finalists stay with what they were measured on last, so each is
compared as it would be made.
Source: Sieberling et al. 2025 (EvoPress, arXiv:2410.14649), section 3; layerwise sparsity allocation, section 5.3a.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evoprune.metrics.files import content_hash, derived_seed
from evoprune.search.breeders import Breeder
from evoprune.search.config_allocation import seed_stage
from evoprune.search.dynamic_program import Spdy
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.loop import Birth
from evoprune.search.pooled_search import Member, PooledSearch, Space
from evoprune.search.result import standard_error
from evoprune.search.spaces.ladder import Genome
from evoprune.search.surrogate import Surrogate

FINALISTS = 8
MATES = 3
"""Others of the last stage whose changes may be added to the parent's."""
SPDY = "spdy"
"""Name of the seed that SPDY finds."""
PROPOSALS = 4
"""Proposals for each child where a surrogate chooses; every fourth child is none of its choice."""


@dataclass(frozen=True)
class Stage:
    """One round of selection.

    Attributes:
        windows: of text, that each candidate is measured on by the end of it, those of earlier stages included.
        survivors: how many go on.
    """

    windows: int
    survivors: int


class GenerationSearch(PooledSearch[Space]):
    """Births of genomes of one budget, by generations.

    Args:
        space, seeds, seed, evaluations, identity, payload: see `PooledSearch`.
        breeder: makes the children.
        stages: of a generation, each with more windows than the one before and fewer survivors; the last keeps one.
        windows: windows of text B that there are.
        final_windows: of these, how many the finalists are measured on, from the first.
        offspring: children of a generation.
        crossover: whether some of them bring changes together, where the breeder allows it.
        surrogate: chooses children from more proposals before they are measured, by what generations have shown.
        spdy: finds one more seed after all others, in batches of `offspring`; what others have measured it is told.
        spdy_evaluations: how many of the evaluations its candidates may take.
        selection: what a candidate goes through before seeds, the last stage and the finals measure it, as jobs of the
            kind ``recovered`` say it; None is nothing.
        rebuild_every: generations between two rebuilds of the database around the parent; None is never.

    Attributes:
        rebuilds: ``database`` and ``path`` of each, as jobs of the kind ``rebuilt`` returned them.
        finals: members that were compared at the end, the best first.
    """

    def __init__(
        self,
        space: Space,
        seeds: Mapping[str, Genome],
        breeder: Breeder,
        stages: Sequence[Stage],
        *,
        windows: int,
        final_windows: int,
        offspring: int,
        crossover: bool,
        surrogate: bool,
        seed: int,
        evaluations: int | None,
        identity: str,
        payload: Mapping[str, Any],
        spdy: Spdy | None = None,
        spdy_evaluations: int = 0,
        selection: Mapping[str, Any] | None = None,
        rebuild_every: int | None = None,
    ) -> None:
        self._spdy = spdy
        self._spdy_left = spdy_evaluations
        self._proposed: list[Genome] = []
        self._started: list[Member] = []
        self._breeder = breeder
        self._rebuild_every = rebuild_every
        self.rebuilds: list[dict[str, Any]] = []
        self.selection = None if selection is None else dict(selection)
        self._stages = tuple(stages)
        self._windows = windows
        self._final_windows = final_windows
        self._offspring = offspring
        self._crossover = crossover and breeder.crosses
        self._surrogate = Surrogate(space) if surrogate else None
        self._stage = 0
        self._parent: Member | None = None
        self._base: Genome | None = None
        self._mates: list[Member] = []
        self._parents: list[Member] = []
        self.finals: list[Member] = []
        super().__init__(space, seeds, seed=seed, evaluations=evaluations, identity=identity, payload=payload)

    @property
    def found_seeds(self) -> dict[str, Genome]:
        """Seeds that were found by searching, by name."""
        return {} if self._spdy is None or self._spdy.best is None else {SPDY: self._spdy.best}

    def _counts(self, member: Member) -> bool:
        if self._phase == "generation":
            return self._stage == 0 and not self._is_parent(member)
        return self._phase == "seeds"

    @property
    def recovered(self) -> tuple[int | str, ...]:
        """What the history calls the pools that are measured after a recovery."""
        return () if self.selection is None else ("seeds", len(self._stages) - 1, "final")

    @property
    def _recovers(self) -> bool:
        """Whether the present pool is measured after a recovery."""
        return self._stage_name() in self.recovered

    def _known_before(self, member: Member, first: int, last: int) -> Member:
        return member.anew() if self._recovers else super()._known_before(member, first, last)

    def _job(self, member: Member, start: Genome, first: int, last: int) -> Job:
        payload = {**self.payload_of(member), self.space.job: self.space.spelled(member.genome)}
        if self._phase == "rebuild":
            return Job(self._key(member, "rebuilt", len(self.rebuilds)), "rebuilt", payload)
        if self._recovers:
            # Neither the pool nor its windows: what a candidate recovers is measured once.
            key = self._key(member, "recovered", self.selection)
            return Job(key, "recovered", {**payload, "selection": self.selection})
        return super()._job(member, start, first, last)

    def payload_of(self, member: Member) -> dict[str, Any]:
        if not member.rebuild:
            return self.payload
        return {**self.payload, "database": self.rebuilds[member.rebuild - 1]["database"]}

    def _key(self, member: Member, *asked: Any) -> str:
        return super()._key(member, *asked, *(["rebuild", member.rebuild] if member.rebuild else []))

    def _measurement(self, values: Mapping[str, Any], first: int, last: int) -> tuple[float, float]:
        if "recovered" not in values:
            return super()._measurement(values, first, last)
        losses = values["kl"][first:last]
        return math.fsum(losses) / len(losses), standard_error(losses)

    def _is_parent(self, member: Member) -> bool:
        return self._parent is not None and member.genome == self._parent.genome

    def _origins(self, member: Member) -> tuple[str, list[int], Genome]:
        if self._parent is None:
            return member.origin, [], member.genome
        parent = self._parent
        assert parent.birth is not None
        if self._phase != "generation":
            return member.origin, [], parent.genome
        same = self._is_parent(member)
        bred_from = [parent.birth] if same or not member.parents else [*member.parents]
        return "parent" if same else member.origin, bred_from if self._stage == 0 else [], parent.genome

    def apply(self, birth: Birth, outcome: Outcome | None) -> dict[str, Any]:
        if birth.record["stage"] != "rebuild":
            return super().apply(birth, outcome)
        assert outcome is not None and self._parent is not None
        if outcome.status == "ok":
            self.rebuilds.append(dict(outcome.values))
            # All may be tried again; what the parent was measured on is not comparable any more.
            self._known = {content_hash(list(self._parent.genome))}
            self._parent = replace(self._parent.anew(), rebuild=len(self.rebuilds))
        else:
            assert outcome.reason is not None
            self.reasons[outcome.reason] += 1
        line = {
            "birth": birth.number,
            **{name: birth.record[name] for name in ("origin", "parents", "generation", "stage", "windows")},
            "genome": self.space.shown(self._parent.genome),
            "counted": False,
            "kl": None,
            "reason": outcome.reason,
        }
        self._breed()
        return line

    def _take_in(self, member: Member, birth: Birth) -> dict[str, Any]:
        note = dict(self.note(member.genome))
        if birth.counted and isinstance(birth.record["stage"], int):
            self._breeder.tell(member.genome, member.kl)
            if self._surrogate is not None:
                self._surrogate.tell(self.generation, member.genome, member.kl)
        return note

    def note(self, genome: Genome) -> Mapping[str, Any]:
        """What the breeder says of a candidate beside its genome."""
        return self._breeder.note(genome)

    def _advance(self) -> None:
        ranked = self._ranked(self._measured)
        if self._phase == "seeds":
            self._started += self._measured
            if self._ask_spdy():
                return
            self._seeds_measured(self._started)
            self.seeds |= self._named_late()
            self._follow(self._ranked(self._started))
        elif self._phase == "final":
            self.best = ranked[0] if ranked else None
            self.finals = ranked
            self._enter([])
        elif self._concluded and self._stage + 1 < len(self._stages):
            self._finish()
        else:
            last = self._stage + 1 == len(self._stages)
            children = [member for member in ranked if last or not self._is_parent(member)]
            if not children:
                self._breed()  # nobody of this generation can be measured, but the parent has other children
            elif last:
                self._follow(children)
            else:
                parent = [member for member in self._measured if self._is_parent(member)]
                survivors = children[: self._stages[self._stage].survivors]
                self._stage += 1
                self._enter([*parent, *survivors])

    def _ask_spdy(self) -> bool:
        """Have the next candidates of SPDY measured; False where it has no more, or no more evaluations."""
        if self._spdy is None:
            return False
        known = {member.genome: member.kl for member in self._started}
        while True:
            self._spdy.tell([known.get(genome) for genome in self._proposed])
            left = min(
                self._spdy_left, self._spdy_left if self._evaluations is None else self._evaluations - self._counted
            )
            count = 0 if self._concluded else min(left, self._offspring)
            self._proposed = self._spdy.propose(count) if count else []
            if not self._proposed:
                return False
            new = [genome for genome in self._proposed if genome not in known]
            self._spdy_left -= len(new)
            if new:
                self._enter([Member(genome, f"seed:{SPDY}") for genome in new])
                return True

    def _named_late(self) -> dict[str, Genome]:
        """The `found_seeds` that are no other seed's genome."""
        return {name: genome for name, genome in self.found_seeds.items() if genome not in self.seeds.values()}

    def _follow(self, ranked: Sequence[Member]) -> None:
        """The best of a generation is the parent of the next; without one, nothing can go on."""
        if not ranked:
            self._enter([])
            return
        winner, *others = ranked
        self._base = None if self._parent is None else self._parent.genome
        self._mates = others[:MATES]
        if not self._parents or _made(winner) != _made(self._parents[-1]):
            self._parents.append(winner)
        self._parent = self.best = winner
        self._known.add(content_hash(list(winner.genome)))
        if self._rebuilds_now:
            self._phase = "rebuild"
            self._enter([winner])
        else:
            self._breed()

    @property
    def _rebuilds_now(self) -> bool:
        """Whether the database is rebuilt before the next generation, which there must be."""
        spent = self._evaluations is not None and self._counted >= self._evaluations
        if self._rebuild_every is None or not self.generation or self._concluded or spent:
            return False
        return self.generation % self._rebuild_every == 0

    def _breed(self) -> None:
        """The next generation, or the finals if the budget is spent or nothing new is found."""
        left = self._offspring if self._evaluations is None else self._evaluations - self._counted
        self.generation += 1
        self._stage = 0
        children = [] if self._concluded else self._children(min(self._offspring, left))
        if children:
            assert self._parent is not None
            self._phase = "generation"
            self._enter([self._parent, *children])  # its pass is the one that the others may start from
        else:
            self._finish()

    def _finish(self) -> None:
        """The finals: the last parents, the best seed and whom the breeder names, on one long text."""
        self._phase = "final"
        seen = {_made(member): member for member in [*self._parents[:1], *self._parents[-FINALISTS:]]}
        for genome, generation in self._breeder.finalists().items():
            named = Member(genome, self._breeder.origin, generation=generation)
            seen.setdefault(_made(named), named)
        self._enter(list(seen.values()))

    def _children(self, count: int) -> list[Member]:
        assert self._parent is not None
        if count < 1:
            return []
        rng = random.Random(derived_seed(self._seed, "generation", self.generation))
        if self._surrogate is None or not self._surrogate.ready:
            return self._proposals(count, rng)
        proposals = {member.genome: member for member in self._proposals(PROPOSALS * count, rng)}
        quarter = -(-count // PROPOSALS)
        # Spread over all, for crossings come first.
        free = list(proposals)[:: max(len(proposals) // quarter, 1)][:quarter]
        rest = [genome for genome in proposals if genome not in free]
        chosen = [*free, *self._surrogate.best(rest, count - len(free))]
        return [proposals[genome] for genome in chosen]

    def _proposals(self, count: int, rng: random.Random) -> list[Member]:
        """At most so many children of the parent, some of them by crossing."""
        assert self._parent is not None
        crossed = self._crossed(rng) if self._crossover else {}
        bred = [
            Member(genome, self._breeder.origin, generation=self.generation, rebuild=len(self.rebuilds))
            for genome in self._breeder.children(self._parent.genome, max(count - len(crossed), 0), rng)
            if genome not in crossed and content_hash(list(genome)) not in self._known
        ]
        return [*crossed.values(), *bred][:count]

    def _crossed(self, rng: random.Random) -> dict[Genome, Member]:
        """What the best children of the last parent changed, together: the best with each other, and all."""
        if self._base is None or self._parent is None:
            return {}
        others = [member for member in self._mates if member.genome != self._base]
        found: dict[Genome, Member] = {}
        for mates in [[mate] for mate in others] + ([others] if len(others) > 1 else []):
            together = [member for member in (self._parent, *mates) if member.genome != self._base]
            genome = self.space.merged(self._base, [member.genome for member in together], rng)
            if genome is None or content_hash(list(genome)) in self._known:
                continue
            births = tuple(member.birth for member in (self._parent, *mates) if member.birth is not None)
            found[genome] = Member(
                genome, "crossover", generation=self.generation, parents=births, rebuild=len(self.rebuilds)
            )
        return found

    def _span(self) -> tuple[int, int]:
        if self._phase == "rebuild":
            return 0, 0
        if self._phase == "final":
            return 0, self._final_windows
        if self._phase == "seeds":
            # Seeds differ by much, and the best has yet to hold its own against its children.
            return 0, self._stages[seed_stage(len(self._stages))].windows
        most, windows = self._stages[-1].windows, self._stages[self._stage].windows
        if not self._breeder.redraw:
            return 0, windows
        offset = derived_seed(self._seed, "windows", self.generation) % (self._windows - most + 1)
        return offset, offset + windows

    def _stage_name(self) -> int | str:
        return self._stage if self._phase == "generation" else self._phase

    def conclude(self) -> bool:
        if not self._concluded:
            self._concluded = True
            # The last stage has cost the most, and is nearly over.
            midway = self._phase == "generation" and self._stage + 1 < len(self._stages)
            if midway and self._break_off():
                self._finish()
            elif self._proposed and self._break_off():
                self._advance()
        return True

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "stage": self._stage,
            "parent": None if self._parent is None else self._parent.to_json(),
            "base": None if self._base is None else list(self._base),
            "mates": [member.to_json() for member in self._mates],
            "parents": [member.to_json() for member in self._parents],
            "finals": [member.to_json() for member in self.finals],
            "rebuilds": self.rebuilds,
            "breeder": self._breeder.state(),
            "surrogate": None if self._surrogate is None else self._surrogate.state(),
            "spdy": None if self._spdy is None else self._spdy.state(),
            "spdy_left": self._spdy_left,
            "proposed": [list(genome) for genome in self._proposed],
            "started": [member.to_json() for member in self._started],
        }

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._stage = state["stage"]
        self._parent = None if state["parent"] is None else Member.from_json(state["parent"])
        self._base = None if state["base"] is None else tuple(state["base"])
        self._mates = [Member.from_json(values) for values in state["mates"]]
        self._parents = [Member.from_json(values) for values in state["parents"]]
        self.finals = [Member.from_json(values) for values in state["finals"]]
        self.rebuilds = list(state["rebuilds"])
        self._breeder.restore(state["breeder"])
        if self._surrogate is not None:
            self._surrogate.restore(state["surrogate"])
        if self._spdy is not None:
            self._spdy.restore(state["spdy"])
            self.seeds |= self._named_late() if self._phase != "seeds" else {}
        self._spdy_left = state["spdy_left"]
        self._proposed = [tuple(genome) for genome in state["proposed"]]
        self._started = [Member.from_json(values) for values in state["started"]]


def _made(member: Member) -> tuple[Genome, int]:
    """What decides the model that a member stands for."""
    return member.genome, member.rebuild
