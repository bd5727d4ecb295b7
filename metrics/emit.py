"""Metrics as files for people and for other tools: ``.py``, ``.json`` and ``.tex``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evoprune.metrics.criterion import Metric
from evoprune.metrics.emit_formula import latex, to_text
from evoprune.metrics.emit_json import json_document
from evoprune.metrics.emit_latex import tex_source
from evoprune.metrics.emit_python import python_source
from evoprune.metrics.emit_selftest import SelfTest, make_selftest
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import write_atomically
from evoprune.metrics.records import MaskRule

__all__ = ["MetricExport", "latex", "to_text"]

# What the header of a .py says of the provenance and of the results, if the record has it; all is in the .json.
_HEADER_NOTES = ("model", "fitness", "statistics", "seed", "run")
_HEADER_RESULTS = ("heldout_perplexity",)


@dataclass(frozen=True)
class MetricExport:
    """A metric and all that its files say about it. The three forms name the same ``metric.json`` by its hash.

    Attributes:
        rule: what the exported mask removes unless told otherwise. What scores are compared within is the metric's own
            `group`; to export another choice, replace that.
        title: one line for people.
        provenance: plain data: model, statistics, fitness, versions, cost, lineage.
        results: plain data: fitness per rung, held-out table, baselines of the same run.
        equivalent_to: names or texts of metrics that give the same masks.
    """

    metric: Metric
    rule: MaskRule = field(default_factory=lambda: MaskRule(sparsity=0.5))
    title: str = "symbolic pruning metric"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    equivalent_to: tuple[str, ...] = ()

    @cached_property
    def selftest(self) -> SelfTest:
        """Portable inputs and what the metric gives for them."""
        return make_selftest(self.metric, self.rule)

    @cached_property
    def document(self) -> dict[str, Any]:
        """``metric.json`` as plain data.

        Raises:
            ValueError: `provenance` or `results` hold a NaN or an infinity.
        """
        return json_document(
            self.metric,
            self.rule,
            self.selftest,
            title=self.title,
            provenance=self.provenance,
            results=self.results,
            equivalent_to=self.equivalent_to,
        )

    @property
    def json_text(self) -> str:
        """``metric.json``."""
        return json.dumps(self.document, indent=2, ensure_ascii=False) + "\n"

    @property
    def python_text(self) -> str:
        """``metric.py``: needs nothing but torch; run as a script it tests itself."""
        notes = {name: self.provenance[name] for name in _HEADER_NOTES if name in self.provenance}
        notes |= {name: self.results[name] for name in _HEADER_RESULTS if name in self.results}
        return python_source(
            self.metric,
            self.rule,
            self.selftest,
            title=self.title,
            notes={**notes, **({"source": self.metric.source} if self.metric.source else {})},
            json_hash=self.document["sha256"],
        )

    @property
    def tex_text(self) -> str:
        """``metric.tex``."""
        return tex_source(self.metric, title=self.title, json_hash=self.document["sha256"])

    def write(self, path: Path) -> None:
        """Write the form that the path's ending names, atomically.

        Raises:
            InvalidInput: another ending.
        """
        if path.suffix == ".py":
            text = self.python_text
        elif path.suffix == ".json":
            text = self.json_text
        elif path.suffix == ".tex":
            text = self.tex_text
        else:
            raise InvalidInput(f"cannot export a metric to {path.name[:80]!r}: the ending must be .py, .json or .tex")
        write_atomically(path, text)
