"""Levels of matrices: sparsities in steps of 1/256, or all or nothing for what is dropped as a whole."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from evoprune.metrics.column_steps import nearest_moves
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.ranks import GONE
from evoprune.metrics.records import LEVELS, Site, is_attention, removed_count
from evoprune.search.spaces.ladder import MANY_MOVES, Gene, Genome, LadderSpace

Granularity = Literal["matrix", "block", "kind"]
Droppable = Literal["none", "parts", "blocks"]

SPANS = (1, 2, 4, 8, 16, 32, 64)
"""How many of 256 levels a gene moves at once: a quarter of a row at most, for some matrices do best nearly empty."""

DROP_SHARE = 0.2
"""Of mutations where matrices have levels and parts can be dropped too."""

# What is asked of two parts is the same if it differs by less: it comes from sums of floats.
_NOISE_DECIMALS = 9


class LevelSpace(LadderSpace):
    """Genomes of levels that remove `sparsity` of all weights: to half a usual step of the smallest gene, if stored.

    Args:
        sites: the matrices, in model order.
        sparsity: fraction of all their weights that goes, in (0, 1).
        granularity: what has a level of its own.
        drop: what may go as a whole: nothing, the attention or the MLP of a block, or a block.
        only: levels are all or nothing; needs something to drop.
        stored: from 1 to 255, the only levels of a matrix beside 0 and what is dropped; None has all of them.

    Attributes:
        sites: the matrices.
        only: levels are all or nothing.
        spans: how many options a gene may sensibly move at once.

    Raises:
        InvalidInput: the budget is beyond the highest level, there is no matrix, or the options contradict each other.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        sparsity: float,
        granularity: Granularity = "matrix",
        drop: Droppable = "none",
        *,
        only: bool = False,
        stored: Sequence[int] | None = None,
    ) -> None:
        if only and drop == "none":
            raise InvalidInput("nothing may be dropped, and nothing else may be done: say what may be dropped")
        self.sites = tuple(sites)
        self.only = only
        self.sparsity = sparsity
        parts = _grouped(self.sites, drop) if drop != "none" else {}
        groups = parts if only else _grouped(self.sites, granularity)
        if parts and not only and granularity != "matrix":
            raise InvalidInput(f"parts can be dropped where matrices have levels of their own, not each {granularity}")
        within = range(LEVELS) if stored is None else (0, *stored)
        self._levels = (0, GONE) if only else (*within, *([GONE] if parts else []))
        most = SPANS[-1] if stored is None else max(len(stored) // 4, 1)
        self.spans = tuple(span for span in SPANS if span <= most)
        self._members = list(groups.values())
        # Where matrices are genes, their places are those of the genes.
        self._parts = [] if only else list(parts.values())
        genes = []
        for name, members in groups.items():
            matrices = [self.sites[at] for at in members]
            removed = tuple(
                sum(site.out_features * removed_count(level / LEVELS, site.in_features) for site in matrices)
                for level in self._levels
            )
            genes.append(Gene(name, removed, min(site.block for site in matrices)))
        super().__init__(genes, removed_count(sparsity, sum(site.weights for site in self.sites)))
        if stored is not None and not only:
            # The ends of a grid may lie nearer, but few genes stand where that helps.
            self.tolerance = min(gene.stride for gene in genes) // 2

    job = "levels"

    def spelled(self, genome: Genome) -> list[int]:
        return self.levels(genome)

    def words(self, genome: Genome) -> str:
        return span_text(level / LEVELS for level in self.levels(genome))

    def levels(self, genome: Genome) -> list[int]:
        """The level of every matrix, in model order."""
        found = [0] * len(self.sites)
        for members, option in zip(self._members, genome, strict=True):
            for at in members:
                found[at] = self._levels[option]
        return found

    def shown(self, genome: Genome) -> list[int]:
        """The level of every gene, which all of its matrices have."""
        return [self._levels[option] for option in genome]

    def even(self, sparsity: float, rng: random.Random) -> list[float]:
        """Sparsities, for `near`, that allocations are compared with: the same everywhere, or chance among parts."""
        found = [sparsity] * len(self.sites)
        if self.only:
            for members in self._members:
                share = rng.random()
                for at in members:
                    found[at] = share
        return found

    def near(self, sparsities: Sequence[float], rng: random.Random) -> Genome:
        """A genome near to these sparsities that meets the budget.

        Where levels are all or nothing, the parts that are asked for most go first, the earlier of equals, until the
        budget is met; where parts in this order miss it, they are exchanged, the fewest weights that bring it nearest.

        Args:
            sparsities: of every matrix, in model order; matrices that share a level get their mean, by weights. Any
                numbers, where they only rank.
            rng: decides what is moved to meet the budget; nothing, where sparsities rank.

        Raises:
            InvalidInput: see `nearest`; or all parts are asked for alike, which does not say what goes.
        """
        if len(sparsities) != len(self.sites):
            raise InvalidInput(f"{len(sparsities)} sparsities for {len(self.sites)} matrices")
        removed = [sparsity * site.weights for sparsity, site in zip(sparsities, self.sites, strict=True)]
        wanted = [math.fsum(removed[at] for at in members) for members in self._members]
        return self._ranked(wanted) if self.only else self.nearest(wanted, rng)

    def _ranked(self, wanted: Sequence[float]) -> Genome:
        """Parts dropped in the order of what is asked of them; arguments as in `nearest`."""
        sizes = [gene.removed[-1] for gene in self.genes]
        shares = [round(weights / size, _NOISE_DECIMALS) for weights, size in zip(wanted, sizes, strict=True)]
        if len(set(shares)) == 1:
            raise InvalidInput(f"the same is asked of all {len(sizes)} parts: that does not say which of them go")
        order = sorted(range(len(sizes)), key=lambda at: -shares[at])
        left, count = self.budget, 0
        while count < len(order) and sizes[order[count]] <= left:
            left -= sizes[order[count]]
            count += 1
        going, staying = order[:count], order[count:]
        if abs(left) > self.tolerance:
            rooms = {
                size: (sum(sizes[at] == size for at in going), sum(sizes[at] == size for at in staying))
                for size in sizes
            }
            for size, moves in nearest_moves(left, rooms).items():
                left -= moves * size
                if moves > 0:
                    going += [at for at in staying if sizes[at] == size][:moves]
                else:
                    back = [at for at in going if sizes[at] == size][moves:]
                    going = [at for at in going if at not in back]
        if abs(left) > self.tolerance:
            raise self._unreachable()
        return tuple(int(at in going) for at in range(len(sizes)))

    def switched(self, genome: Genome, rng: random.Random, spans: Sequence[int]) -> Genome | None:
        if self._parts and rng.random() < DROP_SHARE:
            return self._toggled(genome, rng)
        return super().switched(genome, rng, spans)

    def _dropped(self, options: Sequence[int]) -> Collection[int]:
        return {at for part in self._parts if all(self._levels[options[at]] == GONE for at in part) for at in part}

    def _toggled(self, genome: Genome, rng: random.Random) -> Genome | None:
        """A part dropped, or one that is gone given the mean sparsity; the others make up for it."""
        options = list(genome)
        part = rng.choice(self._parts)
        gone = all(self._levels[options[at]] == GONE for at in part)
        mean = self.removed(genome) / sum(gene.removed[-1] for gene in self.genes)
        for at in part:
            gene = self.genes[at]
            options[at] = gene.nearest(mean * gene.removed[-1]) if gone else len(gene.removed) - 1
        settled = self._settled(options, rng, most=MANY_MOVES * len(self.genes), never=part)
        return None if settled == genome else settled


def span_text(sparsities: Iterable[float]) -> str:
    """Such as ``matrices from 0% to 98%``."""
    known = list(sparsities)
    return f"matrices from {min(known):.0%} to {max(known):.0%}"


def reference_name(only: bool) -> str:
    """What the sparsities of `LevelSpace.even` are called."""
    return "random" if only else "uniform"


def spread_levels(sparsities: tuple[float, float], count: int) -> tuple[int, ...]:
    """Levels to store for searches between two budgets: `count` in equal steps, and 255, where next to nothing stays.

    The steps reach from half of the lower budget to where a quarter of what the higher one leaves still stays, and one
    of them is at the middle of the budgets. They are equal, so that genes of one shape trade with each other exactly.

    Args:
        sparsities: least and most that goes, in (0, 1); one budget twice.
        count: at least 4.

    Returns:
        Ascending, from 1 to 255; a few less than asked for where steps of 1/256 leave no room.
    """
    low, high = sparsities
    bottom, top = LEVELS * low / 2, LEVELS * (1 - (1 - high) / 4)
    step = max(round((top - bottom) / (count - 1)), 1)
    middle = round(LEVELS * (low + high) / 2)
    below = int((middle - bottom) // step)
    found = (middle + step * (at - below) for at in range(count))
    return tuple(sorted({LEVELS - 1, *(level for level in found if 0 < level < LEVELS)}))


def part_of(site: Site) -> str:
    """The part of a block that a matrix belongs to: ``attention`` or ``mlp``."""
    return "attention" if is_attention(site.kind) else "mlp"


def _grouped(sites: Sequence[Site], by: Granularity | Droppable) -> dict[str, list[int]]:
    """Places of matrices by the name of what they belong to."""
    groups: dict[str, list[int]] = {}
    for at, site in enumerate(sites):
        block = f"block {site.block}"
        part = f"{block} {part_of(site)}"
        name = {"matrix": site.name, "kind": site.kind, "block": block, "blocks": block, "parts": part}[by]
        groups.setdefault(name, []).append(at)
    return groups
