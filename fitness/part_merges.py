"""Parts that are gone as a whole, merged into the same part of a block before them.

Source: Yang et al. 2024 (LaCo, arXiv:2402.11187), section 3.2, part by part; weight compression operators, section 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from evoprune.fitness.merging import merged
from evoprune.fitness.units import PARTS, PartName
from evoprune.metrics.errors import InvalidInput

if TYPE_CHECKING:
    from evoprune.fitness.unit_costs import Kept  # which needs models, and these this module

Sources = tuple[int, ...]
"""Blocks whose part is merged into that of another, ascending."""

Merges = Mapping[tuple[int, PartName], Sources]
"""What parts that stay take in, by block and part."""

NO_MERGES: Merges = MappingProxyType({})

MERGED_AWAY = -1
"""In place of a count of 0: nothing is left, and what was there is merged into a block before."""

Merged = tuple[bool, bool]
"""Of a block: whether its attention and its MLP are merged into one before."""


def spelled_block(kept: Sequence[int], merged: Merged) -> list[int]:
    """What becomes of a block: KV groups, query heads in each, neurons; `MERGED_AWAY` for the last two if merged."""
    groups, heads, neurons = kept
    return [groups, MERGED_AWAY if merged[0] else heads, MERGED_AWAY if merged[1] else neurons]


def read_block(spelled: Sequence[int]) -> tuple[Kept, Merged]:
    """What `spelled_block` was given."""
    groups, heads, neurons = map(int, spelled)
    return (groups, max(heads, 0), max(neurons, 0)), (heads == MERGED_AWAY, neurons == MERGED_AWAY)


def merges_of(stays: Sequence[Merged], merging: Sequence[Merged]) -> Merges:
    """Where parts are merged to: the same part of the nearest block before of which some is left.

    Args:
        stays: whether something is left of the attention and of the MLP of every block.
        merging: whether they are merged.

    Raises:
        InvalidInput: a part is merged that is not gone, or that has none before it.
    """
    found: dict[tuple[int, PartName], Sources] = {}
    for place, part in enumerate(PARTS):
        into = None
        for block, (left, goes) in enumerate(zip(stays, merging, strict=True)):
            if left[place]:
                into = block
            if not goes[place]:
                continue
            if left[place] or into is None:
                why = "some of it stays" if left[place] else f"no {part} stays before it"
                raise InvalidInput(f"the {part} of block {block} cannot be merged into one before: {why}")
            found[into, part] = (*found.get((into, part), ()), block)
    return found


def merged_part(parts: Sequence[Mapping[str, Tensor]], block: int, sources: Sources) -> dict[str, Tensor]:
    """What a part becomes.

    Args:
        parts: of all blocks the dense weights and biases of this part, in one order, by full name.
        block: of the part that stays.
        sources: what it takes in.

    Returns:
        As `parts` has them.

    Raises:
        InvalidInput: the parts differ in shape.
    """

    def numbered(of: int) -> dict[str, Tensor]:
        return {str(index): value for index, value in enumerate(parts[of].values())}

    values = merged(numbered(block), [numbered(source) for source in sources]).values()
    return dict(zip(parts[block], values, strict=True))


def merging_to_json(merging: Sequence[Merged]) -> list[dict[str, Any]]:
    """The parts that are merged, as JSON values that `merging_from_json` reads."""
    return [
        {"block": block, "part": part}
        for block, of_block in enumerate(merging)
        for part, goes in zip(PARTS, of_block, strict=True)
        if goes
    ]


def merging_from_json(values: Any, blocks: int) -> list[Merged]:
    """The inverse of `merging_to_json`, for a model of so many blocks.

    Raises:
        InvalidInput: it is none of that.
    """
    given = values if isinstance(values, list) else [values]
    known = [{"block": block, "part": part} for block in range(blocks) for part in PARTS]
    for entry in given:
        if entry not in known:
            raise InvalidInput(
                f"a merge of the shape is {str(entry)[:60]!r}: give a block, 0 to {blocks - 1}, and its part, "
                "attention or mlp"
            )
    return [
        ({"block": block, "part": "attention"} in given, {"block": block, "part": "mlp"} in given)
        for block in range(blocks)
    ]
