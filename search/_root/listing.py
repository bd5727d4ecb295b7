"""What `evoprune list KIND` lists: one plain record per plug-in, as the registries have them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from evoprune.fitness.allocators import ALLOCATORS
from evoprune.fitness.compressors import COMPRESSORS, AtRunTime
from evoprune.fitness.methods import METHODS
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.recoveries import RECOVERIES
from evoprune.fitness.unit_criteria import UNIT_CRITERIA
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import to_text
from evoprune.metrics.operators import OPERATORS
from evoprune.metrics.parameters import parameters_of
from evoprune.metrics.site_terminals import ALL_TERMINALS, SITE_TERMINALS
from evoprune.metrics.types import Type
from evoprune.search.breeders import BREEDERS
from evoprune.search.config_structure import STRUCTURE_SEARCHERS
from evoprune.search.estimators import ESTIMATORS
from evoprune.search.learners import LEARNERS
from evoprune.search.policies import POLICIES, Knapsack, Strata
from evoprune.search.searchers import SEARCHERS
from evoprune.search.spaces import SPACES

Row = dict[str, Any]

# How many values a terminal has for a matrix.
_ONE_PER = {Type.MAT: "weight", Type.INVEC: "input", Type.OUTVEC: "output", Type.SCAL: "matrix"}

# Where the scores of a unit criterion are compared.
_COMPARED = {"global": "over all blocks", "uniform": "within a block"}


# What a budget of masks is of.
_BUDGETS = {Strata: "counts", Knapsack: "costs"}


def rows_of(kind: str) -> list[Row]:
    """The plug-ins of a kind, by name."""
    return _KINDS[kind]()


def _criteria() -> list[Row]:
    rows = []
    for name in CRITERIA:
        criterion = CRITERIA[name]
        expression = criterion.expression if isinstance(criterion, Metric) else None
        rows.append(
            {
                "name": name,
                "group": criterion.group,
                "needs": sorted(criterion.needs),
                "expression": None if expression is None else expression.text,
                "formula": None if expression is None else to_text(expression),
                "source": criterion.source,
            }
        )
    return rows


def _operators() -> list[Row]:
    rows = []
    for name in OPERATORS:
        operator = OPERATORS[name]
        arguments = ["x", "y", "z"][: operator.arity] + ["number"] * (operator.kind == "power")
        rows.append(
            {
                "name": name,
                "use": f"{name}({','.join(arguments)})",
                "kind": operator.kind,
                "arity": operator.arity,
                "scope": operator.scope,
                "complexity": operator.weight,
            }
        )
    return rows


def _terminals() -> list[Row]:
    return [
        {
            "name": name,
            "for": "allocations" if name in SITE_TERMINALS else "metrics",
            "one_per": "matrix" if name in SITE_TERMINALS else _ONE_PER[terminal.type],
            "pass": terminal.cost,
            "meaning": terminal.meaning,
        }
        for name, terminal in ALL_TERMINALS.items()
    ]


def _allocators() -> list[Row]:
    rows = []
    for name in ALLOCATORS:
        allocator = ALLOCATORS[name]
        rows.append(
            {
                "name": name,
                "needs": [*sorted(allocator.needs), *sorted(allocator.uses)],
                "parameters": [f"{key}={_word(value)}" for key, value in parameters_of(allocator).items()],
                "what": _first_line(type(allocator)),
            }
        )
    return rows


def _methods() -> list[Row]:
    return [
        {
            "name": name,
            "parameters": [f"{key}={_word(value)}" for key, value in parameters_of(METHODS[name]).items()],
            "what": _first_line(type(METHODS[name])),
            "source": METHODS[name].source,
        }
        for name in METHODS
    ]


def _compressors() -> list[Row]:
    return [
        {
            "name": name,
            "needs": sorted(COMPRESSORS[name].needs),
            "reads_criterion": COMPRESSORS[name].reads_criterion,
            "keeps_mask": COMPRESSORS[name].keeps_mask,
            "keeps_weights": COMPRESSORS[name].keeps_weights,
            "parameters": [f"{key}={_word(value)}" for key, value in parameters_of(COMPRESSORS[name]).items()],
            "at_run_time": isinstance(COMPRESSORS[name], AtRunTime),
            "cost": COMPRESSORS[name].cost,
            "what": _first_line(type(COMPRESSORS[name])),
            "source": COMPRESSORS[name].source,
        }
        for name in COMPRESSORS
    ]


def _unit_criteria() -> list[Row]:
    return [
        {
            "name": name,
            "needs": sorted(UNIT_CRITERIA[name].needs),
            "compared": _COMPARED[UNIT_CRITERIA[name].spread],
            "what": _first_line(type(UNIT_CRITERIA[name])),
            "source": UNIT_CRITERIA[name].source,
        }
        for name in UNIT_CRITERIA
    ]


def _objectives() -> list[Row]:
    return [
        {
            "name": name,
            "role": OBJECTIVES[name].role,
            "unit": OBJECTIVES[name].unit,
            "needs": sorted(OBJECTIVES[name].needs),
            "what": _first_line(sys.modules[type(OBJECTIVES[name]).__module__]),
        }
        for name in OBJECTIVES
    ]


def _searchers() -> list[Row]:
    found = [{"name": name, "search": "metric", "what": _first_line(SEARCHERS[name])} for name in SEARCHERS]
    found += [{"name": name, "search": "allocation", "what": BREEDERS[name].what} for name in BREEDERS]
    found += [{"name": name, "search": "structure", "what": BREEDERS[name].what} for name in STRUCTURE_SEARCHERS]
    return found + [{"name": name, "search": "policy", "what": LEARNERS[name].what} for name in LEARNERS]


def _spaces() -> list[Row]:
    return [{"name": name, "what": _first_line(SPACES[name])} for name in SPACES]


def _recoveries() -> list[Row]:
    return [
        {
            "name": name,
            "parameters": [f"{key}={_word(value)}" for key, value in parameters_of(RECOVERIES[name]).items()],
            "packages": list(RECOVERIES[name].packages),
            "what": _first_line(type(RECOVERIES[name])),
            "source": RECOVERIES[name].source,
        }
        for name in RECOVERIES
    ]


def _learners() -> list[Row]:
    return [
        {
            "name": name,
            "options": [f"{key}={_word(value)}" for key, value in parameters_of(LEARNERS[name]).items()],
            "gradients": LEARNERS[name].gradients,
            "what": LEARNERS[name].what,
        }
        for name in LEARNERS
    ]


def _estimators() -> list[Row]:
    return [
        {
            "name": name,
            "independent_units": ESTIMATORS[name].independent,
            "what": ESTIMATORS[name].what,
        }
        for name in ESTIMATORS
    ]


def _policies() -> list[Row]:
    return [
        {
            "name": name,
            "budgets": [words for kind, words in _BUDGETS.items() if kind in POLICIES[name].budgets],
            "what": POLICIES[name].what,
        }
        for name in POLICIES
    ]


_KINDS: Mapping[str, Callable[[], list[Row]]] = {
    "criteria": _criteria,
    "operators": _operators,
    "terminals": _terminals,
    "allocators": _allocators,
    "compressors": _compressors,
    "methods": _methods,
    "unit-criteria": _unit_criteria,
    "objectives": _objectives,
    "spaces": _spaces,
    "searchers": _searchers,
    "learners": _learners,
    "estimators": _estimators,
    "policies": _policies,
    "recoveries": _recoveries,
}


def _word(value: object) -> str:
    """A parameter's value as options take it; one that decides itself is `auto`."""
    if value is None:
        return "auto"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]
