"""Formulas from statistics of matrices to sparsities, evolved: formulas are bred, their levels are measured."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from evoprune.metrics.allocation_formula import AllocationFormula, Statistics
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.expression import parse
from evoprune.metrics.files import content_hash
from evoprune.metrics.formula_library import FORMULAS
from evoprune.metrics.site_terminals import SITE_TERMINALS, structure
from evoprune.search.breeders import BREEDERS, BreederPlugin
from evoprune.search.spaces.formulas import FormulaSpace
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace

POPULATION = 24
FINALISTS = 4
_TOURNAMENT = 4
_CROSSOVER = 0.3
_IMMIGRANTS = 0.08
_ATTEMPTS_PER_CHILD = 40


@dataclass(frozen=True)
class Known:
    """A formula that was proposed: the shortest of those found that ask for its levels.

    Attributes:
        expression, spread: of the formula.
        how: it came about.
        generation: that proposed its levels first.
        kl: what these were worth in their first stage; None before, and where they have no fitness.
    """

    expression: str
    spread: float
    how: str
    generation: int
    kl: float | None = None

    @property
    def formula(self) -> AllocationFormula:
        """The formula itself."""
        return AllocationFormula(parse(self.expression, SITE_TERMINALS), self.spread)


class Formulas:
    """Genetic programming of allocation formulas, the published ones first.

    The best so many formulas are parents, whatever their age: all are measured on the same windows. Formulas that ask
    for the same levels are one candidate, measured once; the shortest stands for them.

    Args:
        space: of levels, one for each matrix.
        seed: of the run; draws come from the generation's own generator.
        statistics: what formulas may read, by name of a terminal.
        given: a formula to start from beside the published ones.

    Raises:
        InvalidInput: the given one reads what is not known of the matrices.
    """

    origin = "formula"
    redraw = False
    crosses = False

    def __init__(
        self,
        space: LevelSpace,
        seed: int,
        statistics: Statistics | None = None,
        given: AllocationFormula | None = None,
    ) -> None:
        assert len(space.genes) == len(space.sites)  # options are levels of matrices then
        self.statistics = structure(space.sites) if statistics is None else dict(statistics)
        self._levels = space
        self._sizes = [(site.out_features, site.in_features) for site in space.sites]
        self._formulas = FormulaSpace(self.statistics)
        self._queue = deque(
            (f"published:{name}", entry.formula)
            for name, entry in FORMULAS.items()
            if set(entry.formula.reads) <= self.statistics.keys()
        )
        if given is not None:
            given.scores(self.statistics)
            self._queue.appendleft(("given", given))
        self._generation = 0
        self._known: dict[str, Known] = {}

    def children(self, parent: Genome, count: int, rng: random.Random) -> Sequence[Genome]:
        self._generation += 1
        found: dict[Genome, None] = {}
        parents = self._best(POPULATION)
        for _ in range(_ATTEMPTS_PER_CHILD * count):
            if len(found) == count:
                break
            bred, how = self._next(parents, rng)
            formula = self._formulas.born(bred)
            genome = None if formula is None else self._genome(formula)
            if formula is None or genome is None or genome == parent:
                continue
            key = content_hash(genome)
            known = self._known.get(key)
            if known is None:
                self._known[key] = Known(formula.expression.text, formula.spread, how, self._generation)
                found[genome] = None
            elif formula.expression.size < known.formula.expression.size:
                self._known[key] = replace(known, expression=formula.expression.text, spread=formula.spread, how=how)
        return list(found)

    def _next(self, parents: Sequence[Known], rng: random.Random) -> tuple[AllocationFormula, str]:
        if self._queue:
            how, formula = self._queue.popleft()
            return formula, how
        if len(parents) < 2 or rng.random() < _IMMIGRANTS:
            return self._formulas.sample(rng), "random"
        first = self._chosen(parents, rng)
        if rng.random() < _CROSSOVER:
            child, name = self._formulas.crossover(first, self._chosen(parents, rng), rng)
            return child, f"crossover:{name}"
        child, name = self._formulas.mutate(first, rng)
        return child, f"mutate:{name}"

    def _chosen(self, parents: Sequence[Known], rng: random.Random) -> AllocationFormula:
        """The winner of a tournament; `parents` are ordered, the best first."""
        return parents[min(rng.randrange(len(parents)) for _ in range(_TOURNAMENT))].formula

    def _best(self, count: int) -> list[Known]:
        """Those with a fitness, the best first; of equals the shorter, then by text."""
        measured = [known for known in self._known.values() if known.kl is not None]
        measured.sort(key=lambda known: (known.kl, len(known.expression), known.expression, known.spread))
        return measured[:count]

    def _genome(self, formula: AllocationFormula) -> Genome | None:
        """What the formula asks for; None where levels do not add up to the budget."""
        try:
            genome = tuple(formula.levels(self.statistics, self._sizes, self._levels.sparsity))
        except InvalidInput:
            return None
        missed = abs(self._levels.removed(genome) - self._levels.budget)
        return genome if missed <= self._levels.tolerance else None

    def tell(self, genome: Genome, kl: float | None) -> None:
        key = content_hash(genome)
        if key in self._known:
            self._known[key] = replace(self._known[key], kl=kl)

    def note(self, genome: Genome) -> Mapping[str, Any]:
        known = self._known.get(content_hash(genome))
        if known is None:
            return {}
        return {"formula": {"expression": known.expression, "spread": known.spread, "how": known.how}}

    def finalists(self) -> Mapping[Genome, int]:
        found = {self._genome(known.formula): known.generation for known in self._best(FINALISTS)}
        return {genome: generation for genome, generation in found.items() if genome is not None}

    def state(self) -> Any:
        return {
            "queued": len(self._queue),
            "generation": self._generation,
            "known": {key: asdict(known) for key, known in self._known.items()},
        }

    def restore(self, state: Any) -> None:
        while len(self._queue) > state["queued"]:
            self._queue.popleft()
        self._generation = state["generation"]
        self._known = {key: Known(**values) for key, values in state["known"].items()}


BREEDERS.add(
    "formula",
    BreederPlugin("formulas from statistics of matrices to sparsities, evolved", Formulas, reads=tuple(SITE_TERMINALS)),
)
