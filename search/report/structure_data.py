"""What the report of a structure search says, read from the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from evoprune.fitness.part_merges import read_block
from evoprune.metrics.shape import BlockWidths
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.report.generation_data import Generation, GenerationData, Line
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.structure import shape_text
from evoprune.search.structure_result import ALONE, UNIFORM

Kept = tuple[int, int, int]
"""What a block keeps: KV groups, query heads in all of them, neurons."""

UNITS = ("KV groups", "query heads", "neurons")
"""What a block keeps, by place in `Kept`."""


class StructureData(GenerationData[StructureSearchConfig, tuple[Kept, ...]]):
    """A structure search's run as a report reads it.

    Args:
        run: finished or not.

    Raises:
        InvalidInput: not a structure search, or its files are damaged.
    """

    kind = "structure"
    starters = "seeds"
    genome = "shape"

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run, StructureSearchConfig)

    def what(self, values: Mapping[str, Any]) -> str:
        return shape_text(values["shape"])

    @property
    def reference(self) -> str:
        return UNIFORM

    @property
    def n_removed(self) -> None:
        """Budgets are of heads and MLPs, and not of prunable weights."""
        return None

    @property
    def placed(self) -> list[Mapping[str, Any]]:
        # What criteria do by themselves is no candidate: it has other units and weights than the same shape here.
        return [row for row in super().placed if not row["name"].endswith(ALONE)]

    @cached_property
    def widths(self) -> tuple[Kept, ...]:
        """What the dense blocks have; empty before the search has begun."""
        known = self.identity.get("widths", []) if self.result is None else self.result["widths"]
        return tuple(tuple(widths) for widths in known)

    @property
    def shown_units(self) -> list[int]:
        """Places in `UNITS` that say something of their own: where no heads share a group, groups are heads."""
        alone = all(BlockWidths(*widths).heads_per_group == 1 for widths in self.widths)
        return [1, 2] if alone else [0, 1, 2]

    def decoded(self, line: Line) -> tuple[Kept, ...]:
        genome = line["genome"]
        return _kept(zip(genome[::3], genome[1::3], genome[2::3], strict=True))

    def plan_of(self, values: Mapping[str, Any]) -> tuple[Kept, ...]:
        return _kept(values["shape"])

    def changes(self, generation: Generation) -> Mapping[str, Sequence[float]]:
        found: dict[str, list[float]] = {"query heads": [], "neurons": []}
        if generation.winner is None or generation.before is None:
            return found
        pairs = zip(self.decoded(generation.winner), self.decoded(generation.before), self.widths, strict=True)
        for new, old, dense in pairs:
            for place, changes in enumerate(found.values(), start=1):
                if new[place] != old[place]:
                    changes.append(100 * (new[place] - old[place]) / dense[place])
        return found


def _kept(shape: Any) -> tuple[Kept, ...]:
    kept = (read_block(block)[0] for block in shape)
    return tuple((groups, groups * each, neurons) for groups, each, neurons in kept)
