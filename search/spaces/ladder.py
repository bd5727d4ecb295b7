"""Ladders: every gene stands on one of its options, and all of them together meet a budget.

Sparsity levels of matrices and the dropping of blocks are both ladders. Costs are whole numbers of removed weights, so
genes of any shape trade with each other, and the budget is met to half a step of the smallest gene.
Source: layerwise sparsity allocation, sections 5.1 to 5.3; the level switch is that of Sieberling et al. 2025
(EvoPress, arXiv:2410.14649), section 3, made exact for genes of different sizes.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median_low
from typing import Any, ClassVar

from evoprune.metrics.errors import InvalidInput

Genome = tuple[int, ...]
"""One option per gene."""

MOST_MOVES = 8
"""Moves that may follow a switch to meet the budget again; more would be another mutation."""
MANY_MOVES = 64
BESIDE = 0.5
"""Of switches, how many stay within a block: those leave more of what is remembered of the parent."""
_ATTEMPTS = 50
# The part of a gene's ladder that one move may take, so that what a repair has to move is spread.
_SHARE = 16


@dataclass(frozen=True)
class Gene:
    """What one number of a genome decides.

    Attributes:
        name: of a matrix, a group of them, or a part that can be dropped.
        removed: weights that go at each option, from 0 upwards, never decreasing.
        block: index of the first decoder block that it changes.
    """

    name: str
    removed: tuple[int, ...]
    block: int = 0

    def nearest(self, weights: float) -> int:
        """The option that removes most nearly so many weights; the lower of two that are as near."""
        at = bisect_left(self.removed, weights)
        if at == len(self.removed):
            return self._first(at - 1)
        if at and weights - self.removed[at - 1] <= self.removed[at] - weights:
            return self._first(at - 1)
        return at

    def _first(self, option: int) -> int:
        """The lowest option that removes as much as this one: higher ones would be other genomes of one mask."""
        return bisect_left(self.removed, self.removed[option])

    @cached_property
    def step(self) -> int:
        """Weights of its smallest step, 0 if it has only one option."""
        return min(self._steps, default=0)

    @cached_property
    def stride(self) -> int:
        """Weights of its usual step, the median; 0 if it has only one option."""
        return median_low(self._steps) if self._steps else 0

    @property
    def _steps(self) -> list[int]:
        pairs = zip(self.removed, self.removed[1:], strict=False)
        return [high - low for low, high in pairs if high > low]


class LadderSpace(ABC):
    """Genomes that remove `budget` weights, to half a step of the smallest gene: exactly, where all steps are alike.

    Args:
        genes: at least one.
        budget: weights that have to go.

    Attributes:
        job: kind of the jobs that measure a genome, and what these call it.
        spans: how many options a gene may sensibly move at once.

    Raises:
        InvalidInput: there is no gene, or they cannot lose as much.
    """

    job: ClassVar[str]
    spans: Sequence[int]

    @abstractmethod
    def spelled(self, genome: Genome) -> list[Any]:
        """What jobs say of a genome."""

    @abstractmethod
    def shown(self, genome: Genome) -> list[int]:
        """What the history says of a genome: a number for each gene."""

    @abstractmethod
    def words(self, genome: Genome) -> str:
        """A few words of what a genome is."""

    def __init__(self, genes: Sequence[Gene], budget: int) -> None:
        if not genes:
            raise InvalidInput("there is nothing to allocate: no matrix, or none that the granularity names")
        most = sum(gene.removed[-1] for gene in genes)
        if not 0 <= budget <= most:
            raise InvalidInput(f"{budget:,} weights cannot go: the matrices can lose {most:,} in all")
        self.genes = tuple(genes)
        self.budget = budget
        self.tolerance = min((gene.step for gene in genes if gene.step), default=0) // 2

    def removed(self, genome: Genome) -> int:
        """Weights that go."""
        return sum(gene.removed[option] for gene, option in zip(self.genes, genome, strict=True))

    def nearest(self, weights: Sequence[float], rng: random.Random) -> Genome:
        """A genome that meets the budget and is near to so many removed weights per gene.

        Raises:
            InvalidInput: none is found, as where a few parts can only be dropped as a whole.
        """
        return self.repaired([gene.nearest(count) for gene, count in zip(self.genes, weights, strict=True)], rng)

    def repaired(self, options: Sequence[int], rng: random.Random) -> Genome:
        """A genome that meets the budget and is near to these options.

        Raises:
            InvalidInput: see `nearest`.
        """
        for _ in range(_ATTEMPTS):
            if (settled := self._settled([*options], rng, most=MANY_MOVES * len(self.genes))) is not None:
                return settled
        raise self._unreachable()

    def _unreachable(self) -> InvalidInput:
        return InvalidInput(
            f"the steps of {len(self.genes)} genes do not add up to {self.budget:,} weights, to within "
            f"{self.tolerance:,}: choose another sparsity or a finer granularity"
        )

    def switched(self, genome: Genome, rng: random.Random, spans: Sequence[int]) -> Genome | None:
        """A genome after one to three switches: one gene loses more, another as much less.

        Args:
            genome: meets the budget.
            rng: decides.
            spans: how many options a gene may move at once; drawn evenly, cut off at the ladder's end.

        Returns:
            Another genome that meets the budget, or None where the draw leads to none.
        """
        options = list(genome)
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            up = [at for at, gene in enumerate(self.genes) if gene.removed[options[at]] < gene.removed[-1]]
            down = [at for at, option in enumerate(options) if self.genes[at].removed[option] > 0]
            if not up:
                break
            more = rng.choice(up)
            less = [at for at in down if at != more]
            if not less:
                break
            beside = [at for at in less if self.genes[at].block == self.genes[more].block]
            other = rng.choice(beside if beside and rng.random() < BESIDE else less)
            freed = self._move(options, more, rng.choice(spans))
            gene = self.genes[other]
            options[other] = gene.nearest(gene.removed[options[other]] - freed)
        changed = {at for at, (option, before) in enumerate(zip(options, genome, strict=True)) if option != before}
        settled = self._settled(options, rng, most=MOST_MOVES, first=changed)
        return None if settled == genome else settled

    def merged(self, base: Genome, genomes: Sequence[Genome], rng: random.Random) -> Genome | None:
        """What several children of one parent changed, in one genome; of two changes of a gene, the earlier child's.

        Changes of different genes each keep the budget, so there is little to repair.

        Args:
            base: the parent.
            genomes: children of it, the best first.
            rng: decides what is repaired.

        Returns:
            None if that is one of these genomes, or the budget cannot be met by a few moves.
        """
        options = list(base)
        for genome in reversed(genomes):
            for at, (option, before) in enumerate(zip(genome, base, strict=True)):
                if option != before:
                    options[at] = option
        changed = {at for at, (option, before) in enumerate(zip(options, base, strict=True)) if option != before}
        settled = self._settled(options, rng, most=MOST_MOVES, first=changed, never=self._dropped(options))
        return None if settled in (base, *genomes) else settled

    def _dropped(self, options: Sequence[int]) -> Collection[int]:
        """Places of genes of parts that are gone as a whole, which nothing takes halfway back."""
        return ()

    def _move(self, options: list[int], at: int, span: int) -> int:
        """Move a gene by so many options, or to its end; the weights that this removes beyond what it did.

        Args:
            span: not 0; below 0 the gene gets weights back.
        """
        gene = self.genes[at]
        before = gene.removed[options[at]]
        options[at] = gene.nearest(gene.removed[min(max(options[at] + span, 0), len(gene.removed) - 1)])
        if gene.removed[options[at]] == before:  # steps too small to change a weight
            beyond = [removed for removed in gene.removed if (removed > before if span > 0 else removed < before)]
            options[at] = gene.nearest(min(beyond) if span > 0 else max(beyond))
        return gene.removed[options[at]] - before

    def _settled(
        self,
        options: list[int],
        rng: random.Random,
        most: int,
        first: Collection[int] = (),
        never: Collection[int] = (),
    ) -> Genome | None:
        """Genes moved, at random, until the budget is met; None if `most` moves do not do.

        Args:
            first: places of genes to move as long as they can help: a change of fewer genes leaves more of what is
                remembered of the parent.
            never: places of genes that stay where they are.
        """
        residue = self.budget - sum(gene.removed[option] for gene, option in zip(self.genes, options, strict=True))
        for _ in range(most):
            if abs(residue) <= self.tolerance:
                break
            helping = []
            for at, gene in enumerate(self.genes):
                if at in never:
                    continue
                most_here = max(gene.removed[-1] // _SHARE, gene.stride)
                moved = gene.nearest(gene.removed[options[at]] + max(-most_here, min(residue, most_here)))
                change = gene.removed[moved] - gene.removed[options[at]]
                if abs(residue - change) < abs(residue):
                    helping.append((at, moved, change))
            if not helping:
                return None
            at, moved, change = rng.choice([move for move in helping if move[0] in first] or helping)
            options[at] = moved
            residue -= change
        return tuple(options) if abs(residue) <= self.tolerance else None


def by_genome(named: Mapping[str, Genome]) -> dict[str, Genome]:
    """Each genome once, under the first of its names."""
    distinct: dict[Genome, str] = {}
    for name, genome in named.items():
        distinct.setdefault(genome, name)
    return {name: genome for genome, name in distinct.items()}
