"""What a pruned model costs beside its quality: weights, multiply-adds, or seconds on one machine.

Costs are whole numbers, so that one genome has one cost everywhere. They follow from the levels or the shape alone;
what a second is made of is measured once, before the search.
Source: layerwise sparsity allocation, sections 5.2 and 5.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from evoprune.fitness.unit_costs import UnitCosts
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.ranks import GONE
from evoprune.metrics.records import LEVELS, Site, removed_count
from evoprune.search.spaces.levels import part_of

Part = tuple[int, str]
"""Block, and ``attention`` or ``mlp``."""

_SHAPE_UNITS = {"parameters": "parameters", "flops": "operations", "kv_bytes": "bytes", "latency": "ns"}


class Cost(Protocol):
    """A cost of what genomes say, as jobs spell it: of level vectors, or of shapes.

    Attributes:
        name: as the configuration has it.
        unit: what it counts.
        dense: of the model before pruning.
    """

    name: str
    unit: str
    dense: int

    def of(self, spelled: Sequence[Any], /) -> int:
        """The cost of a model at these levels, one a site, or with these shapes, one a block, in model order."""

    def to_json(self) -> dict[str, Any]:
        """``cost``, ``unit`` and ``dense``, and what it was made from, if that was measured."""


class Parameters:
    """Weights kept of all prunable ones. Embeddings, norms and biases are nobody's choice and are not counted."""

    name = "parameters"
    unit = "weights"

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)
        self.dense = sum(site.weights for site in sites)

    def of(self, levels: Sequence[int]) -> int:
        return sum(kept_weights(site, level) for site, level in zip(self._sites, levels, strict=True))

    def to_json(self) -> dict[str, Any]:
        return _named(self)


class MultiplyAdds:
    """Multiply-adds of the prunable matrices, and of attention itself, for one window of text.

    A weight that stays costs one for each token. A block's attention multiplies every query with every key, and the
    result with every value, which is gone only where the whole attention is. Products that a causal mask hides count,
    as dense kernels compute them. A zero inside a matrix counts as saved although no dense kernel skips it, so that for
    masks alone this is the number of weights times the number of tokens.

    Args:
        sites: the matrices, in model order.
        window: tokens.
    """

    name = "flops"
    unit = "multiply-adds"

    def __init__(self, sites: Sequence[Site], window: int) -> None:
        self._weights = Parameters(sites)
        self._window = window
        self._parts = parts_of(sites)
        # The last matrix of an attention takes what all of its heads give.
        widths = {part: sites[places[-1]].in_features for part, places in self._parts.items() if part[1] == "attention"}
        self._products = {part: 2 * window * window * width for part, width in widths.items()}
        self.dense = self.of([0] * len(sites))

    def of(self, levels: Sequence[int]) -> int:
        products = sum(count for part, count in self._products.items() if not is_gone(self._parts[part], levels))
        return self._weights.of(levels) * self._window + products

    def to_json(self) -> dict[str, Any]:
        return _named(self)


class Latency:
    """Nanoseconds of a forward pass over one window: those of what always stays, and of every part that is there.

    Sums of parts are a prediction: measure what you choose. Norms before dropped parts count as staying.

    Args:
        sites: the matrices, in model order.
        rest: nanoseconds of the embeddings, the norms and the head.
        parts: nanoseconds of every part, by block and name.

    Raises:
        InvalidInput: the table lacks a part.
    """

    name = "latency"
    unit = "ns"

    def __init__(self, sites: Sequence[Site], rest: int, parts: Mapping[Part, int]) -> None:
        self._places = parts_of(sites)
        if missing := [part for part in self._places if part not in parts]:
            raise InvalidInput(f"nobody has measured the {missing[0][1]} of block {missing[0][0]}")
        self._rest = rest
        self._parts = dict(parts)
        self.dense = self.of([0] * len(sites))

    def of(self, levels: Sequence[int]) -> int:
        there = (self._parts[part] for part, places in self._places.items() if not is_gone(places, levels))
        return self._rest + sum(there)

    def to_json(self) -> dict[str, Any]:
        parts = {f"block {block} {part}": taken for (block, part), taken in self._parts.items()}
        return {**_named(self), "rest": self._rest, "parts": parts}


class ShapeCost:
    """What the heads and MLPs of a shape cost; of times what the whole model takes, as the sum of its parts.

    Args:
        costs: of every block.
    """

    def __init__(self, costs: UnitCosts) -> None:
        self.name = costs.quantity
        self.unit = _SHAPE_UNITS[costs.quantity]
        self._costs = costs
        # What no shape changes is in no budget, but a speedup is that of the whole.
        self._rest = costs.rest if costs.quantity == "latency" else 0
        self.dense = self._rest + costs.dense

    def of(self, shape: Sequence[Sequence[int]]) -> int:
        return self._rest + self._costs.of([(groups, heads, neurons) for groups, heads, neurons in shape])

    def to_json(self) -> dict[str, Any]:
        return _named(self)


def _named(cost: Cost) -> dict[str, Any]:
    return {"cost": cost.name, "unit": cost.unit, "dense": cost.dense}


def parts_of(sites: Sequence[Site]) -> dict[Part, list[int]]:
    """Places of the matrices of every attention and MLP, in model order."""
    parts: dict[Part, list[int]] = {}
    for at, site in enumerate(sites):
        parts.setdefault((site.block, part_of(site)), []).append(at)
    return parts


def is_gone(places: Sequence[int], levels: Sequence[int]) -> bool:
    """Whether a part is dropped as a whole."""
    return all(levels[at] == GONE for at in places)


def kept_weights(site: Site, level: int) -> int:
    """Weights that a matrix keeps at a level."""
    return site.weights - site.out_features * removed_count(level / LEVELS, site.in_features)


def saved_percent(cost: int, dense: int) -> int:
    """Hundredths of the dense cost that are saved, rounded: in whole numbers, so that it is the same everywhere."""
    return (200 * (dense - cost) + dense) // (2 * dense)
