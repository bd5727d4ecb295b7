"""What the report of an allocation search says, read from the run's folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evoprune.metrics.allocation_file import read_allocation
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import LEVELS, split_site
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.report.generation_data import Generation, GenerationData, Line
from evoprune.search.rundir import RunDirectory
from evoprune.search.site_names import attention_first

Cells = Mapping[tuple[str, int], float]
"""A number by kind of matrix and block."""


@dataclass(frozen=True)
class Kind:
    """The best allocation's matrices of one kind: how many, their weights if known, and their sparsities."""

    kind: str
    matrices: int
    weights: int | None
    least: float
    mean: float
    most: float


class AllocationData(GenerationData[AllocationSearchConfig, Cells]):
    """An allocation search's run as a report reads it.

    Args:
        run: finished or not.

    Raises:
        InvalidInput: not an allocation search, or its files are damaged.
    """

    kind = "allocation"
    starters = "allocators"
    genome = "allocation"

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run, AllocationSearchConfig)

    def what(self, values: Mapping[str, Any]) -> str:
        return range_text(values["allocation"])

    @property
    def reference(self) -> str:
        return self.config.target.reference

    @property
    def n_removed(self) -> int | None:
        return None if self.result is None else self.result["best"]["removed"]

    @property
    def shared_by(self) -> str:
        """What the cells of `best` stand for: each ``matrix``, or all of a ``block``, a ``part`` or a ``kind``."""
        target = self.config.target
        if self.result is not None:
            return "matrix"
        return {"parts": "part", "blocks": "block"}[target.drop] if target.drop_only else target.granularity

    def plan_of(self, values: Mapping[str, Any]) -> Cells:
        return by_cell(values["allocation"])

    def changes(self, generation: Generation) -> Mapping[str, Sequence[float]]:
        return {"sparsity": [100 * move / LEVELS for move in generation.moves]}

    @cached_property
    def weights(self) -> Cells | None:
        """Weights by kind and block; None before the winner is exported, for only that file has the shapes."""
        try:
            sites = read_allocation(self.run.path / "export" / "allocation.json").sites
        except InvalidInput:
            return None
        found = by_cell({site.name: math.prod(site.shape) for site in sites})
        return found if self.best is not None and found.keys() == self.best.plan.keys() else None

    @property
    def axes(self) -> tuple[list[str], list[int]]:
        """Kinds of matrices in the model's order, attention first, and blocks."""
        # The result's names are in alphabetical order.
        cells = self.weights or (self.best.plan if self.best is not None else {})
        kinds = list(dict.fromkeys(kind for kind, _ in cells))
        return sorted(kinds, key=attention_first), sorted({block for _, block in cells})

    def means(self, cells: Cells, part: int) -> dict[Any, float]:
        """Mean sparsity by kind (`part` 0) or block (`part` 1), of all weights if they are known, else of matrices."""
        sums: dict[Any, list[float]] = {}
        for cell, sparsity in cells.items():
            weight = 1 if self.weights is None else self.weights[cell]
            pair = sums.setdefault(cell[part], [0.0, 0.0])
            pair[0] += weight * sparsity
            pair[1] += weight
        return {name: total / weight for name, (total, weight) in sums.items()}

    @cached_property
    def by_kind(self) -> list[Kind]:
        """The best allocation, kind by kind; empty where levels belong to no matrix of their own."""
        if self.best is None or self.shared_by != "matrix":
            return []
        means, found = self.means(self.best.plan, 0), []
        for kind in self.axes[0]:
            members = {cell: sparsity for cell, sparsity in self.best.plan.items() if cell[0] == kind}
            weights = None if self.weights is None else sum(int(self.weights[cell]) for cell in members)
            least, most = min(members.values()), max(members.values())
            found.append(Kind(kind, len(members), weights, least, means[kind], most))
        return found

    def decoded(self, line: Line) -> Cells:
        """Its sparsities; what all matrices of a block or kind share stands once."""
        levels = dict(zip(self.identity.get("genes", ()), line["genome"], strict=False))
        sparsities = {name: level / LEVELS for name, level in levels.items()}
        if self.shared_by == "block":
            return {("all", int(name.removeprefix("block "))): value for name, value in sparsities.items()}
        if self.shared_by == "part":
            parts = {tuple(name.removeprefix("block ").split(" ", 1)): value for name, value in sparsities.items()}
            return {(part, int(block)): value for (block, part), value in parts.items()}
        if self.shared_by == "kind":
            return {(name, 0): value for name, value in sparsities.items()}
        return by_cell(sparsities)


def by_cell(values: Mapping[str, float]) -> Cells:
    """Numbers by name of a matrix as numbers by kind and block."""
    return {split_site(name): value for name, value in values.items()}


def range_text(sparsities: Mapping[Any, float]) -> str:
    """From the least to the most that a matrix loses: ``22–88 %``."""
    low, high = (f"{100 * value:.0f}" for value in (min(sparsities.values()), max(sparsities.values())))
    return f"{low} %" if low == high else f"{low}–{high} %"
