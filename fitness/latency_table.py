"""Tables of latencies: how long attentions and MLPs take at the widths that they may have, and the rest of a model.

A table says where it was measured, and is refused elsewhere; `evoprune.fitness.latency_measure` makes it.
Source: Kurtic et al. 2023 (ZipLM, arXiv:2302.04089); layerwise sparsity allocation, sections 3.1 and 5.8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evoprune.fitness.latency_passes import Work
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.numerics import numerics_class, processor_name
from evoprune.fitness.unit_costs import CostTable, PartCosts, UnitCosts
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import strict_json, user_text, write_atomically

FORMAT = "evoprune-latency/1"


@dataclass(frozen=True)
class LatencyTable:
    """Nanoseconds of the parts of one model in one kind of pass on one machine.

    Attributes:
        place: what the times depend on beside the widths, as JSON values: model, device, libraries, and the pass.
        costs: as measured, tile effects and all.
    """

    place: Mapping[str, Any]
    costs: UnitCosts

    @property
    def work(self) -> Work:
        """What the pass is of."""
        return Work(**self.place["pass"])

    def check(self, here: Mapping[str, Any]) -> None:
        """Refuse another place.

        Args:
            here: as `place_of` gives it.

        Raises:
            InvalidInput: names what differs first.
        """
        for name, value in here.items():
            if (there := self.place.get(name)) != value:
                raise InvalidInput(
                    f"the table of latencies was measured elsewhere: its {name} is {_shown(there)}, and here it is "
                    f"{_shown(value)}; leave the table out to measure one here"
                )

    def budget(self) -> UnitCosts:
        """The costs to plan with: what keeps more never costs less. What is reported are those as measured."""
        smooth: dict[PartCosts, PartCosts] = {}
        for part in {*self.costs.attention, *self.costs.mlp}:
            assert isinstance(part, CostTable)
            smooth[part] = isotonic(part)
        return replace(
            self.costs,
            attention=tuple(smooth[part] for part in self.costs.attention),
            mlp=tuple(smooth[part] for part in self.costs.mlp),
        )

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads."""
        return {"format": FORMAT, "place": dict(self.place), "costs": self.costs.to_json()}

    @classmethod
    def from_json(cls, document: Any) -> LatencyTable:
        """The table in a document.

        Raises:
            InvalidInput: it is no such document.
        """
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            shown = document.get("format") if isinstance(document, dict) else type(document).__name__
            raise InvalidInput(f"format {str(shown)[:40]!r} is not known; this version reads {FORMAT!r}")
        place, costs = document.get("place"), UnitCosts.from_json(document.get("costs"))
        parts = (*costs.attention, *costs.mlp)
        if not isinstance(place, dict) or costs.quantity != "latency" or not all(map(_is_measured, parts)):
            raise InvalidInput("it has no latencies and the place where they were measured")
        return cls(place, costs)


def isotonic(table: CostTable) -> CostTable:
    """The costs that are nearest to these, by the largest difference, and nowhere fall as more is kept.

    The middle between the most that keeping less costs and the least that keeping more does, rounded down.
    Source: Ubhaya 1974, isotone optimization, Journal of Approximation Theory 12: 146-159.
    """

    def within(less: Sequence[int], more: Sequence[int]) -> bool:
        return all(low <= high for low, high in zip(less, more, strict=True))

    smooth = []
    for kept, _ in table.entries:
        most = max(cost for less, cost in table.entries if within(less, kept))
        least = min(cost for more, cost in table.entries if within(kept, more))
        smooth.append((kept, (most + least) // 2))
    return CostTable(tuple(smooth))


def place_of(language_model: LanguageModel, work: Work) -> dict[str, Any]:
    """What times of passes depend on beside the widths of blocks; `LatencyTable.place`."""
    return {**numerics_class(language_model), "processor": processor_name(), "pass": work.to_json()}


def read_table(path: str | Path) -> LatencyTable:
    """The table in a file.

    Raises:
        InvalidInput: there is none.
    """
    text = user_text(path, "table of latencies", "a latency.json", "a latency.json, such as a run exports")
    try:
        return LatencyTable.from_json(strict_json(text))
    except (InvalidInput, ValueError) as error:
        raise InvalidInput(f"{str(path)[:200]!r} is no table of latencies: {error}") from None


def write_table(table: LatencyTable, path: Path) -> None:
    """Write a table to a file, whole or not at all."""
    write_atomically(path, json.dumps(table.to_json(), indent=1) + "\n")


def _is_measured(part: PartCosts) -> bool:
    return isinstance(part, CostTable) and len(part.entries) > 0


def _shown(value: Any) -> str:
    return repr(value)[:80]
