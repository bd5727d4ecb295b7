"""Allocation formulas: from statistics of a model's matrices to how much each of them loses.

A formula is an expression over `evoprune.metrics.site_terminals` and a spread. It is of no particular model: whoever
measures the terminals of another one can apply it there, at any sparsity. Source of the idea: Li et al. 2024, DSA
(discovering sparsity allocation), which searches such functions over fewer steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evoprune.metrics.emit_formula import latex, to_text
from evoprune.metrics.errors import InvalidExpression, InvalidInput, UnknownName
from evoprune.metrics.expression import CONSTANT, Expression, from_json, parse
from evoprune.metrics.files import content_hash, user_path
from evoprune.metrics.formula_operators import FUNCTIONS, bounded
from evoprune.metrics.formula_rule import levels_at_budget, requested_sparsities
from evoprune.metrics.records import LEVELS, Site, removed_count
from evoprune.metrics.site_terminals import SITE_TERMINALS

FORMAT = "evoprune-allocation-formula/1"
MAX_SPREAD = 1.0
_MAX_BYTES = 1_000_000

Statistics = Mapping[str, Sequence[float]]
"""One finite number per matrix, in model order, by name of a terminal."""


@dataclass(frozen=True)
class AllocationFormula:
    """Scores of matrices as an expression, and how far these scores move sparsities.

    Attributes:
        expression: over `SITE_TERMINALS`; a matrix with a high score keeps more.
        spread: largest distance from the mean that is asked for, in fractions of weights, in [0, 1].

    Raises:
        InvalidExpression, UnknownName: the expression is of another language.
        InvalidInput: the spread is outside [0, 1].
    """

    expression: Expression
    spread: float

    def __post_init__(self) -> None:
        for node in self.expression.walk():
            if node.args and node.head not in FUNCTIONS:
                raise InvalidExpression(
                    f"{node.head[:40]} is no operator of allocation formulas: {', '.join(FUNCTIONS)}"
                )
            if not node.args and node.head != CONSTANT and node.head not in SITE_TERMINALS:
                raise UnknownName("terminal", node.head, SITE_TERMINALS)
        if not 0 <= self.spread <= MAX_SPREAD:  # a NaN is refused too
            raise InvalidInput(f"spread {self.spread} is outside [0, {MAX_SPREAD:g}]")

    @classmethod
    def from_text(cls, text: str, spread: float) -> AllocationFormula:
        """The formula whose expression `text` spells, such as ``sub(outliers_block,mul(0.3,position))``."""
        return cls(parse(text, SITE_TERMINALS), spread)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the terminals that it reads, in the order of `SITE_TERMINALS`."""
        return tuple(name for name in SITE_TERMINALS if name in self.expression.terminals)

    @cached_property
    def text(self) -> str:
        """The sparsity that is asked for, as people write it; S is that of the whole model."""
        return f"S - {self.spread:g}·squash({to_text(self.expression)})"

    @cached_property
    def latex(self) -> str:
        """The same in LaTeX math."""
        return f"S - {self.spread:g} \\cdot \\operatorname{{squash}}\\left({latex(self.expression)}\\right)"

    def scores(self, statistics: Statistics) -> list[float]:
        """One finite number per matrix.

        Raises:
            InvalidInput: a terminal is not among the statistics.
        """
        if missing := [name for name in self.reads if name not in statistics]:
            raise InvalidInput(f"the formula reads {missing[0]}, which is not known of this model")
        count = len(next(iter(statistics.values())))
        values: dict[Expression, list[float]] = {}

        def value(node: Expression) -> list[float]:
            if node not in values:
                if node.head == CONSTANT:
                    assert node.value is not None
                    values[node] = [node.value] * count
                elif not node.args:
                    values[node] = [bounded(number) for number in statistics[node.head]]
                else:
                    exponent = [] if node.value is None else [node.value]
                    values[node] = FUNCTIONS[node.head](*map(value, node.args), *exponent)
            return values[node]

        return value(self.expression)

    def levels(self, statistics: Statistics, sizes: Sequence[tuple[int, int]], sparsity: float) -> list[int]:
        """Levels, in steps of 1/256 of a row, that together remove `sparsity` of all weights; see `levels_at_budget`.

        Args:
            statistics: at least what it `reads`.
            sizes: (out, in) of each matrix.
            sparsity: of the whole model, in [0, 1).

        Raises:
            InvalidInput: a terminal is not among the statistics, or the budget cannot be met.
        """
        budget = removed_count(sparsity, sum(math.prod(size) for size in sizes))
        requested = requested_sparsities(self.scores(statistics), self.spread, sparsity)
        try:
            return levels_at_budget(requested, [*sizes], budget)
        except ValueError as error:
            raise InvalidInput(f"sparsity {sparsity:g} cannot be met by a formula here: {error}") from None

    def sparsities(self, statistics: Statistics, sites: Sequence[Site], sparsity: float) -> list[float]:
        """`levels` of these matrices, as fractions."""
        sizes = [(site.out_features, site.in_features) for site in sites]
        return [level / LEVELS for level in self.levels(statistics, sizes, sparsity)]

    def meanings(self) -> dict[str, str]:
        """What each terminal that it reads means, by name."""
        return {name: SITE_TERMINALS[name].meaning for name in self.reads}

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_values` reads them back."""
        return {"expr": self.expression.to_json(), "spread": self.spread}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> AllocationFormula:
        """The formula that ``expr`` and ``spread`` spell; other values are passed over.

        Raises:
            InvalidInput: they spell none.
        """
        spread = values.get("spread")
        if isinstance(spread, bool) or not isinstance(spread, (int, float)):
            raise InvalidInput(f"spread {str(spread)[:40]} is no number")
        return cls(from_json(values.get("expr"), SITE_TERMINALS), float(spread))


def formula_document(formula: AllocationFormula, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """``formula.json``: the formula, what it reads, where it is from, and a hash over all of that.

    Args:
        provenance: JSON values.
    """
    document = {
        "format": FORMAT,
        **formula.to_json(),
        "expression": formula.expression.text,
        "text": formula.text,
        "latex": formula.latex,
        "reads": formula.meanings(),
        "provenance": dict(provenance),
    }
    return {**document, "sha256": content_hash(document)}


def read_formula(path: str | Path) -> AllocationFormula | None:
    """The formula in a file, or None if it is a readable file of something else; nothing in it is executed.

    Raises:
        InvalidInput: it says that it is a formula, but it was edited or does not spell one.
    """
    try:
        with user_path(path).open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        document = json.loads(data) if len(data) <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError, MemoryError):
        return None  # whoever else reads the file says what is wrong with it
    if not isinstance(document, dict) or not str(document.get("format", "")).startswith(FORMAT.partition("/")[0] + "/"):
        return None
    name = Path(path).name[:80]
    if document["format"] != FORMAT:
        raise InvalidInput(f"{name!r}: format {document['format'][:40]!r} is not known; this version reads {FORMAT!r}")
    content = {key: value for key, value in document.items() if key != "sha256"}
    try:
        if content_hash(content) != document.get("sha256"):
            raise InvalidInput("its content does not match its sha256: it was edited; export it again")
        return AllocationFormula.from_values(document)
    except InvalidInput as error:
        raise InvalidInput(f"{name!r}: {error}") from None
    except (ValueError, RecursionError, OverflowError):
        raise InvalidInput(f"{name!r} holds numbers or lists that no formula has") from None
