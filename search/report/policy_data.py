"""What the report of a policy search says, read from the run's folder."""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evoprune.metrics.packed import unpacked
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.kinds.policy import KIND
from evoprune.search.mask_words import Mask, chosen_metrics, counts_text
from evoprune.search.policy_search import INITIALISATION
from evoprune.search.report.run_data import RunData
from evoprune.search.rundir import RunDirectory

MOST_DRAWN = 2000
"""Up to so many units are drawn each; more are drawn as means by block and kind."""

_LOSSES = ("loss", "loss_std", "reference")
_PROBABILITIES = ("groups", "units")


@dataclass(frozen=True)
class Row:
    """Units of one kind in one block, or of one matrix.

    Attributes:
        kind: of the units, or of the matrix.
        block: index of the block.
        name: module path.
        units: which ones, of all.
        members: how many KV groups, query heads, neurons or parts each unit holds.
    """

    kind: str
    block: int
    name: str
    units: range
    members: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """A step and its masks.

    Attributes:
        number: how many steps came before.
        losses: of its masks on its minibatch; those that have one.
        mean: of the losses as the learner counts them, which counts equal masks once each.
        spread: their standard deviation; None of one.
        reference: loss of the policy's mode on the same minibatch; None where it was not measured.
        note: what the learner says of the step; empty before its last mask is measured.
    """

    number: int
    losses: tuple[float, ...]
    mean: float | None
    spread: float | None
    reference: float | None
    note: Mapping[str, Any]


@dataclass(frozen=True)
class Mode:
    """A mask that the policy would give, on one text.

    Attributes:
        steps: after how many steps.
        birth: that measured it.
        loss: on that text, with its standard error over windows.
        start: a mask to begin with that is not the policy's own.
    """

    steps: int
    birth: int
    loss: float
    stderr: float
    mask: str
    start: bool = False


@dataclass(frozen=True)
class Moment:
    """Keep probabilities at some time.

    Attributes:
        steps: after how many steps.
        values: by unit, or by block and kind.
    """

    steps: int
    values: tuple[float, ...]


class PolicyData(RunData[PolicySearchConfig]):
    """A policy search's run as a report reads it.

    Args:
        run: finished or not.

    Raises:
        InvalidInput: not a policy search, or its files are damaged.
    """

    kind = "policy"

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run, PolicySearchConfig)

    def what(self, values: Mapping[str, Any]) -> str:
        if self.result is not None and "cost" in values and self.metrics is None:
            return f"{values['cost']:,} of {self.result['dense_cost']:,} {self.result['cost']}"
        chosen = values.get("policy", {}).get("metrics")
        return "" if chosen is None else counts_text(chosen.values())

    @property
    def n_evaluations(self) -> int:
        return self.result["evaluations"] if self.result is not None else sum(line["counted"] for line in self.lines)

    @property
    def n_removed(self) -> int | None:
        """Of a pattern the weights that go; budgets of units are of heads and MLPs, and not of prunable weights."""
        return None if self.result is None or self.config.target.pattern is None else self.result["best"]["removed"]

    # Texts

    @property
    def batch_tokens(self) -> int:
        """Tokens of a minibatch."""
        return self.config.searcher.batch * self.config.data.window

    @property
    def validation_tokens(self) -> int:
        """Tokens of the text for modes."""
        return self.config.searcher.validation * self.config.data.window

    @property
    def final_tokens(self) -> int:
        """Tokens of all text B."""
        return self.config.text_windows * self.config.data.window

    # Units

    @property
    def metrics(self) -> list[str] | None:
        """What each matrix chooses from, in the order of its units; None where units are something else."""
        return self.config.masker["metrics"] if self.config.masker["kind"] == "metrics" else None

    @cached_property
    def rows(self) -> list[Row]:
        """Units by block and kind, or by matrix; none before the search has begun, or where they are single weights."""
        known = self.identity.get("unit_rows", []) if self.result is None else self.result["units"]["rows"]
        if self.config.masker["kind"] == "weights":
            return []
        found, start = [], 0
        for row in known:
            count, size = row["count"], row["size"]
            members = tuple(min(size, row["of"] - at * size) for at in range(count))
            found.append(Row(row["kind"], row["block"], row["name"], range(start, start + count), members))
            start += count
        return found

    @property
    def n(self) -> int:
        """How many units there are."""
        return self.rows[-1].units.stop if self.rows else 0

    @cached_property
    def kinds(self) -> list[str]:
        """Of units, or of matrices, in model order."""
        return list(dict.fromkeys(row.kind for row in self.rows))

    @cached_property
    def blocks(self) -> list[int]:
        """Those that have units, ascending."""
        return sorted({row.block for row in self.rows})

    @cached_property
    def cells(self) -> dict[tuple[str, int], int]:
        """The row of every kind and block."""
        return {(row.kind, row.block): at for at, row in enumerate(self.rows)}

    # What was found

    @cached_property
    def best(self) -> Mapping[str, Any] | None:
        """The winner as the result has it; in a run that is not finished, the best mode so far."""
        found: Mapping[str, Any] | None = (
            self.result["best"] if self.result is not None else KIND.progress_of(self.run)["best"]
        )
        return found

    @cached_property
    def mask(self) -> Mask | None:
        """[n] bool, what that keeps."""
        return unpacked(self.best["policy"]["kept"], self.n) if self.best is not None and self.rows else None

    @cached_property
    def kept(self) -> list[int]:
        """Units that it keeps, by row."""
        if self.mask is None:
            return []
        return [int(self.mask[row.units.start : row.units.stop].sum()) for row in self.rows]

    @cached_property
    def kept_members(self) -> list[int]:
        """KV groups, heads, neurons or parts in these, by row."""
        if self.mask is None:
            return []
        return [
            sum(members for unit, members in zip(row.units, row.members, strict=True) if self.mask[unit])
            for row in self.rows
        ]

    @cached_property
    def chosen(self) -> list[str]:
        """The metric of each matrix, by row; empty where units are something else."""
        return [] if self.metrics is None or self.mask is None else chosen_metrics(self.mask, self.metrics)

    @cached_property
    def choices(self) -> list[tuple[str, int, dict[str, int]]]:
        """(metric, matrices that have it, the same by kind), the most frequent first; all that could be chosen."""
        total = Counter(self.chosen)
        by_kind = Counter((metric, row.kind) for metric, row in zip(self.chosen, self.rows, strict=False))
        ranked = sorted(self.metrics or (), key=lambda metric: (-total[metric], metric))
        return [(metric, total[metric], {kind: by_kind[metric, kind] for kind in self.kinds}) for metric in ranked]

    # How the search went

    @cached_property
    def steps(self) -> list[Step]:
        """Those that were begun, oldest first."""
        by_number: dict[int, list[Mapping[str, Any]]] = {}
        for line in self.lines:
            if line["stage"] == "step":
                by_number.setdefault(line["step"], []).append(line)
        found = []
        for number, lines in sorted(by_number.items()):
            samples = [line["loss"] for line in lines if line["role"] == "sample" and line["loss"] is not None]
            references = [line["loss"] for line in lines if line["role"] == "reference"]
            note = lines[-1].get("policy", {})
            own = note.get("loss") is not None
            found.append(
                Step(
                    number,
                    tuple(samples),
                    note["loss"] if own else statistics.fmean(samples) if samples else None,
                    note.get("loss_std") if own else statistics.stdev(samples) if len(samples) > 1 else None,
                    # It may be one of the samples, and then is measured once.
                    note.get("reference", references[0] if references else None),
                    note,
                )
            )
        return found

    @property
    def n_steps(self) -> int:
        """Steps that are done."""
        return self.result["steps"] if self.result is not None else sum(bool(step.note) for step in self.steps)

    @cached_property
    def modes(self) -> list[Mode]:
        """Modes of the policy on the text for modes, and further masks to begin with, by birth."""
        lines = [line for line in self.lines if line["stage"] in (INITIALISATION, "validation")]
        own = next((line["birth"] for line in lines), None)
        return [
            self._mode(line, line["step"], start=line["stage"] == INITIALISATION and line["birth"] != own)
            for line in lines
            if line["loss"] is not None
        ]

    @cached_property
    def finals(self) -> list[Mode]:
        """Those that were compared on all text B, the best first."""
        steps = {mode.mask: (mode.steps, mode.start) for mode in reversed(self.modes)}
        lines = [line for line in self.lines if line["stage"] == "final" and line["loss"] is not None]
        found = [self._mode(line, *steps.get(line["mask"], (0, False))) for line in lines]
        return sorted(found, key=lambda mode: (mode.loss, mode.steps))

    @staticmethod
    def _mode(line: Mapping[str, Any], steps: int, start: bool) -> Mode:
        return Mode(steps, line["birth"], line["loss"], line["stderr"], line["mask"], start)

    @cached_property
    def groups(self) -> list[Moment]:
        """Mean keep probability by block and kind, after every step."""
        return self._moments("groups")

    @cached_property
    def snapshots(self) -> list[Moment]:
        """Keep probability of every unit, as often as the history tells it."""
        return self._moments("units")

    @property
    def by_unit(self) -> bool:
        """Whether single units can be shown: there are several of a kind in a block, and few enough in all."""
        return bool(self.snapshots) and len(self.rows) < self.n <= MOST_DRAWN

    @cached_property
    def shown(self) -> list[Moment]:
        """Some moments of the run, the first and the last among them, by unit, or by block and kind."""
        if not self.by_unit and self.metrics is not None:
            return []
        known = self.snapshots if self.by_unit else self.groups if self.rows else []
        places = sorted({0, (len(known) - 1) // 2, len(known) - 1} & {*range(len(known))})
        return [known[place] for place in places]

    def _moments(self, name: str) -> list[Moment]:
        noted = [(line, line["policy"][name]) for line in self.lines if name in line.get("policy", {})]
        return [Moment(line["step"] + (line["stage"] == "step"), tuple(values)) for line, values in noted]

    @cached_property
    def metric_shares(self) -> dict[str, list[tuple[int, float]]]:
        """Of a choice of metrics: (steps done, mean probability over the matrices), by metric."""
        if self.metrics is None:
            return {}
        count = len(self.metrics)
        return {
            metric: [(moment.steps, statistics.fmean(moment.values[at::count])) for moment in self.snapshots]
            for at, metric in enumerate(self.metrics)
        }

    @cached_property
    def diagnostics(self) -> dict[str, list[tuple[int, float]]]:
        """(steps done before, value) of every number that the learner tells, by name; None is left out."""
        found: dict[str, list[tuple[int, float]]] = {}
        for step in self.steps:
            for name, value in step.note.items():
                if name not in (*_LOSSES, *_PROBABILITIES) and isinstance(value, int | float):
                    found.setdefault(name, []).append((step.number, value))
        return found

    @property
    def constant(self) -> dict[str, float]:
        """Those of them that never changed, with their value."""
        values = {name: {value for _, value in points} for name, points in self.diagnostics.items()}
        return {name: found.pop() for name, found in values.items() if len(found) == 1}

    # Files

    def probabilities_csv(self) -> str | None:
        """Keep probabilities by unit, or by block and kind where the history has no others; None if it has none."""
        of_units = bool(self.snapshots) and len(self.rows) < self.n
        moments = self.snapshots if of_units else self.groups
        if not self.rows or not moments:
            return None
        after = [f"after {moment.steps} steps" for moment in moments]
        if not of_units:
            head = ["block", "kind", "part", "units", *after]
            body = [
                [row.block, row.kind, row.name, len(row.units), *(moment.values[at] for moment in moments)]
                for at, row in enumerate(self.rows)
            ]
            return _csv(head, body)
        head = ["unit", "block", "kind", "part", "metric" if self.metrics else "index", "kept", *after]
        body = [
            [
                *(unit, row.block, row.kind, row.name, self.metrics[index] if self.metrics else index),
                "" if self.mask is None else int(self.mask[unit]),
                *(moment.values[unit] for moment in moments),
            ]
            for row in self.rows
            for index, unit in enumerate(row.units)
        ]
        return _csv(head, body)

    def kept_csv(self) -> str | None:
        """What the best mask keeps by block and kind, in units and in their members; None before there is one."""
        if not self.kept:
            return None
        if self.chosen:
            chosen = zip(self.rows, self.chosen, strict=True)
            return _csv(
                ["block", "kind", "matrix", "metric"], [[row.block, row.kind, row.name, name] for row, name in chosen]
            )
        body = []
        for at, row in enumerate(self.rows):
            members, kept = sum(row.members), self.kept_members[at]
            probability = [self.groups[-1].values[at]] if self.groups else [""]
            body.append(
                [
                    *(row.block, row.kind, row.name, len(row.units), self.kept[at], members, kept),
                    *(round(kept / members, 6), *probability),
                ]
            )
        head = ["block", "kind", "part", "units", "units kept", "members", "members kept", "share kept"]
        return _csv([*head, "mean probability"], body)


def _csv(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *body])
    return text.getvalue()
