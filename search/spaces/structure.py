"""Shapes of models: KV groups, query heads and neurons that stay in every block, or whole parts that go, at a budget.

Source: layerwise sparsity allocation, sections 5.1 to 5.3. Heads and neurons trade with each other here, which
published structured searches never let them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from evoprune.fitness.allocators.dp import least_error
from evoprune.fitness.part_merges import Merged, read_block, spelled_block
from evoprune.fitness.unit_costs import Kept, MlpCost, PartCosts, UnitCosts
from evoprune.fitness.units import PARTS
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site, removed_count
from evoprune.metrics.shape import BlockWidths
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import part_of
from evoprune.search.spaces.part_genes import Heads, PartGene, attention_gene, mlp_gene, with_merging
from evoprune.search.spaces.parts import PartSpace

DropParts = Literal["none", "parts"]

STEPS = 32
"""Steps of an MLP's ladder where nobody says otherwise, about."""
# Times are met to this part of what may be spent.
_TIME_SLACK = 200
# Parts of all costs that sums are told apart by, to say which budget could be met.
_BUCKETS = 20_000
# Ten thousandths below a budget that are tried, to say one that can be met.
_TRIES = 10
# A budget that can be met whatever may go.
_HARDLY = 1e-6
_NAMES = {"kv_bytes": "bytes of keys and values", "flops": "operations", "latency": "time", "parameters": "parameters"}


class StructureSpace(PartSpace):
    """Genomes of shapes that remove `fraction` of what heads and MLPs cost, and hardly more.

    As on all ladders, option 0 of a gene removes nothing; where parts may go, the last one is the whole part.
    Hardly: less than a neuron more, where one MLP at a time may stand between the rungs of its ladder; else at most a
    usual step of the smallest gene; of times 0.5 % of what may be spent.

    Args:
        costs: of every block.
        fraction: of `costs.dense` that goes, in (0, 1).
        heads: what of attentions may go.
        drop: whether whole parts may go.
        merge: whether what goes as a whole may be merged into the same part of a block before.
        step: of the ladders of MLPs, in neurons; by default such that there are about 32 in the widest.
        multiple: what numbers of neurons are multiples of, but for those of a dense MLP and of the one between rungs.
        residual: whether one MLP may stand between rungs; never, where costs are from a table or neurons have none.

    Attributes:
        costs, fraction: as given.

    Raises:
        InvalidInput: the budget is out of reach, or the options contradict each other or the model.
    """

    job = "shape"

    def __init__(
        self,
        costs: UnitCosts,
        fraction: float,
        *,
        heads: Heads = "both",
        drop: DropParts = "none",
        merge: bool = False,
        step: int | None = None,
        multiple: int = 1,
        residual: bool = True,
    ) -> None:
        if not 0 < fraction < 1:
            raise InvalidInput(f"a budget of {fraction:g} is outside (0, 1): give the fraction that goes")
        self.costs, self.fraction = costs, fraction
        self._options = {"heads": heads, "drop": drop, "step": step, "multiple": multiple, "residual": residual}
        if merge:
            self._options["merge"] = True
        if heads == "balanced" and all(width.heads_per_group == 1 for width in costs.widths):
            raise InvalidInput("every KV group has one query head, so none can go and leave the group: choose groups")
        fine = residual and all(isinstance(mlp, MlpCost) and mlp.per_neuron for mlp in costs.mlp)
        genes = _genes(costs, heads, drop == "parts", _neuron_step(costs, step, multiple), fine)
        if merge:
            if drop == "none":
                raise InvalidInput(
                    "nothing goes as a whole that could be merged: let parts be dropped, or do not merge"
                )
            genes = [with_merging(gene) for gene in genes]
        if not genes:
            raise InvalidInput(
                f"nothing that may go costs any {_NAMES[costs.quantity]}: let KV groups go, by heads groups or both, "
                "or whole parts"
            )
        budget, most = removed_count(fraction, costs.dense), sum(gene.removed[-1] for gene in genes)
        if budget > most:
            raise InvalidInput(
                f"{self._words(fraction)} of heads and MLPs cannot go: what may go makes up "
                f"{self._words(math.floor(1e4 * most / costs.dense) / 1e4)}, so give that or less, or let more go"
            )
        if fine:
            tolerance = None
        elif costs.quantity == "latency":
            tolerance = max((costs.dense - budget) // _TIME_SLACK, 1)
        else:
            tolerance = min(gene.stride for gene in genes)
        super().__init__(genes, budget, tolerance)
        self._place = {(gene.block, gene.part): at for at, gene in enumerate(genes)}

    @classmethod
    def at_speedup(cls, costs: UnitCosts, speedup: float, **options: Any) -> StructureSpace:
        """Shapes that make the whole model cost `speedup` times less.

        Args:
            costs, options: see the class.
            speedup: above 1.

        Raises:
            InvalidInput: see the class; so much is out of reach, and what is not.
        """
        most = sum(gene.removed[-1] for gene in cls(costs, _HARDLY, **options).parts)
        reachable = costs.speedup_at(most / costs.dense)
        if speedup >= reachable:
            raise InvalidInput(
                f"a speedup of {speedup:g} cannot be: all that may go makes one of "
                f"{math.floor(1e3 * reachable) / 1e3:g}, so give that or less, or let more go"
            )
        return cls(costs, costs.fraction_at(speedup), **options)

    def shape(self, genome: Genome) -> list[Kept]:
        """What every block keeps: KV groups, query heads in each, neurons."""
        found = []
        for block, width in enumerate(self.costs.widths):
            attention, mlp = self._place.get((block, "attention")), self._place.get((block, "mlp"))
            dense = (width.groups, width.heads_per_group)
            groups, heads = dense if attention is None else self.parts[attention].kept[genome[attention]]
            (neurons,) = (width.neurons,) if mlp is None else self.parts[mlp].kept[genome[mlp]]
            found.append((groups, heads, neurons))
        return found

    def merging(self, genome: Genome) -> list[Merged]:
        """Whether the attention and the MLP of every block are merged into those of one before."""
        merged = {
            (gene.block, gene.part) for gene, option in zip(self.parts, genome, strict=True) if option == gene.merged
        }
        blocks = range(len(self.costs.widths))
        return [((block, "attention") in merged, (block, "mlp") in merged) for block in blocks]

    def merged_as(self, genome: Genome, merging: Sequence[Merged]) -> Genome:
        """The genome in which of what is gone is merged what is merged here, where it may and can be."""
        asked = {
            (block, part)
            for block, of_block in enumerate(merging)
            for part, goes in zip(PARTS, of_block, strict=True)
            if goes
        }
        options = [
            gene.merged
            if gene.merged is not None and gene.is_gone(option) and (gene.block, gene.part) in asked
            else option
            for gene, option in zip(self.parts, genome, strict=True)
        ]
        return self._with_places_to_merge(options)

    def even(self) -> list[float]:
        """What `near` is given to have the same everywhere."""
        return [self.fraction] * (2 * len(self.costs.widths))

    def near(self, sparsities: Sequence[float], rng: random.Random) -> Genome:
        """A genome near to these sparsities that meets the budget.

        Args:
            sparsities: fraction of the cost that goes, of the attention and the MLP of every block in turn; any number.
            rng: decides what is moved to meet the budget.

        Raises:
            InvalidInput: there are too many or too few, or the steps do not add up to the budget.
        """
        if len(sparsities) != 2 * len(self.costs.widths):
            raise InvalidInput(f"{len(sparsities)} sparsities for {2 * len(self.costs.widths)} parts of blocks")
        wanted = [sparsities[2 * gene.block + (gene.part == "mlp")] * gene.whole for gene in self.parts]
        return self.nearest(wanted, rng)

    def near_shape(self, shape: Sequence[Kept], rng: random.Random) -> Genome:
        """A genome near to what every block keeps here, which may be of another budget; arguments as of `near`.

        Raises:
            InvalidInput: it is of another number of blocks, or the steps do not add up to the budget.
        """
        if len(shape) != len(self.costs.widths):
            raise InvalidInput(f"a shape of {len(shape)} blocks for a model of {len(self.costs.widths)}")
        options = []
        for gene in self.parts:
            groups, heads, neurons = shape[gene.block]
            kept = (groups, heads) if gene.part == "attention" else (neurons,)
            if kept in gene.kept:
                options.append(gene.kept.index(kept))
            else:
                costs = self.costs.attention if gene.part == "attention" else self.costs.mlp
                options.append(gene.nearest(gene.whole - costs[gene.block].at(*kept)))
        return self.repaired(options, rng)

    def spelled(self, genome: Genome) -> list[list[int]]:
        pairs = zip(self.shape(genome), self.merging(genome), strict=True)
        return [spelled_block(kept, merged) for kept, merged in pairs]

    def shown(self, genome: Genome) -> list[int]:
        """What `spelled` says of every block, in one list."""
        return [count for block in self.spelled(genome) for count in block]

    def words(self, genome: Genome) -> str:
        return shape_text(self.shape(genome))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, that `from_json` reads."""
        return {"costs": self.costs.to_json(), "fraction": self.fraction, **self._options}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StructureSpace:
        """The inverse of `to_json`."""
        options = {name: value for name, value in values.items() if name not in ("costs", "fraction")}
        return cls(UnitCosts.from_json(values["costs"]), values["fraction"], **options)

    def repaired(self, options: Sequence[int], rng: random.Random) -> Genome:
        try:
            return super().repaired(options, rng)
        except InvalidInput:
            # Where steps are coarse, moves drawn at random miss what meets the budget.
            if (found := self._by_program(options, self.budget, self.budget + self.tolerance)) is None:
                raise
            return found

    def _by_program(self, options: Sequence[int], least: int, most: int) -> Genome | None:
        """The genome nearest to these options that removes so much; None if there is none."""
        costs = [[gene.removed[choice] for choice in gene.choices] for gene in self.parts]
        here = [gene.removed[option] for gene, option in zip(self.parts, options, strict=True)]
        moved = [[abs(cost - removed) for cost in row] for row, removed in zip(costs, here, strict=True)]
        levels = least_error(moved, costs, max(least, 0), most=most)
        found = tuple(gene.choices[level] for gene, level in zip(self.parts, levels, strict=True))
        return found if least <= self.removed(found) <= most else None

    def _unreachable(self) -> InvalidInput:
        return InvalidInput(
            f"no shape was found that removes {self._words(self.fraction)} of heads and MLPs, or up to "
            f"{self.tolerance / self.costs.dense:.2g} more: choose another budget, such as "
            f"{self._words(self._nearest_reachable())}, or finer steps"
        )

    def _words(self, fraction: float) -> str:
        """A fraction of the costs, for people; of time also as what the whole model gains, rounded down."""
        words = f"{fraction:.4g} of the {_NAMES[self.costs.quantity]}"
        if self.costs.quantity != "latency":
            return words
        return f"{words} (a speedup of {math.floor(1e3 * self.costs.speedup_at(fraction)) / 1e3:g})"

    def _nearest_reachable(self) -> float:
        """The fraction next to the budget that some sum of rungs removes, in ten thousandths."""
        unit = max(self.costs.dense // _BUCKETS, 1)
        reached = np.zeros(2 * _BUCKETS, dtype=bool)
        reached[0] = True
        for gene in self.parts:
            after = np.zeros_like(reached)
            for place in {round(gene.removed[option] / unit) for option in gene.choices}:
                after[place:] |= reached[: len(reached) - place]
            reached = after
        # Where everything goes there is no model left, and no fraction to ask for.
        sums = [place for place in np.flatnonzero(reached) if place * unit < self.costs.dense]
        beyond = [place for place in sums if not self.budget <= place * unit <= self.budget + self.tolerance]
        nearest = float(min(beyond, key=lambda place: abs(place * unit - self.budget)) * unit / self.costs.dense)
        dense = [0] * len(self.parts)
        # Sums of rounded costs are not the sums themselves, and a budget is met from above.
        for below in range(_TRIES):
            fraction = math.floor(1e4 * nearest - below) / 1e4
            least = removed_count(fraction, self.costs.dense)
            if fraction > 0 and self._by_program(dense, least, least + self.tolerance) is not None:
                return fraction
        return nearest


def shape_text(shape: Sequence[Sequence[int]]) -> str:
    """Such as ``30 query heads, 2,100 neurons``, of what every block keeps."""
    read = [read_block(block) for block in shape]
    heads, neurons = (sum(counts) for counts in zip(*((kept[0] * kept[1], kept[2]) for kept, _ in read), strict=True))
    merged = sum(sum(parts) for _, parts in read)
    return f"{heads:,} query heads, {neurons:,} neurons" + (f", {merged} parts merged" if merged else "")


def ladders(costs: UnitCosts, step: int | None, multiple: int = 1) -> list[list[int]]:
    """Numbers of neurons on the ladder of each block's MLP, ascending, without the dense one.

    Args:
        costs: of neurons, each more than nothing.
        step, multiple: see `StructureSpace`.

    Raises:
        InvalidInput: the steps are too large.
    """
    size = _neuron_step(costs, step, multiple)
    return [list(range(size, width.neurons, size)) for width in costs.widths]


def part_sparsities(sites: Sequence[Site], sparsities: Sequence[float]) -> list[float]:
    """What allocators ask of matrices as what `StructureSpace.near` is asked of parts: means by weights.

    Args:
        sites: the matrices of the decoder blocks, in model order.
        sparsities: one for each.

    Returns:
        One for the attention and the MLP of every block in turn.
    """
    wanted: dict[tuple[int, str], list[tuple[float, int]]] = {}
    for site, sparsity in zip(sites, sparsities, strict=True):
        wanted.setdefault((site.block, part_of(site)), []).append((sparsity, site.weights))
    return [
        math.fsum(sparsity * weights for sparsity, weights in found) / sum(weights for _, weights in found)
        for block in sorted({block for block, _ in wanted})
        for found in (wanted[block, "attention"], wanted[block, "mlp"])
    ]


def _neuron_step(costs: UnitCosts, step: int | None, multiple: int) -> int:
    """Neurons from rung to rung."""
    neurons = [width.neurons for width in costs.widths]
    most = min(neurons) // 2
    if not 1 <= multiple <= most:
        raise InvalidInput(f"numbers of neurons cannot be multiples of {multiple}: give 1 to {most}, half of an MLP")
    found = max(round(max(neurons) / STEPS / multiple), 1) * multiple if step is None else step
    if found % multiple or not 1 <= found <= most:
        number = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
        raise InvalidInput(f"steps of {found} neurons: give {number} of at most {most}, half of an MLP")
    return found


def _genes(costs: UnitCosts, heads: Heads, drop: bool, step: int, fine: bool) -> list[PartGene]:
    """Of every block attention and MLP, without those that can lose nothing."""
    # Equal blocks share their tables, which have an entry for every neuron.
    made: dict[tuple[str, BlockWidths, PartCosts], PartGene] = {}
    found = []
    for block, width in enumerate(costs.widths):
        for part, cost in (("attention", costs.attention[block]), ("mlp", costs.mlp[block])):
            key = (part, width, cost)
            if key not in made:
                made[key] = (
                    attention_gene(block, width, cost, heads, drop=drop)
                    if part == "attention"
                    else mlp_gene(block, width, cost, step, fine=fine, drop=drop)
                )
            if made[key].removed[-1]:
                found.append(replace(made[key], name=f"block {block} {part}", block=block))
    return found
