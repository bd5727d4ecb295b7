"""Shapes of tiny models for tests: what a search could find, and the corners that caches and masks stumble over."""

from __future__ import annotations

from collections.abc import Sequence

from evoprune.fitness.units import BlockUnits
from evoprune.metrics.shape import BlockShape, BlockWidths, Shape

NONE: tuple[int, ...] = ()
FEW, MANY = tuple(range(3, 48, 3)), tuple(range(40))


def some(widths: BlockWidths, groups: Sequence[int], heads_per_group: int, neurons: Sequence[int]) -> BlockShape:
    """A block that keeps these KV groups, the last so many query heads of each, and these neurons."""
    per_group = widths.heads_per_group
    first = per_group - min(heads_per_group, per_group)
    heads = [group * per_group + head for group in groups for head in range(first, per_group)]
    return BlockShape(tuple(groups), tuple(heads), tuple(neurons))


def cases(widths: BlockWidths) -> dict[str, tuple[BlockShape, BlockShape]]:
    """Shapes of two blocks of these widths, by what is special about them."""
    whole, last = widths.whole, widths.groups - 1
    return {
        "uneven": (some(widths, [last], 2, FEW), some(widths, range(widths.groups), 1, MANY)),
        "no attention first": (BlockShape(NONE, NONE, FEW), whole),
        "no mlp": (whole, BlockShape(whole.groups, whole.heads, NONE)),
        "first block gone": (BlockShape(NONE, NONE, NONE), some(widths, [0], 1, MANY)),
        "last block gone": (whole, BlockShape(NONE, NONE, NONE)),
    }


def shape_of(model: str, units: Sequence[BlockUnits], blocks: Sequence[BlockShape]) -> Shape:
    """These blocks as the shape of a model, its output projections as they are."""
    return Shape(model, "none", tuple(blocks), tuple(block.widths for block in units), {"method": "none"}, {})
