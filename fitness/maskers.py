"""What a mask policy decides about: units of a model, the metric of each matrix, or single weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from evoprune.fitness.unit_criteria import UNIT_CRITERIA, UnitCriterion
from evoprune.fitness.units import PARTS, PartName
from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.expression import parse
from evoprune.metrics.records import parse_pattern
from evoprune.metrics.terminals import STATISTICS, TERMINALS

UNIT_KINDS: Mapping[str, tuple[PartName, ...]] = {
    "kv-group": ("attention",),
    "query-head": ("attention",),
    "neuron": ("mlp",),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "block": PARTS,
}
"""Kinds of units, and the parts of a block that they divide or are.

Two more hold several neurons in one: ``neurons:N`` N consecutive ones, ``ranked:N`` N that a criterion ranks next to
each other in their block: neurons in a row differ in what they are worth, and what goes with a bad one is often good.
"""

_NEURONS = re.compile(r"(neurons|ranked):([1-9]\d{0,6})")


@dataclass(frozen=True, slots=True)
class ByUnits:
    """A unit is what `kinds` say: KV groups, query heads, neurons, or whole parts.

    Attributes:
        ranked_by: the criterion that ranks neurons, a unit criterion's name or an expression of weights; None where no
            kind is of ranked ones.

    Raises:
        InvalidInput: there is no kind, two of them hold the same, or neurons are ranked by nothing.
        UnknownName: no such kind, or no such criterion.
    """

    kinds: tuple[str, ...]
    ranked_by: str | None = None
    kind: ClassVar[str] = "units"

    def __post_init__(self) -> None:
        if not self.kinds:
            raise InvalidInput("no kind of unit is named: give some, such as kv-group,neurons:64")
        owners: dict[PartName, str] = {}
        for kind in self.kinds:
            for part in parts_of(kind):
                if part in owners:
                    raise InvalidInput(
                        f"units {owners[part]!r} and {kind!r} overlap in the {part}: give one kind for each part"
                    )
                owners[part] = kind
        if self.ranked != (self.ranked_by is not None):
            raise InvalidInput("ranked neurons, and no others, are ranked by a criterion: name both or neither")
        if self.ranked_by is not None:
            unit_criterion_named(self.ranked_by)

    @property
    def ranked(self) -> bool:
        """Whether some units hold neurons that a criterion ranks next to each other."""
        return any(map(is_ranked, self.kinds))

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics without which it cannot be applied."""
        if self.ranked_by is None:
            return frozenset()
        return unit_criterion_named(self.ranked_by).needs & STATISTICS

    def to_json(self) -> dict[str, Any]:
        """What `masker_from` reads."""
        ranked = {} if self.ranked_by is None else {"ranked_by": self.ranked_by}
        return {"kind": self.kind, "units": list(self.kinds), **ranked}


@dataclass(frozen=True, slots=True)
class ByMetrics:
    """A unit is a matrix masked by one of `metrics`; exactly one unit of each matrix is kept.

    Attributes:
        pattern: (N, M) of every mask.
        metrics: names of criteria, or expressions.

    Raises:
        InvalidInput: there are fewer than two different ones, or one cannot be read.
        UnknownName: no such criterion.
    """

    pattern: tuple[int, int]
    metrics: tuple[str, ...]
    kind: ClassVar[str] = "metrics"

    def __post_init__(self) -> None:
        if len(set(self.metrics)) < max(len(self.metrics), 2):
            raise InvalidInput(
                f"the metrics to choose from are {', '.join(self.metrics)[:80] or 'none'}: give two or more, each once"
            )
        for metric in self.metrics:
            criterion_named(metric)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics without which it cannot be applied."""
        return frozenset().union(*(criterion_named(metric).needs for metric in self.metrics)) & STATISTICS

    def to_json(self) -> dict[str, Any]:
        """What `masker_from` reads."""
        return {"kind": self.kind, "pattern": _spelled(self.pattern), "metrics": list(self.metrics)}


@dataclass(frozen=True, slots=True)
class ByWeights:
    """A unit is a weight; of every M consecutive ones of a row N are kept. Experimental: there are very many.

    Attributes:
        pattern: (N, M).
        metric: a name of a criterion, or an expression: its scores are what a policy starts from.

    Raises:
        InvalidInput: the metric cannot be read.
        UnknownName: no such criterion.
    """

    pattern: tuple[int, int]
    metric: str
    kind: ClassVar[str] = "weights"

    def __post_init__(self) -> None:
        criterion_named(self.metric)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics without which it cannot be applied."""
        return criterion_named(self.metric).needs & STATISTICS

    def to_json(self) -> dict[str, Any]:
        """What `masker_from` reads."""
        return {"kind": self.kind, "pattern": _spelled(self.pattern), "metric": self.metric}


Masker = ByUnits | ByMetrics | ByWeights

_FIELDS = {ByUnits.kind: ("units",), ByMetrics.kind: ("pattern", "metrics"), ByWeights.kind: ("pattern", "metric")}


def masker_from(value: Any) -> Masker:
    """The masker that JSON values spell.

    Raises:
        InvalidInput: they spell none; says which field is wrong.
        UnknownName: a kind of unit or a criterion does not exist.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise InvalidInput(f"a masker of kind {str(kind)[:40]!r}; the kinds are {', '.join(_FIELDS)}")
    optional = {"ranked_by"} if kind == ByUnits.kind else set()
    if set(value) - optional != {"kind", *_FIELDS[kind]}:
        raise InvalidInput(f"a masker of kind {kind!r} has 'kind' and {' and '.join(map(repr, _FIELDS[kind]))} alone")
    if kind == ByUnits.kind:
        ranked = _texts([value["ranked_by"]], "ranked_by") if "ranked_by" in value else (None,)
        return ByUnits(_texts(value["units"], "units"), *ranked)
    if not isinstance(value["pattern"], str):
        raise InvalidInput(f"pattern {str(value['pattern'])[:40]!r} is not text such as 2:4")
    pattern = parse_pattern(value["pattern"])
    if kind == ByMetrics.kind:
        return ByMetrics(pattern, _texts(value["metrics"], "metrics"))
    return ByWeights(pattern, *_texts([value["metric"]], "metric"))


def parts_of(kind: str) -> tuple[PartName, ...]:
    """The parts of a block that a kind of unit divides or is.

    Raises:
        UnknownName: no such kind.
    """
    if _NEURONS.fullmatch(kind):
        return ("mlp",)
    if kind not in UNIT_KINDS:
        raise UnknownName("kind of unit", kind, [*UNIT_KINDS, "neurons:64", "ranked:32"])
    return UNIT_KINDS[kind]


def neurons_in(kind: str) -> int:
    """How many neurons one unit of this kind has; 0 if it is none of neurons."""
    found = _NEURONS.fullmatch(kind)
    return int(found[2]) if found else int(kind == "neuron")


def is_ranked(kind: str) -> bool:
    """Whether its neurons are those that a criterion ranks next to each other."""
    found = _NEURONS.fullmatch(kind)
    return found is not None and found[1] == "ranked"


def unit_criterion_named(text: str) -> UnitCriterion | Criterion:
    """The unit criterion of this name, else the criterion of weights of this name or with this expression.

    Raises:
        InvalidInput: it is neither.
        UnknownName: no such criterion.
    """
    return UNIT_CRITERIA[text] if text in UNIT_CRITERIA else criterion_named(text)


def criterion_named(text: str) -> Criterion:
    """The criterion of this name, or with this expression; no file is read.

    Raises:
        InvalidInput: it is neither.
        UnknownName: no such criterion.
    """
    if text in CRITERIA:
        return CRITERIA[text]
    if "(" in text or text in TERMINALS:
        return Metric(parse(text))
    raise UnknownName("criterion", text, CRITERIA)


def _texts(values: Any, what: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InvalidInput(f"{what!r} of a masker is {str(values)[:40]}: give text")
    return tuple(values)


def _spelled(pattern: tuple[int, int]) -> str:
    return f"{pattern[0]}:{pattern[1]}"
