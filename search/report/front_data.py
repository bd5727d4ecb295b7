"""What the reports of searches for a front say, read from the run's folder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic

from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.report.allocation_data import AllocationData, Cells, by_cell
from evoprune.search.report.generation_data import Found, GenerationData, Line, Plan, SearchedConfig
from evoprune.search.report.run_data import Contender
from evoprune.search.report.structure_data import UNITS, Kept, StructureData
from evoprune.search.result import member_name
from evoprune.search.tables_front import beside


@dataclass(frozen=True)
class Place:
    """A point of a figure: per cent of the dense cost that is saved, and a loss or KL with its standard error."""

    saved: float
    value: float
    error: float


@dataclass(frozen=True)
class Row:
    """A member of the front.

    Attributes:
        name: per cent of the dense costs that are saved, rounded; names its file.
        place: with the held-out loss; None where it was not measured on held-out text.
        reference: the same for what it is compared with at the same cost, uniform sparsity or chance.
        difference: held-out loss minus that of the reference, and its paired standard error.
        values: its part of the result.
    """

    name: str
    place: Place | None
    reference: Place | None
    difference: Place | None
    values: Mapping[str, Any]


class AnyFrontData(GenerationData[SearchedConfig, Plan], Generic[SearchedConfig, Plan]):
    """A run that searches a front, whatever its members are, as a report reads it."""

    @property
    def contenders(self) -> list[Contender]:
        """Nobody: there is no winner that all are compared with."""
        return []

    @property
    @abstractmethod
    def beside(self) -> str:
        """What members are compared with, in words."""

    @abstractmethod
    def removed(self, plan: Plan) -> float:
        """Per cent that a plan removes, about."""

    @property
    @abstractmethod
    def kinds_along(self) -> dict[str, list[tuple[float, float]]]:
        """How much of every kind of thing goes along the front, in per cent, by what is saved."""

    @property
    def dense(self) -> Mapping[str, float] | None:
        """The dense model on held-out text."""
        return None if self.result is None else self.result["dense"]["heldout"]

    @property
    def stage_tokens(self) -> list[int]:
        return [self.config.front.windows * self.config.data.window]

    @cached_property
    def n_generations(self) -> int:
        """Generations that had children."""
        return max((line["generation"] for line in self.lines if line["stage"] == 0), default=0)

    @cached_property
    def best(self) -> Found[Plan] | None:
        if self.result is not None:
            return super().best
        if not self.archive:
            return None
        target = 100 * (self.config.target.sparsity or 0.0)
        line = min(self.archive, key=lambda line: abs(self.removed(self.decoded(line)) - target))
        return Found(
            line["birth"],
            line["generation"],
            line["origin"],
            line["kl"],
            line["stderr"],
            self.stage_tokens[0],
            self.decoded(line),
        )

    @cached_property
    def measured(self) -> list[Line]:
        """Candidates that have a fitness, as births on the windows that all are measured on."""
        return [line for line in self.lines if line["counted"] and line["kl"] is not None]

    @cached_property
    def archive(self) -> list[Line]:
        """Of these, whom no other beats in both KL and the first cost, the dearest first."""
        found: list[Line] = []
        for line in sorted(self.measured, key=lambda line: (line["cost"], line["kl"])):
            if not found or line["kl"] < found[-1]["kl"]:
                found.append(line)
        return found[::-1]

    @cached_property
    def dense_cost(self) -> float:
        """Cost of the model before pruning; in an unfinished run that of its dearest candidate."""
        if self.result is not None:
            return float(self.result["pareto"]["dense"])
        return max((line["cost"] for line in self.measured), default=1)

    def saved(self, cost: float) -> float:
        """Per cent of the dense cost that is saved."""
        return 100 * (1 - cost / self.dense_cost)

    @property
    def other(self) -> Mapping[str, Any] | None:
        """The second cost of a front that has two: its name, unit and dense value."""
        if self.result is None or not (others := self.result["pareto"].get("others")):
            return None
        (found,) = others
        return dict(found)

    @property
    def ends(self) -> tuple[int, int]:
        """Per cent of the first cost that members save: the least, and the most."""
        saved = [row.values["saved"] for row in self.rows]
        return min(saved), max(saved)

    @cached_property
    def rows(self) -> list[Row]:
        """The front, the dearest first; empty before the run is finished."""
        found = []
        for values in self.result["front"] if self.result is not None else ():
            beside = values[self.reference]
            here = self.saved(values["cost"])
            difference = None if beside is None else beside["member_minus_this"]
            found.append(
                Row(
                    member_name(values),
                    self._place(values),
                    None if beside is None else self._place(beside),
                    None if difference is None else Place(here, difference["loss"], difference["stderr"]),
                    values,
                )
            )
        return found

    @cached_property
    def started(self) -> list[tuple[str, Place]]:
        """Seeds beside the reference, by name, on held-out text, once for every budget."""
        rows = self.result["baselines"] if self.result is not None else ()
        places = ((row["name"], self._place(row)) for row in rows if row["name"] != self.reference)
        return [(name, place) for name, place in places if place is not None]

    def _place(self, values: Mapping[str, Any]) -> Place | None:
        heldout = values["heldout"]
        return None if heldout is None else Place(self.saved(values["cost"]), heldout["loss"], heldout["stderr"])


class FrontData(AnyFrontData[AllocationSearchConfig, Cells], AllocationData):
    """A run that searches a front of allocations, as a report reads it.

    Args:
        run: finished or not.

    Raises:
        InvalidInput: not an allocation search, or its files are damaged.
    """

    @property
    def beside(self) -> str:
        return beside("allocation", self.config.target.drop_only)

    def removed(self, plan: Cells) -> float:
        """Mean sparsity of matrices, in per cent."""
        return 100 * sum(plan.values()) / len(plan)

    @cached_property
    def kinds_along(self) -> dict[str, list[tuple[float, float]]]:
        """Mean sparsity of every kind of matrix along the front, in per cent, by what is saved."""
        found: dict[str, list[tuple[float, float]]] = {}
        if self.shared_by != "matrix" or self.result is None:
            return found
        for values in self.result["front"]:
            cells = by_cell(values["allocation"])
            for kind, mean in self.means(cells, 0).items():
                found.setdefault(kind, []).append((self.saved(values["cost"]), 100 * mean))
        return {kind: found[kind] for kind in self.axes[0]}


class StructureFrontData(AnyFrontData[StructureSearchConfig, tuple[Kept, ...]], StructureData):
    """A run that searches a front of shapes, as a report reads it.

    Args:
        run: finished or not.

    Raises:
        InvalidInput: not a structure search, or its files are damaged.
    """

    @property
    def beside(self) -> str:
        return beside("structure")

    def removed(self, plan: tuple[Kept, ...]) -> float:
        """Mean of what goes of query heads and of neurons, in per cent."""
        gone = [self._gone(plan, place) for place in (1, 2)]
        return sum(gone) / len(gone)

    @cached_property
    def kinds_along(self) -> dict[str, list[tuple[float, float]]]:
        """How much of all units of a kind goes along the front, in per cent, by what is saved."""
        found: dict[str, list[tuple[float, float]]] = {UNITS[place]: [] for place in self.shown_units}
        for values in self.result["front"] if self.result is not None else ():
            for place in self.shown_units:
                gone = self._gone(self.plan_of(values), place)
                found[UNITS[place]].append((self.saved(values["cost"]), gone))
        return found

    def _gone(self, plan: tuple[Kept, ...], place: int) -> float:
        dense = sum(widths[place] for widths in self.widths)
        return 100 * (1 - sum(kept[place] for kept in plan) / dense)
