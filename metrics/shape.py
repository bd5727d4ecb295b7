"""Shapes: which units of every block stay, when what is cut leaves the model smaller."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

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

    @property
    def heads_per_group(self) -> int:
        """Query heads that read one key and value head."""
        return self.heads // self.groups

    @property
    def whole(self) -> BlockShape:
        """All of it."""
        return BlockShape(tuple(range(self.groups)), tuple(range(self.heads)), tuple(range(self.neurons)))


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
