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
from evoprune.search.report.run_data import RunData
from evoprune.search.result import closed_gap
from evoprune.search.rundir import RunDirectory
from evoprune.search.site_names import attention_first

Line = Mapping[str, Any]
"""A birth, as the history has it."""

Cells = Mapping[tuple[str, int], float]
"""A number by kind of matrix and block."""


@dataclass(frozen=True)
class Found:
    """The winner; in a run that is not finished, the present parent.

    Attributes:
        birth: that measured it last.
        generation: in which it was bred, 0 for a seed.
        origin: ``seed:NAME`` or ``switch``.
        kl: to the dense model on text B, in nats per token, with its standard error over windows.
        tokens: that these are from.
        cells: sparsity by kind and block.
    """

    birth: int
    generation: int
    origin: str
    kl: float
    stderr: float
    tokens: int
    cells: Cells


@dataclass(frozen=True)
class Generation:
    """A generation and who won it.

    Attributes:
        number: from 1 upwards.
        reached: children that were measured in each stage.
        evaluations: of the whole search up to its end.
        winner: the birth in its last stage that became the next parent; None where no stage decided that.
        before: the old parent's birth in that stage.
    """

    number: int
    reached: tuple[int, ...]
    evaluations: int
    winner: Line | None
    before: Line | None

    @property
    def kept(self) -> bool:
        """Whether the old parent won."""
        return self.winner is not None and self.winner["origin"] == "parent"

    @property
    def accepted(self) -> bool:
        """Whether a child won."""
        return self.winner is not None and not self.kept

    @property
    def gain(self) -> float | None:
        """KL of the old parent minus that of the winner, on the same windows."""
        if self.winner is None or self.before is None or self.before["kl"] is None:
            return None
        return float(self.before["kl"] - self.winner["kl"])

    @property
    def moves(self) -> list[int]:
        """By how many levels each gene moved that did; none where the parent stayed."""
        if self.winner is None or self.before is None:
            return []
        pairs = zip(self.winner["genome"], self.before["genome"], strict=True)
        return [new - old for new, old in pairs if new != old]


@dataclass(frozen=True)
class Kind:
    """The best allocation's matrices of one kind: how many, their weights if known, and their sparsities."""

    kind: str
    matrices: int
    weights: int | None
    least: float
    mean: float
    most: float


class AllocationData(RunData[AllocationSearchConfig]):
    """An allocation search's run as a report reads it.

    Args:
        run: finished or not.

    Raises:
        InvalidInput: not an allocation search, or its files are damaged.
    """

    kind = "allocation"

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run, AllocationSearchConfig)

    def what(self, values: Mapping[str, Any]) -> str:
        return range_text(values["allocation"])

    @property
    def n_evaluations(self) -> int:
        return self.result["evaluations"] if self.result is not None else sum(line["counted"] for line in self.lines)

    @property
    def n_removed(self) -> int | None:
        return None if self.result is None else self.result["best"]["removed"]

    # Texts

    @property
    def stage_tokens(self) -> list[int]:
        """Tokens of text B that each stage reads."""
        return [stage.windows * self.config.data.window for stage in self.config.searcher.stages]

    @property
    def redrawn(self) -> bool:
        """Whether generations read different windows; a searcher that learns from all of them keeps the same."""
        return len({tuple(line["windows"]) for line in self.lines if line["stage"] == 0}) > 1

    @property
    def final_tokens(self) -> int:
        """Tokens of text B in all, which finalists are measured on."""
        return self.config.searcher.windows * self.config.data.window

    # What was found

    @cached_property
    def best(self) -> Found | None:
        """The winner; so far, if the run is not finished."""
        if self.result is not None:
            best = self.result["best"]
            return Found(
                best["birth"],
                best["generation"],
                best["origin"],
                best["fitness"],
                best["stderr"],
                self.result["final_tokens"],
                by_cell(best["allocation"]),
            )
        if not self.parents:
            return None
        line = self.parents[-1]
        origin, generation = self.ancestry[tuple(line["genome"])]
        tokens = (line["windows"][1] - line["windows"][0]) * self.config.data.window
        return Found(line["birth"], generation, origin, line["kl"], line["stderr"], tokens, self._decoded(line))

    @property
    def gap(self) -> float | None:
        """See `evoprune.search.result.closed_gap`; None too where the dense model is no better than uniform."""
        if self.result is None:
            return None
        uniform, dense = self.contender("uniform"), self.contender("dense")
        if uniform is None or dense is None or uniform.heldout["loss"] <= dense.heldout["loss"]:
            return None
        return closed_gap(self.result)

    @cached_property
    def alike(self) -> list[list[str]]:
        """Names of allocators whose allocations are equal, where there is more than one."""
        groups: dict[tuple[tuple[str, float], ...], list[str]] = {}
        for row in self.result["baselines"] if self.result is not None else ():
            groups.setdefault(tuple(sorted(row["allocation"].items())), []).append(row["name"])
        return [names for names in groups.values() if len(names) > 1]

    @property
    def shared_by(self) -> str:
        """What the cells of `best` stand for: each ``matrix``, or all of a ``block``, a ``part`` or a ``kind``."""
        target = self.config.target
        if self.result is not None:
            return "matrix"
        return {"parts": "part", "blocks": "block"}[target.drop] if target.drop_only else target.granularity

    @property
    def rivals(self) -> list[tuple[str, Cells]]:
        """Allocators by name, the best first: on held-out text, or by KL on text B if the run is not finished."""
        if self.result is None:
            seeds = sorted(self.seeds, key=lambda line: (line["kl"], line["birth"]))
            return [(line["origin"].removeprefix("seed:"), self._decoded(line)) for line in seeds]
        rows = sorted(self.result["baselines"], key=lambda row: row["heldout"]["loss"])
        return [(row["name"], by_cell(row["allocation"])) for row in rows]

    @cached_property
    def weights(self) -> Cells | None:
        """Weights by kind and block; None before the winner is exported, for only that file has the shapes."""
        try:
            sites = read_allocation(self.run.path / "export" / "allocation.json").sites
        except InvalidInput:
            return None
        found = by_cell({site.name: math.prod(site.shape) for site in sites})
        return found if self.best is not None and found.keys() == self.best.cells.keys() else None

    @property
    def axes(self) -> tuple[list[str], list[int]]:
        """Kinds of matrices in the model's order, attention first, and blocks."""
        # The result's names are in alphabetical order.
        cells = self.weights or (self.best.cells if self.best is not None else {})
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
        means, found = self.means(self.best.cells, 0), []
        for kind in self.axes[0]:
            members = {cell: sparsity for cell, sparsity in self.best.cells.items() if cell[0] == kind}
            weights = None if self.weights is None else sum(int(self.weights[cell]) for cell in members)
            least, most = min(members.values()), max(members.values())
            found.append(Kind(kind, len(members), weights, least, means[kind], most))
        return found

    def _decoded(self, line: Line) -> Cells:
        """A genome's sparsities; what all matrices of a block or kind share stands once."""
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

    # How the search went

    @cached_property
    def seeds(self) -> list[Line]:
        """Allocators that have a fitness, as births on the text of the last stage; equal ones are one birth."""
        return [line for line in self.lines if line["stage"] == "seeds" and line["kl"] is not None]

    @cached_property
    def finals(self) -> list[Line]:
        """Finalists, as births on all of text B."""
        return [line for line in self.lines if line["stage"] == "final" and line["kl"] is not None]

    @cached_property
    def generations(self) -> list[Generation]:
        """Those that had children, oldest first."""
        children: dict[int, list[Line]] = {}
        for line in self.lines:
            if isinstance(line["stage"], int):
                children.setdefault(line["generation"], []).append(line)
        by_birth = {line["birth"]: line for line in self.lines}
        n_stages, evaluations = len(self.config.searcher.stages), sum(line["stage"] == "seeds" for line in self.lines)
        found = []
        for number, lines in sorted(children.items()):
            stages = [[line for line in lines if line["stage"] == stage] for stage in range(n_stages)]
            evaluations += sum(line["counted"] for line in lines)
            later = children.get(number + 1)
            # Whom the next generation descends from is certain; who was best at the end of the last has to be.
            winner = by_birth.get(later[0]["parents"][0]) if later else self._undisputed(number, stages)
            before = next((line for line in stages[-1] if line["origin"] == "parent"), None)
            reached = tuple(sum(line["origin"] != "parent" for line in stage) for stage in stages)
            found.append(Generation(number, reached, evaluations, winner, before))
        return found

    def _undisputed(self, number: int, stages: Sequence[Sequence[Line]]) -> Line | None:
        """The best of the last generation, if its last stage was measured to the end."""
        *_, before_last, last = stages
        measured = sum(line["kl"] is not None and line["origin"] != "parent" for line in before_last)
        whole = len(last) == min(measured, self.config.searcher.stages[-2].survivors) + 1
        # A generation that was cut short is followed by finals of its own number: nobody won it.
        cut = any(line["stage"] == "final" and line["generation"] == number for line in self.lines)
        ranked = sorted((line["kl"], line["birth"]) for line in last if line["kl"] is not None)
        if not whole or cut or not ranked:
            return None
        return next(line for line in last if line["birth"] == ranked[0][1])

    @cached_property
    def parents(self) -> list[Line]:
        """The best seed, then the winner of each generation, by the birth that made it a parent."""
        if not self.seeds:
            return []
        bred = next((line for line in self.lines if line["stage"] == 0), None)
        first = (
            min(self.seeds, key=lambda line: (line["kl"], line["birth"]))
            if bred is None
            else next(line for line in self.seeds if line["birth"] == bred["parents"][0])
        )
        return [first, *(generation.winner for generation in self.generations if generation.winner is not None)]

    @cached_property
    def ancestry(self) -> dict[tuple[int, ...], tuple[str, int]]:
        """Origin and generation in which it was bred, of every genome that became a parent."""
        found: dict[tuple[int, ...], tuple[str, int]] = {}
        for line in self.parents:
            found.setdefault(tuple(line["genome"]), (line["origin"], line["generation"]))
        return found

    def evaluations_until(self, line: Line) -> int:
        """How many candidates had been measured when this genome became a parent."""
        _, generation = self.ancestry.get(tuple(line["genome"]), ("", 0))
        ends = {found.number: found.evaluations for found in self.generations}
        return ends.get(generation, sum(seed["stage"] == "seeds" for seed in self.lines))


def by_cell(values: Mapping[str, float]) -> Cells:
    """Numbers by name of a matrix as numbers by kind and block."""
    return {split_site(name): value for name, value in values.items()}


def range_text(sparsities: Mapping[Any, float]) -> str:
    """From the least to the most that a matrix loses: ``22–88 %``."""
    low, high = (f"{100 * value:.0f}" for value in (min(sparsities.values()), max(sparsities.values())))
    return f"{low} %" if low == high else f"{low}–{high} %"
