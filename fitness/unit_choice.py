"""Which units go, by their scores, at a budget that is met to one neuron."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evoprune.fitness.unit_costs import MlpCost, UnitCosts
from evoprune.fitness.unit_criteria import Spread, UnitScores
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import removed_count
from evoprune.metrics.shape import BlockShape

AttentionUnit = Literal["groups", "balanced"]
"""What of an attention goes: whole KV groups, or as many query heads of every group."""


def choose_units(
    scores: Sequence[UnitScores],
    costs: UnitCosts,
    fraction: float,
    *,
    spread: Spread = "uniform",
    heads: AttentionUnit = "groups",
    spare: Collection[int] = (),
) -> list[BlockShape]:
    """The shape that the lowest scores leave; of every part something stays.

    Args:
        scores: of every block.
        costs: of the same blocks; neurons have a cost.
        fraction: of `costs.dense` that goes, in [0, 1); what goes costs that, or less than a neuron more.
        spread: ``uniform``: the same fraction of the heads and of the neurons of every block, as nearly as heads come;
            neurons make up for the rest. ``global``: the lowest scores of all KV groups and neurons of the model.
        heads: what of an attention goes; of ``global`` only KV groups.
        spare: blocks that lose nothing.

    Ties lose the lower index first, and of a model the earlier block.

    Raises:
        InvalidInput: so much cannot go, the costs are of other blocks, or the options contradict each other.
    """
    if len(scores) != len(costs.widths):
        raise InvalidInput(f"scores of {len(scores)} blocks and costs of {len(costs.widths)}")
    if not all(isinstance(mlp, MlpCost) and mlp.per_neuron for mlp in costs.mlp):
        raise InvalidInput(f"neurons do not meet a budget of {costs.quantity}: give costs in parameters or flops")
    if spread == "global" and heads == "balanced":
        raise InvalidInput("query heads of different groups are not compared: choose by groups, or uniformly")
    choice = _Choice(scores, costs, fraction, heads, [block for block in range(len(scores)) if block not in spare])
    if not choice.budget:
        return [width.whole for width in costs.widths]
    return choice.by_score() if spread == "global" else choice.evenly()


@dataclass(frozen=True)
class _Unit:
    score: float
    block: int
    part: str
    index: int
    cost: int


class _Choice:
    """One choice; arguments as above."""

    def __init__(
        self,
        scores: Sequence[UnitScores],
        costs: UnitCosts,
        fraction: float,
        heads: AttentionUnit,
        free: list[int],
    ) -> None:
        self._scores, self._costs, self._heads, self._free = scores, costs, heads, free
        self._fraction = fraction
        self.budget = removed_count(fraction, costs.dense)
        if self.budget and not free:
            raise self._too_much()

    def evenly(self) -> list[BlockShape]:
        widths, free = self._costs.widths, self._free
        parts = sum(
            self._costs.attention[block].at(widths[block].groups, widths[block].heads_per_group)
            + self._costs.mlp[block].at(widths[block].neurons)
            for block in free
        )
        share = self.budget / parts
        going = {block: min(int(share * (self._most(block) + 1) + 0.5), self._most(block)) for block in free}
        # Heads are large: of a small budget fewer of them go, the last block's first; of a large one more, everywhere.
        while self._left(going) < 0:
            going[max(block for block in free if going[block])] -= 1
        spare = sum((widths[block].neurons - 1) * self._neuron(block) for block in free)
        while self._left(going) > spare and any(going[block] < self._most(block) for block in free):
            going = {block: min(count + 1, self._most(block)) for block, count in going.items()}
        neurons = self._even_neurons(self._left(going))
        return [self._shape(block, going.get(block, 0), neurons.get(block, 0)) for block in range(len(self._scores))]

    def _most(self, block: int) -> int:
        """Units of an attention that can go."""
        width = self._costs.widths[block]
        return (width.groups if self._heads == "groups" else width.heads_per_group) - 1

    def _left(self, going: Mapping[int, int]) -> int:
        """What neurons have to make up for, if so many units of attentions go."""
        return self.budget - sum(self._freed(block, count) for block, count in going.items())

    def _freed(self, block: int, going: int) -> int:
        """What an attention costs less without so many of its units."""
        width, cost = self._costs.widths[block], self._costs.attention[block]
        groups, each = width.groups, width.heads_per_group
        left = (groups - going, each) if self._heads == "groups" else (groups, each - going)
        return cost.at(groups, each) - cost.at(*left)

    def _even_neurons(self, budget: int) -> dict[int, int]:
        """How many neurons of every block go so that they cost the budget, or less than one more."""
        sizes = {block: self._costs.widths[block].neurons for block in self._free}
        each = {block: self._neuron(block) for block in self._free}
        whole = sum(sizes[block] * each[block] for block in self._free)
        going = {block: budget * sizes[block] // whole for block in self._free}
        rests = sorted(self._free, key=lambda block: (-(budget * sizes[block] % whole), block))
        missing = budget - sum(going[block] * each[block] for block in self._free)
        for block in rests:
            if missing > 0:
                going[block] += 1
                missing -= each[block]
        if missing > 0 or any(going[block] >= sizes[block] for block in self._free):
            raise self._too_much()
        return going

    def by_score(self) -> list[BlockShape]:
        units = sorted(self._units(), key=lambda unit: (unit.score, unit.block, unit.part, unit.index))
        barred: set[_Unit] = set()
        while True:
            going, excess = self._walk(units, barred)
            for unit in reversed(going):  # the best of what went comes back, where the last group was too much
                if unit.part == "mlp" and unit.cost <= excess:
                    going.remove(unit)
                    excess -= unit.cost
            if excess < max(self._neuron(block) for block in self._free):
                break
            barred.add(next(unit for unit in reversed(going) if unit.part == "attention"))
        gone = {(unit.block, unit.part, unit.index) for unit in going}
        shapes = []
        for block, width in enumerate(self._costs.widths):
            groups = tuple(group for group in range(width.groups) if (block, "attention", group) not in gone)
            each = width.heads_per_group
            kept = tuple(group * each + head for group in groups for head in range(each))
            neurons = tuple(neuron for neuron in range(width.neurons) if (block, "mlp", neuron) not in gone)
            shapes.append(BlockShape(groups, kept, neurons))
        return shapes

    def _walk(self, units: Sequence[_Unit], barred: Collection[_Unit]) -> tuple[list[_Unit], int]:
        """What goes if the lowest scores go, and by how much that costs more than the budget."""
        left = {(block, "attention"): self._costs.widths[block].groups for block in self._free}
        left |= {(block, "mlp"): self._costs.widths[block].neurons for block in self._free}
        going: list[_Unit] = []
        missing = self.budget
        for unit in units:
            if missing <= 0:
                break
            if unit not in barred and left[unit.block, unit.part] > 1:
                left[unit.block, unit.part] -= 1
                going.append(unit)
                missing -= unit.cost
        if missing > 0:
            raise self._too_much()
        return going, -missing

    def _units(self) -> list[_Unit]:
        found = []
        for block in self._free:
            scores, width = self._scores[block], self._costs.widths[block]
            group = self._freed(block, 1) if width.groups > 1 else 0
            for part, values, cost in (
                ("attention", scores.groups, group),
                ("mlp", scores.neurons, self._neuron(block)),
            ):
                found += [_Unit(score, block, part, index, cost) for index, score in enumerate(values.tolist())]
        return found

    def _neuron(self, block: int) -> int:
        return self._costs.mlp[block].at(2) - self._costs.mlp[block].at(1)

    def _shape(self, block: int, going: int, neurons: int) -> BlockShape:
        scores, width = self._scores[block], self._costs.widths[block]
        each = width.heads_per_group
        by_group = [range(group * each, (group + 1) * each) for group in range(width.groups)]
        kept_neurons = _without_lowest(scores.neurons, neurons)
        if self._heads == "groups":
            groups = _without_lowest(scores.groups, going)
            return BlockShape(groups, tuple(head for group in groups for head in by_group[group]), kept_neurons)
        kept = [run[at] for run in by_group for at in _without_lowest(scores.heads[run[0] : run[-1] + 1], going)]
        return BlockShape(tuple(range(width.groups)), tuple(kept), kept_neurons)

    def _too_much(self) -> InvalidInput:
        most = sum(
            self._freed(block, self._most(block)) + (self._costs.widths[block].neurons - 1) * self._neuron(block)
            for block in self._free
        )
        return InvalidInput(
            f"{self._fraction:g} of the {self._costs.quantity} of heads and MLPs cannot go while some of every part "
            f"stays: at most {math.floor(1e4 * most / self._costs.dense) / 1e4:g} can"
        )


def _without_lowest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Indices, ascending, of all but so many lowest scores; ties lose the lower index first."""
    return tuple(sorted(torch.argsort(scores, stable=True)[count:].tolist()))
