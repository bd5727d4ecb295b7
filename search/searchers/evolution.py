"""Age-regularised evolution on islands, with seeds from the catalogue and tuning of exponents.

Every applied result frees one birth, the oldest member of an island dies, parents are winners of tournaments that
prefer the smaller of equals. Sources: symbolic pruning metrics, section 6 (P2, P4, P5); Real et al. 2019,
arXiv:1802.01548 (age regularisation); Luke and Panait 2002 (double tournament).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from deap import tools

from evoprune.metrics.expression import Expression, parse
from evoprune.search.archive import Archive
from evoprune.search.candidate import Candidate
from evoprune.search.searchers import SEARCHERS, Proposal
from evoprune.search.searchers.tuner import MAX_PARAMETERS, Tuner, parameters, parametrised, skeleton
from evoprune.search.spaces.symbolic import MetricSpace
from evoprune.search.spaces.trees import seeded_deap

POWER_PRODUCT = "mul(abs(W),mul(powc(X_l2,{a}),powc(G_l2,{b})))"
POWER_PRODUCT_FORWARD = "mul(abs(W),powc(X_l2,{a}))"

# The rung at which points of a tuner are compared. They differ little, so the first one has too few tokens for them.
TUNING_RUNG = 1
MAX_TUNERS = 4

# So good a candidate is tuned though a simpler one is better: a new structure seldom comes with the right numbers.
TUNED_RANK = 8

_POWER_GRID = (
    (0.5, 0.5),
    (0.0, 0.5),
    (0.0, 0.75),
    (0.25, 0.25),
    (0.25, 0.5),
    (0.25, 0.75),
    (0.5, 0.25),
    (0.5, 0.75),
    (1.0, 0.25),
    (1.0, 0.5),
)
_POWER_GRID_FORWARD = ((0.25,), (0.5,), (0.75,), (1.25,), (1.5,))


class Evolution:
    """Genetic programming over metrics.

    Args:
        space: what is bred.
        archive: hall of fame, kept by the search; parents are drawn from it too.
        seeds: given metrics by name, evaluated first.
        population: members over all islands.
        islands: number of them.
        crossover: share of bred births that mix two parents.
        tuning: share of births for exponents and constants, while there is something to tune.
        immigrants: share of births drawn at random.
        tournament: candidates compared to choose a parent.
        power_budget: evaluations for the tuned power product.
    """

    def __init__(
        self,
        space: MetricSpace,
        archive: Archive,
        seeds: Mapping[str, Expression],
        *,
        population: int = 64,
        islands: int = 4,
        crossover: float = 0.25,
        tuning: float = 0.35,
        immigrants: float = 0.05,
        tournament: int = 5,
        power_budget: int = 30,
    ) -> None:
        self._space = space
        self._archive = archive
        self._crossover = crossover
        self._tuning = tuning
        self._immigrants = immigrants
        self._tournament = tournament
        self._queue = deque(
            Proposal(expression, f"seed:{name}", island=index % islands)
            for index, (name, expression) in enumerate(seeds.items())
        )
        self._islands: list[deque[Candidate]] = [deque(maxlen=max(population // islands, 2)) for _ in range(islands)]
        self._tuners: dict[int, Tuner] = {}
        self._tuned: set[str] = set()
        self._tuner_number = 0
        if power_budget > 0:
            self._add_power_tuner(power_budget)

    def propose(self, birth: int, rng: random.Random) -> Proposal:
        if self._queue:
            return self._queue.popleft()
        island = birth % len(self._islands)
        members = self._islands[island]
        power = self._tuners.get(0)
        if power is not None and not power.finished:
            proposal = self._tuned_proposal(0, power)
            if proposal is not None:
                return proposal
        if rng.random() < self._tuning:
            for number, tuner in self._tuners.items():
                proposal = self._tuned_proposal(number, tuner)
                if proposal is not None:
                    return proposal
        if len(members) < 4 or rng.random() < self._immigrants:
            return Proposal(self._space.sample(rng), "random", island=island)
        first = self._parent(island, rng)
        if rng.random() < self._crossover:
            second = self._parent(rng.randrange(len(self._islands)) if rng.random() < 0.1 else island, rng)
            child, name = self._space.crossover(first.expression, second.expression, rng)
            return self._bred(child, f"crossover:{name}", (first, second), island)
        child, name = self._space.mutate(first.expression, rng)
        return self._bred(child, f"mutate:{name}", (first,), island)

    def tell(self, proposal: Proposal, candidate: Candidate | None, value: float | None) -> None:
        if proposal.token is not None:
            number, point = proposal.token
            tuner = self._tuners.get(number)
            if tuner is not None:
                tuner.tell(point, value, None if candidate is None else candidate.birth)
                if tuner.finished:
                    del self._tuners[number]
        if candidate is None:
            return
        self._islands[candidate.island].append(candidate)
        if len(self._tuners) < MAX_TUNERS and (candidate in self._archive.front or self._rank(candidate) < TUNED_RANK):
            self._consider_tuning(candidate)

    def state(self) -> dict[str, Any]:
        return {
            "queued": len(self._queue),
            "islands": [[member.to_json() for member in island] for island in self._islands],
            "tuners": {str(number): tuner.state() for number, tuner in self._tuners.items()},
            "tuned": sorted(self._tuned),
            "tuner_number": self._tuner_number,
        }

    def restore(self, state: dict[str, Any]) -> None:
        while len(self._queue) > state["queued"]:
            self._queue.popleft()
        for island, members in zip(self._islands, state["islands"], strict=True):
            island.clear()
            island.extend(Candidate.from_json(member) for member in members)
        self._tuners = {int(number): Tuner.from_state(kept) for number, kept in state["tuners"].items()}
        self._tuned = set(state["tuned"])
        self._tuner_number = state["tuner_number"]

    def _parent(self, island: int, rng: random.Random) -> Candidate:
        if rng.random() < 0.1 and self._archive.front:
            return rng.choice(self._archive.front)
        members: Sequence[Candidate] = self._islands[island] or self._archive.front
        with seeded_deap(rng):
            return tools.selDoubleTournament(
                list(members), 1, fitness_size=self._tournament, parsimony_size=1.2, fitness_first=True
            )[0]

    def _rank(self, candidate: Candidate) -> int:
        """How many living members are better."""
        return sum(member.fitness > candidate.fitness for island in self._islands for member in island)

    def _bred(self, child: Expression, origin: str, parents: tuple[Candidate, ...], island: int) -> Proposal:
        return Proposal(
            child,
            origin,
            tuple(parent.birth for parent in parents),
            evolved=True,
            evolved_parent=any(parent.evolved for parent in parents),
            island=island,
        )

    def _add_power_tuner(self, budget: int) -> None:
        """The power product is the baseline that a winner has to beat, so it is tuned first, and well."""
        backward = "G_l2" in self._space.terminals
        text = POWER_PRODUCT if backward else POWER_PRODUCT_FORWARD
        if "X_l2" not in self._space.terminals:
            return
        template = parse(text.format(a=1, b=1))
        grid = _POWER_GRID if backward else _POWER_GRID_FORWARD
        self._add_tuner(Tuner(template, parent=None, value=None, island=0, budget=budget, grid=grid))

    def _consider_tuning(self, candidate: Candidate) -> None:
        template = parametrised(candidate.expression)
        name = skeleton(template)
        if name in self._tuned or not 1 <= len(parameters(template)) <= MAX_PARAMETERS:
            return
        self._add_tuner(
            Tuner(
                template,
                parent=candidate.birth,
                value=candidate.rungs[min(TUNING_RUNG, len(candidate.rungs) - 1)],
                island=candidate.island,
                evolved_parent=candidate.evolved,
            )
        )

    def _add_tuner(self, tuner: Tuner) -> None:
        self._tuned.add(skeleton(tuner.template))
        self._tuners[self._tuner_number] = tuner
        self._tuner_number += 1

    def _tuned_proposal(self, number: int, tuner: Tuner) -> Proposal | None:
        point = tuner.propose()
        if point is None:
            return None
        index, expression = point
        return Proposal(
            expression,
            "power" if tuner.given else "tune",
            () if tuner.parent is None else (tuner.parent,),
            evolved=not tuner.in_grid,
            evolved_parent=tuner.evolved_parent,
            island=tuner.island,
            token=(number, index),
            rung=TUNING_RUNG,
        )


SEARCHERS.add("evolution", Evolution)
