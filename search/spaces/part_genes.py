"""Genes of parts of blocks: what an attention or an MLP may keep, and where steps from there lead."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from evoprune.fitness.unit_costs import CostTable, PartCosts
from evoprune.metrics.shape import BlockWidths
from evoprune.search.spaces.ladder import Gene

Heads = Literal["whole", "groups", "balanced", "both"]
"""What of an attention may go: nothing but all of it, KV groups, as many query heads of every group, or both."""
Part = Literal["attention", "mlp"]


@dataclass(frozen=True)
class PartGene(Gene):
    """What one part of a block keeps.

    Attributes:
        part: which.
        kept: what stays at each option: (KV groups, query heads in each), or (neurons,).
        rungs: options where it usually stands, ascending; others are for one gene alone, to meet a budget.
        gone: the option where the whole part goes; None if it may not.
        merged: the option behind it, where the part goes and is merged into the same one of a block before; None if it
            may not.
        whole: cost of the dense part.
    """

    part: Part = "mlp"
    kept: tuple[tuple[int, ...], ...] = ()
    rungs: tuple[int, ...] = ()
    gone: int | None = None
    merged: int | None = None
    whole: int = 0

    @cached_property
    def choices(self) -> tuple[int, ...]:
        """The rungs, and the option where the whole part goes if there is one."""
        return self.rungs if self.gone is None else (*self.rungs, self.gone)

    @cached_property
    def rung_set(self) -> frozenset[int]:
        """The rungs, to ask whether an option is one."""
        return frozenset(self.rungs)

    def is_gone(self, option: int) -> bool:
        """Whether the whole part goes."""
        return self.gone is not None and option >= self.gone

    def rung(self, removed: float) -> int:
        """The rung that removes most nearly so much, the lower of two as near; never the whole part."""
        costs = self._rung_costs
        at = bisect_left(costs, removed)
        if at == len(costs) or (at and removed - costs[at - 1] <= costs[at] - removed):
            at -= 1
        return self.rungs[at]

    def ways(self, option: int, *, losing: bool) -> Sequence[Sequence[int]]:
        """Where steps from a rung lead, the nearest first: a list of rungs for each kind of unit that can go or return.

        Of an attention these are KV groups, and query heads of each group; the next rungs, if its costs leave neither.
        """
        if self.part == "attention" and (lines := self._lines[option, losing]):
            return lines
        at = bisect_left(self.rungs, option)
        found = self.rungs[at + 1 :] if losing else self.rungs[:at][::-1]
        return [found] if found else []

    @cached_property
    def rung_steps(self) -> list[int]:
        """Costs of steps from rung to rung."""
        return [high - low for low, high in zip(self._rung_costs, self._rung_costs[1:], strict=False)]

    @cached_property
    def _rung_costs(self) -> list[int]:
        return [self.removed[rung] for rung in self.rungs]

    @cached_property
    def _lines(self) -> dict[tuple[int, bool], list[list[int]]]:
        return {
            (option, losing): [line for axis in (0, 1) if (line := self._line(option, axis, losing))]
            for option in self.rungs
            for losing in (False, True)
        }

    def _line(self, option: int, axis: int, losing: bool) -> list[int]:
        """Rungs that differ from an option in one count, which is lower if something is lost."""
        here = self.kept[option]
        others = [rung for rung in self.rungs if rung != option and self.kept[rung][1 - axis] == here[1 - axis]]
        line = [rung for rung in others if (self.kept[rung][axis] < here[axis]) == losing]
        return sorted(line, key=lambda rung: abs(self.kept[rung][axis] - here[axis]))


def attention_gene(block: int, width: BlockWidths, costs: PartCosts, heads: Heads, *, drop: bool) -> PartGene:
    """The gene of an attention.

    Raises:
        InvalidInput: a table of costs lacks the dense attention.
    """
    dense = (width.groups, width.heads_per_group)
    groups = range(1, width.groups + 1) if heads in ("groups", "both") else dense[:1]
    each = range(1, width.heads_per_group + 1) if heads in ("balanced", "both") else dense[1:]
    options: Iterable[tuple[int, ...]] = ((kept, per_group) for kept in groups for per_group in each)
    if isinstance(costs, CostTable):
        measured = {key for key, _ in costs.entries}
        options = [option for option in options if option in measured or option == dense]
    return _gene(block, "attention", dense, options, costs, drop=drop)


def mlp_gene(block: int, width: BlockWidths, costs: PartCosts, step: int, *, fine: bool, drop: bool) -> PartGene:
    """The gene of an MLP.

    Args:
        step: of its ladder, in neurons, below all of them; of costs from a table the ladder is what the table has.
        fine: options between the rungs exist.

    Raises:
        InvalidInput: a table of costs lacks the dense MLP.
    """
    rungs = {*range(step, width.neurons, step), width.neurons}
    if isinstance(costs, CostTable):
        rungs = {neurons for (neurons,), _ in costs.entries if neurons < width.neurons} | {width.neurons}
    options = range(min(rungs), width.neurons + 1) if fine else sorted(rungs)
    gene = _gene(block, "mlp", (width.neurons,), ((neurons,) for neurons in options), costs, drop=drop)
    if not fine:
        return gene
    on_rungs = tuple(option for option in gene.rungs if gene.kept[option][0] in rungs)
    return replace(gene, rungs=on_rungs)


def _gene(
    block: int,
    part: Part,
    dense: tuple[int, ...],
    options: Iterable[tuple[int, ...]],
    costs: PartCosts,
    *,
    drop: bool,
) -> PartGene:
    """A gene of these options, without those that keep less of something and cost no less: nobody would want them."""
    whole = costs.at(*dense)
    useful: list[tuple[int, tuple[int, ...]]] = []
    for kept in sorted(options, reverse=True):
        removed = whole - costs.at(*kept)
        # Numbers of neurons are in a line, so the last useful one decides.
        rivals = useful[-1:] if part == "mlp" else useful
        if not any(
            cheaper >= removed and all(more >= less for more, less in zip(other, kept, strict=True))
            for cheaper, other in rivals
        ):
            useful.append((removed, kept))
    # Of shapes of one cost the one with the most query heads is asked for first.
    useful.sort(key=lambda entry: (entry[0], -math.prod(entry[1])))
    if drop:
        useful.append((whole, (0,) * len(dense)))
    gone = len(useful) - 1 if drop else None
    removed_by_option, kept_by_option = zip(*useful, strict=True)
    rungs = tuple(range(len(useful) - drop))
    name = f"block {block} {part}"
    return PartGene(name, removed_by_option, block, part, kept_by_option, rungs, gone, None, whole)


def with_merging(gene: PartGene) -> PartGene:
    """A gene whose part may go, and may then be merged into one before as well."""
    assert gene.gone is not None
    last = len(gene.removed)
    return replace(gene, removed=(*gene.removed, gene.whole), kept=(*gene.kept, gene.kept[gene.gone]), merged=last)
