"""Genomes of parts of blocks: every change of one keeps the budget, and whole parts come and go only as such.

Source: layerwise sparsity allocation, sections 5.2 and 5.3.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from itertools import accumulate

from evoprune.search.spaces.ladder import MANY_MOVES, MOST_MOVES, Genome, LadderSpace
from evoprune.search.spaces.levels import DROP_SHARE
from evoprune.search.spaces.part_genes import PartGene

SPANS = (*(1,) * 27, 2, 3, 4)
"""Rungs that a switch takes at once: one in ten takes several."""
TYPE_MIX = 0.2
"""Of switches, how many let one kind of part lose what the other gains."""
MERGE_SHARE = 0.1
"""Of switches, how many merge what is gone into a block before, or no longer, where that may be."""
NEIGHBOURS = 2
"""Blocks on either side of a part that comes or goes which make up for it first."""
# Of what a gene can lose, how much one move of a repair may take, so that what it has to move is spread.
_SHARE = 16

Move = tuple[int, int, int]
"""A gene's place, the option where it goes, and the cost that this removes."""


class PartSpace(LadderSpace):
    """Genomes of parts that remove the budget or at most `tolerance` more.

    Args:
        genes: each loses something at its last option.
        budget: cost that has to go; the genes can lose as much.
        tolerance: by how much more may go; None lets one MLP at a time stand between its rungs, and then it is less
            than a neuron. Numbers of neurons must all be options then, each at the same cost.

    Attributes:
        parts: the genes.
        room: how far beside the budget the rungs alone may be, for what is missed goes to the MLP between them.
        spans: how many rungs a gene may sensibly move at once.
    """

    def __init__(self, genes: Sequence[PartGene], budget: int, tolerance: int | None) -> None:
        super().__init__(genes, budget)
        self.parts = tuple(genes)
        self.spans = SPANS
        self._mlps = [at for at, gene in enumerate(self.parts) if gene.part == "mlp"]
        self._fine = tolerance is None
        self.tolerance = max(self.parts[at].removed[1] for at in self._mlps) - 1 if tolerance is None else tolerance
        steps = [step for at in self._mlps for step in self.parts[at].rung_steps]
        self.room = self.tolerance + max(steps, default=0) // 2 if self._fine else 0

    def switched(self, genome: Genome, rng: random.Random, spans: Sequence[int]) -> Genome | None:
        if self._merging(genome) and rng.random() < MERGE_SHARE:
            return self._remerged(genome, rng)
        if any(gene.gone is not None for gene in self.parts) and rng.random() < DROP_SHARE:
            return self._toggled(genome, rng)
        options = list(genome)
        self._to_rungs(options)
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            self._switch(options, rng, rng.choice(spans))
        changed = {at for at, (option, before) in enumerate(zip(options, genome, strict=True)) if option != before}
        settled = self._settled(options, rng, most=MOST_MOVES, first=changed, between=self._between(genome))
        return None if settled == genome else settled

    def crossed(self, first: Genome, second: Genome, rng: random.Random) -> Genome | None:
        """Some blocks of one parent and the others of another: cut where both have lost as much, or drawn evenly.

        Returns:
            None if that is one of the parents, or the budget cannot be met.
        """
        lost = [
            [0, *accumulate(gene.removed[option] for gene, option in zip(self.parts, genome, strict=True))]
            for genome in (first, second)
        ]
        ends = [at for at in range(1, len(self.parts)) if self.parts[at - 1].block != self.parts[at].block]
        cuts = [at for at in ends if abs(lost[0][at] - lost[1][at]) <= self.tolerance]
        if cuts and rng.random() < 0.5:
            cut = rng.choice(cuts)
            options = [*first[:cut], *second[cut:]]
        else:
            from_first = {block: rng.random() < 0.5 for block in dict.fromkeys(gene.block for gene in self.parts)}
            options = [
                one if from_first[gene.block] else other
                for gene, one, other in zip(self.parts, first, second, strict=True)
            ]
        settled = self._settled(options, rng, most=MANY_MOVES * len(self.parts))
        return None if settled in (first, second) else settled

    def _switch(self, options: list[int], rng: random.Random, span: int) -> None:
        """One gene loses some, another gets back as much, or nearly; nothing where none can."""
        gone = self._dropped(options)
        up = [at for at in range(len(options)) if at not in gone and options[at] < self.parts[at].rungs[-1]]
        if not up:
            return
        more = rng.choice(up)
        down = [at for at in range(len(options)) if at not in gone and at != more and options[at] > 0]
        mixed = rng.random() < TYPE_MIX
        kindred = [at for at in down if (self.parts[at].part != self.parts[more].part) == mixed]
        if not down:
            return
        less = rng.choice(kindred or down)
        gene, before = self.parts[more], options[more]
        way = rng.choice(gene.ways(before, losing=True))
        options[more] = way[min(span, len(way)) - 1]
        gene, freed = self.parts[less], gene.removed[options[more]] - gene.removed[before]
        goal = gene.removed[options[less]] - freed
        way = rng.choice(gene.ways(options[less], losing=False))
        options[less] = min(way, key=lambda option: abs(gene.removed[option] - goal))

    def _toggled(self, genome: Genome, rng: random.Random) -> Genome | None:
        """A part dropped, or one that is gone given what others keep; those around it make up for it."""
        options = list(genome)
        at = rng.choice([at for at, gene in enumerate(self.parts) if gene.gone is not None])
        gene = self.parts[at]
        mean = self.removed(genome) / sum(other.removed[-1] for other in self.parts)
        options[at] = gene.rung(mean * gene.removed[-1]) if gene.is_gone(options[at]) else gene.choices[-1]
        near = {
            other
            for other, neighbour in enumerate(self.parts)
            if other != at and abs(neighbour.block - gene.block) <= NEIGHBOURS
        }
        most = MANY_MOVES * len(self.parts)
        settled = self._settled(options, rng, most, first=near, never=(at,), between=self._between(genome))
        return None if settled == genome else settled

    def _merging(self, options: Sequence[int]) -> list[int]:
        """Blocks of which something is gone that could be merged into one before."""
        found, before = [], set()
        for gene, option in zip(self.parts, options, strict=True):
            if not gene.is_gone(option):
                before.add(gene.part)
            elif gene.merged is not None and gene.part in before:
                found.append(gene.block)
        return list(dict.fromkeys(found))

    def _remerged(self, genome: Genome, rng: random.Random) -> Genome | None:
        """What is gone of a block merged into one before, or no longer; of several parts one alone, or all of them."""
        block = rng.choice(self._merging(genome))
        places = sorted(at for at in self._dropped(genome) if self.parts[at].block == block)
        chosen = places if rng.random() < 0.5 else [rng.choice(places)]
        merge = not all(genome[at] == self.parts[at].merged for at in chosen)
        options = list(genome)
        for at in chosen:
            target = self.parts[at].merged if merge else self.parts[at].gone
            options[at] = options[at] if target is None else target
        found = self._with_places_to_merge(options)
        return None if found == genome else found

    def _with_places_to_merge(self, options: Sequence[int]) -> Genome:
        """The genome of these options, in which nothing is merged that has no part before it to be merged into."""
        found, before = list(options), set()
        for at, (gene, option) in enumerate(zip(self.parts, options, strict=True)):
            if not gene.is_gone(option):
                before.add(gene.part)
            elif option == gene.merged and gene.part not in before:
                assert gene.gone is not None
                found[at] = gene.gone
        return tuple(found)

    def _dropped(self, options: Sequence[int]) -> Collection[int]:
        return {at for at, (gene, option) in enumerate(zip(self.parts, options, strict=True)) if gene.is_gone(option)}

    def _between(self, options: Sequence[int]) -> list[int]:
        """Places of genes that stand between rungs."""
        return [
            at
            for at in self._mlps
            if not self.parts[at].is_gone(options[at]) and options[at] not in self.parts[at].rung_set
        ]

    def _to_rungs(self, options: list[int]) -> None:
        for at in self._between(options):
            gene = self.parts[at]
            options[at] = gene.rung(gene.removed[options[at]])

    def _settled(
        self,
        options: list[int],
        rng: random.Random,
        most: int,
        first: Collection[int] = (),
        never: Collection[int] = (),
        between: Sequence[int] = (),
    ) -> Genome | None:
        """As of all ladders; where nothing helps, something goes or returns by the least that is too much.

        Args:
            between: places of genes that stood between rungs before, and may again.
        """
        between = [*between, *self._between(options)]
        self._to_rungs(options)
        residue = self.budget - self.removed(tuple(options))
        for _ in range(most + 1):
            if self._missed(residue) <= self.room and self._fine:
                residue -= self._fill(options, rng, residue, first, never, between)
            if self._missed(residue) == 0:
                return self._with_places_to_merge(options)
            moves = self._moves(options, residue, never)
            helping = [move for move in moves if self._missed(residue - move[2]) < self._missed(residue)]
            chosen = [move for move in helping if move[0] in first] or helping
            if not chosen and moves:
                least = min(self._missed(residue - move[2]) for move in moves)
                chosen = [move for move in moves if self._missed(residue - move[2]) == least]
            if not (chosen := chosen or self._whole_parts(options, residue, never)):
                return None
            at, target, change = rng.choice(chosen)
            options[at] = target
            residue -= change
        return None

    def _missed(self, residue: int) -> int:
        """By how much the budget is missed, if so much has still to go."""
        return max(residue, -residue - self.tolerance, 0)

    def _moves(self, options: Sequence[int], residue: int, never: Collection[int]) -> list[Move]:
        """Steps of all genes that are not gone towards the budget."""
        found = []
        for at, (gene, option) in enumerate(zip(self.parts, options, strict=True)):
            if at in never or gene.is_gone(option):
                continue
            before = gene.removed[option]
            ways = gene.ways(option, losing=residue > 0)
            if gene.part == "attention":
                targets = [way[0] for way in ways]
            else:
                most = gene.removed[-1] // _SHARE
                near = gene.rung(before + max(-most, min(residue, most)))
                targets = [near if near != option else way[0] for way in ways]
            found += [(at, target, gene.removed[target] - before) for target in targets]
        return found

    def _whole_parts(self, options: Sequence[int], residue: int, never: Collection[int]) -> list[Move]:
        """Parts dropped, or brought back as small as they get: for where no gene has a step towards the budget."""
        found = []
        for at, (gene, option) in enumerate(zip(self.parts, options, strict=True)):
            if at in never or gene.gone is None or gene.is_gone(option) == (residue > 0):
                continue
            target = gene.rungs[-1] if gene.is_gone(option) else gene.gone
            found.append((at, target, gene.removed[target] - gene.removed[option]))
        return found

    def _fill(
        self,
        options: list[int],
        rng: random.Random,
        residue: int,
        first: Collection[int],
        never: Collection[int],
        between: Sequence[int],
    ) -> int:
        """Move one MLP by as many neurons as the budget is missed by; the cost that this removes, 0 if none can."""
        gone = self._dropped(options)
        free = [at for at in self._mlps if at not in gone and at not in never]
        rng.shuffle(free)
        free.sort(key=lambda at: (at not in between, at not in first))
        for at in free:
            neuron = self.parts[at].removed[1]
            target = options[at] - (-residue // neuron)
            if 0 <= target <= self.parts[at].rungs[-1]:
                change = (target - options[at]) * neuron
                options[at] = target
                return change
        return 0
