"""Shapes: which units of every block stay, when what is cut leaves the model smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from evoprune.metrics.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class BlockWidths:
    """What a dense block has.

    Attributes:
        groups: KV groups: a key and a value head with the query heads that read them.
        heads: query heads, as many in each group; those of group g are the g-th run of consecutive heads.
        neurons: of the MLP.
    """

    groups: int
    heads: int
    neurons: int

    def __str__(self) -> str:
        return f"{self.heads} query heads in {self.groups} KV groups and {self.neurons} neurons"

    @property
    def heads_per_group(self) -> int:
        """Query heads that read one key and value head."""
        return self.heads // self.groups

    @property
    def whole(self) -> BlockShape:
        """All of it."""
        return self.first(self.groups, self.heads_per_group, self.neurons)

    def first(self, groups: int, heads_per_group: int, neurons: int) -> BlockShape:
        """The first KV groups, the first query heads of each, and the first neurons."""
        heads = [group * self.heads_per_group + head for group in range(groups) for head in range(heads_per_group)]
        return BlockShape(tuple(range(groups)), tuple(heads), tuple(range(neurons)))


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What a block keeps, as indices in the dense block, ascending.

    Attributes:
        groups: KV groups; empty where the attention is dropped as a whole.
        heads: query heads: of every kept group as many, of others none.
        neurons: of the MLP; empty where it is dropped as a whole.
    """

    groups: tuple[int, ...]
    heads: tuple[int, ...]
    neurons: tuple[int, ...]

    @property
    def heads_per_group(self) -> int:
        """Query heads in each kept group; 0 without groups."""
        return len(self.heads) // len(self.groups) if self.groups else 0

    def check(self, block: int, widths: BlockWidths) -> None:
        """Refuse what a block of these widths cannot keep.

        Raises:
            InvalidInput: an index is outside, not ascending, or groups keep different numbers of heads.
        """
        for what, kept, count in (
            ("KV groups", self.groups, widths.groups),
            ("query heads", self.heads, widths.heads),
            ("neurons", self.neurons, widths.neurons),
        ):
            ascending = all(low < high for low, high in pairwise(kept))
            if not ascending or (kept and not 0 <= kept[0] <= kept[-1] < count):
                raise InvalidInput(f"block {block} keeps {what} that are not ascending from 0 to {count - 1}")
        per_group = dict.fromkeys(self.groups, 0)
        for head in self.heads:
            group = head // widths.heads_per_group
            if group not in per_group:
                raise InvalidInput(f"block {block} keeps query head {head} without its KV group {group}")
            per_group[group] += 1
        if len(set(per_group.values())) > 1 or 0 in per_group.values():
            raise InvalidInput(
                f"block {block} keeps {' and '.join(map(str, sorted(set(per_group.values()))))} query heads in its KV "
                "groups: a model can be written only where all kept groups have as many, and at least one"
            )


@dataclass(frozen=True, slots=True)
class Shape:
    """What every block of a model keeps.

    Attributes:
        model: class name of the dense model.
        fingerprint: of its config and weights.
        blocks: what each block keeps, in model order.
        widths: what each block has in the dense model.
        weights: how the output projections of what stays are made, in JSON values; ``{"method": "none"}`` leaves
            them as they are.
        target: what was asked for, in JSON values.
    """

    model: str
    fingerprint: str
    blocks: tuple[BlockShape, ...]
    widths: tuple[BlockWidths, ...]
    weights: Mapping[str, Any]
    target: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.widths):
            raise InvalidInput(f"a shape has {len(self.blocks)} blocks and the widths of {len(self.widths)}")
        for index, (block, widths) in enumerate(zip(self.blocks, self.widths, strict=True)):
            block.check(index, widths)

    def check(self, model: str, widths: Sequence[BlockWidths]) -> None:
        """Refuse a model that this shape is not of.

        Args:
            model: class name of the model.
            widths: what its blocks have.

        Raises:
            InvalidInput: names what differs first.
        """
        unlike = [at for at, (here, there) in enumerate(zip(widths, self.widths, strict=False)) if here != there]
        difference = ""
        if model != self.model:
            difference = "the classes differ"
        elif len(widths) != len(self.widths):
            difference = f"it has {len(self.widths)} blocks and this one {len(widths)}"
        elif unlike:
            difference = f"block {unlike[0]} has {self.widths[unlike[0]]} there and {widths[unlike[0]]} here"
        if difference:
            other = (
                f"another {model}" if model == self.model else f"another model, {self.model[:80]} and not this {model}"
            )
            raise InvalidInput(f"the shape is of {other}: {difference}")
