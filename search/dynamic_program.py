"""Shapes whose errors, part by part, add up to the least at a budget; and SPDY, which searches for weights of them.

Source: Kurtic et al. 2023 (ZipLM, arXiv:2302.04089), structured SPDY; Frantar and Alistarh 2022 (SPDY,
arXiv:2201.13096); layerwise sparsity allocation, sections 2.5 and 3.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from evoprune.fitness.allocators.dp import MAX_UNITS, least_error
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import derived_seed
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.parts import PartSpace

DRAWS = 100
"""Draws of all weights before the best of them is changed a little at a time."""
CHANGED = 0.1
"""Share of the weights that such a change draws anew."""
UNITS = 10_000
"""Parts of the budget in which SPDY tells costs apart: it solves a program for each candidate."""
_ATTEMPTS = 20


def least_error_genome(
    space: PartSpace, errors: Sequence[Sequence[float]], rng: random.Random, *, units: int = MAX_UNITS
) -> Genome:
    """The genome whose parts have the least sum of errors, each part taken by itself.

    Args:
        space: where it is in; of an MLP the rungs count, and what they miss the budget by goes to one of them.
        errors: of every gene at each of its `choices`, 0 or more.
        rng: decides which MLP that is.
        units: see `least_error`.

    Raises:
        InvalidInput: errors and choices differ in number, or no sum of steps meets the budget.
    """
    for gene, row in zip(space.parts, errors, strict=True):
        if len(row) != len(gene.choices):
            raise InvalidInput(f"{gene.name} has {len(gene.choices)} choices, but {len(row)} errors are given")
    costs = [[gene.removed[option] for option in gene.choices] for gene in space.parts]
    low, high = max(space.budget - space.room, 0), space.budget + max(space.tolerance, space.room)
    levels = least_error(errors, costs, low, most=high, units=units)
    return space.repaired([gene.choices[level] for gene, level in zip(space.parts, levels, strict=True)], rng)


class Spdy:
    """Searches for weights of the errors of parts whose least sum is at a good model. Ask and tell.

    The first candidate weighs all alike; `draws` draw every weight from [0, 1); those after change a tenth of the best
    weights so far. Each is what the weighted errors have their least sum at. What is drawn depends on the seed, on how
    many were drawn before and on what was told, so the same calls give the same candidates.

    Args:
        space, errors, units: see `least_error_genome`.
        seed: of the run.
        draws, changed: see `DRAWS` and `CHANGED`.

    Attributes:
        best: the genome told to be worth the most, None before.
        value: what it is worth, low is good.
    """

    def __init__(
        self,
        space: PartSpace,
        errors: Sequence[Sequence[float]],
        seed: int,
        *,
        draws: int = DRAWS,
        changed: float = CHANGED,
        units: int = UNITS,
    ) -> None:
        self._space, self._errors, self._seed = space, [[*row] for row in errors], seed
        self._draws, self._changed, self._units = draws, changed, units
        self._drawn = 0
        self._weights: list[float] = []
        self._pending: list[tuple[list[float], Genome]] = []
        self._known: dict[Genome, None] = {}
        self.best: Genome | None = None
        self.value = float("inf")

    def propose(self, count: int) -> list[Genome]:
        """At most so many genomes that were not proposed before; none if the weights lead to no others.

        The best of the draws has to be known before its weights are changed, so a batch ends with the draws.

        Raises:
            InvalidInput: see `least_error_genome`; or what was proposed last is not told yet.
        """
        if self._pending:
            raise InvalidInput(f"{len(self._pending)} candidates were proposed and have no value yet: tell it first")
        drawing = self._drawn <= self._draws or self.best is None
        for _ in range(_ATTEMPTS * count):
            if len(self._pending) == count or (drawing and self._pending and self._drawn > self._draws):
                break
            rng = random.Random(derived_seed(self._seed, "spdy", self._drawn))
            weights = self._draw(rng)
            self._drawn += 1
            weighted = [[weight * error for error in row] for weight, row in zip(weights, self._errors, strict=True)]
            genome = least_error_genome(self._space, weighted, rng, units=self._units)
            if genome not in self._known:
                self._known[genome] = None
                self._pending.append((weights, genome))
        return [genome for _, genome in self._pending]

    def tell(self, values: Sequence[float | None]) -> None:
        """What the genomes proposed last are worth, in their order; None if one has no value.

        Raises:
            InvalidInput: there are more or fewer.
        """
        if len(values) != len(self._pending):
            raise InvalidInput(f"{len(values)} values for {len(self._pending)} candidates")
        for value, (weights, genome) in zip(values, self._pending, strict=True):
            if value is not None and value < self.value:
                self.value, self.best, self._weights = value, genome, weights
        self._pending = []

    def _draw(self, rng: random.Random) -> list[float]:
        count = len(self._errors)
        if self._drawn == 0:
            return [1.0] * count
        if self._drawn <= self._draws or self.best is None:
            return [rng.random() for _ in range(count)]
        weights = [*self._weights]
        for at in rng.sample(range(count), max(round(self._changed * count), 1)):
            weights[at] = rng.random()
        return weights

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as JSON values."""
        return {
            "drawn": self._drawn,
            "weights": self._weights,
            "pending": [[weights, list(genome)] for weights, genome in self._pending],
            "known": [list(genome) for genome in self._known],
            "best": None if self.best is None else list(self.best),
            "value": None if self.best is None else self.value,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._drawn = state["drawn"]
        self._weights = [*state["weights"]]
        self._pending = [([*weights], tuple(genome)) for weights, genome in state["pending"]]
        self._known = dict.fromkeys(tuple(genome) for genome in state["known"])
        self.best = None if state["best"] is None else tuple(state["best"])
        self.value = float("inf") if state["value"] is None else state["value"]
