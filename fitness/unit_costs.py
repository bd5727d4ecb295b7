"""Costs of what stays of every block: whole numbers, so that whoever plans shapes needs no model and makes no error.

Source: layerwise sparsity allocation, section 5.1 (parameters of units) and 5.8 (tables of times).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import nn

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.units import AttentionUnits, MlpUnits, find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape, BlockWidths

Quantity = Literal["parameters", "flops", "kv_bytes"]
"""What follows from shapes alone; times come from a table."""

Kept = tuple[int, int, int]
"""What a block keeps: KV groups, query heads in each of them, neurons. No groups: no attention; no neurons: no MLP."""


class PartCosts(Protocol):
    """Costs of one part of a block; of an attention by KV groups and heads in each, of an MLP by neurons."""

    def at(self, *kept: int) -> int:
        """The cost if so much stays; 0 if nothing does."""

    def to_json(self) -> dict[str, Any]:
        """What `UnitCosts.from_json` reads."""


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """Cost of an attention: fixed + groups * (per_group + heads in each * per_head).

    Attributes:
        fixed: of what goes only with the whole: the output's bias, norms.
        per_group: of a key and a value head.
        per_head: of a query head, its columns of the output included.
    """

    fixed: int
    per_group: int
    per_head: int

    def at(self, *kept: int) -> int:
        groups, heads = kept
        return self.fixed + groups * (self.per_group + heads * self.per_head) if groups and heads else 0

    def to_json(self) -> dict[str, Any]:
        return {"fixed": self.fixed, "per_group": self.per_group, "per_head": self.per_head}


@dataclass(frozen=True, slots=True)
class MlpCost:
    """Cost of an MLP: fixed + neurons * per_neuron.

    Attributes:
        fixed: of what goes only with the whole: the output's bias, norms.
        per_neuron: of a neuron.
    """

    fixed: int
    per_neuron: int

    def at(self, *kept: int) -> int:
        (neurons,) = kept
        return self.fixed + neurons * self.per_neuron if neurons else 0

    def to_json(self) -> dict[str, Any]:
        return {"fixed": self.fixed, "per_neuron": self.per_neuron}


@dataclass(frozen=True, slots=True)
class CostTable:
    """Costs of a part that were measured, such as nanoseconds.

    Attributes:
        entries: (what is kept, cost), ascending; (KV groups, heads in each) of an attention, (neurons,) of an MLP.
    """

    entries: tuple[tuple[tuple[int, ...], int], ...]

    def at(self, *kept: int) -> int:
        """The cost if so much stays; between two numbers of neurons on the straight line, rounded down.

        Fewer neurons than the fewest that were measured cost as much as these.

        Raises:
            InvalidInput: this was not measured, nor anything around it.
        """
        if 0 in kept:
            return 0
        keys = [key for key, _ in self.entries]
        place = bisect_left(keys, kept)
        if place < len(keys) and keys[place] == kept:
            return self.entries[place][1]
        if len(kept) == 1 and place == 0:
            return self.entries[0][1]
        if len(kept) > 1 or place == len(keys):
            raise InvalidInput(f"the table has no cost of a part that keeps {' x '.join(map(str, kept))}: measure it")
        ((low,), below), ((high,), above) = self.entries[place - 1 : place + 1]
        return below + (above - below) * (kept[0] - low) // (high - low)

    def to_json(self) -> dict[str, Any]:
        return {"table": [[*key, cost] for key, cost in self.entries]}


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """What every part of every block costs, and the rest of the model.

    Attributes:
        quantity: what is counted: ``parameters``, ``flops``, ``kv_bytes`` or ``latency``, in nanoseconds.
        rest: the cost of all that no shape changes.
        widths: of the dense blocks, in model order.
        attention, mlp: one entry for each block.
    """

    quantity: str
    rest: int
    widths: tuple[BlockWidths, ...]
    attention: tuple[PartCosts, ...]
    mlp: tuple[PartCosts, ...]

    @property
    def dense(self) -> int:
        """Cost of the heads and MLPs of all dense blocks: what budgets are fractions of."""
        return self.of([(width.groups, width.heads_per_group, width.neurons) for width in self.widths])

    def of(self, kept: Sequence[Kept]) -> int:
        """Cost of the heads and MLPs that stay, one entry for each block; the rest of the model apart."""
        return sum(
            attention.at(groups, heads) + mlp.at(neurons)
            for attention, mlp, (groups, heads, neurons) in zip(self.attention, self.mlp, kept, strict=True)
        )

    def fraction_at(self, speedup: float) -> float:
        """The fraction of `dense` that has to go for the whole to cost `speedup` times less.

        Raises:
            InvalidInput: it is not above 1, or what no shape changes costs more than that.
        """
        whole = self.rest + self.dense
        most = whole / self.rest if self.rest else math.inf
        if not 1 < speedup < most:
            raise InvalidInput(f"a speedup of {speedup:g} cannot be: give more than 1 and less than {most:.4g}")
        return (whole - whole / speedup) / self.dense

    def speedup_at(self, fraction: float) -> float:
        """How many times less the whole costs without this fraction of `dense`; the inverse of `fraction_at`."""
        whole = self.rest + self.dense
        left = whole - fraction * self.dense
        return whole / left if left else math.inf

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, that `from_json` reads."""
        return {
            "quantity": self.quantity,
            "rest": self.rest,
            "blocks": [
                {
                    "widths": [width.groups, width.heads, width.neurons],
                    "attention": attention.to_json(),
                    "mlp": mlp.to_json(),
                }
                for width, attention, mlp in zip(self.widths, self.attention, self.mlp, strict=True)
            ],
        }

    @classmethod
    def from_json(cls, values: Any) -> UnitCosts:
        """The inverse of `to_json`.

        Raises:
            InvalidInput: these are no costs.
        """
        try:
            blocks = values["blocks"]
            return cls(
                str(values["quantity"]),
                int(values["rest"]),
                tuple(BlockWidths(*map(int, block["widths"])) for block in blocks),
                tuple(_part(block["attention"], AttentionCost) for block in blocks),
                tuple(_part(block["mlp"], MlpCost) for block in blocks),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"these are no costs of units ({type(error).__name__}: {error})") from None


def kept_by(shape: BlockShape) -> Kept:
    """How much a shape keeps."""
    return len(shape.groups), shape.heads_per_group, len(shape.neurons)


def unit_costs(
    language_model: LanguageModel, quantity: Quantity = "parameters", *, batch: int = 1, sequence: int = 2048
) -> UnitCosts:
    """Costs of the parts of a dense model.

    Args:
        language_model: of a family that can be cut; its weights are not read, so they may be on the meta device.
        quantity: ``parameters``: all of them, norms and biases included; the rest is that of the whole model, so that
            both together are the sum over its parameters. ``flops``: floating-point operations of a forward pass, two
            for each multiply-add of a matrix of a block, of queries with all keys and of weights with all values
            (masked ones too, as a dense kernel computes them), and of the output head, which is the rest.
            ``kv_bytes``: bytes of keys and values in a cache for each token, in the dtype of the stored weights.
        batch, sequence: sequences and their tokens; of ``flops`` only.

    Raises:
        InvalidInput: the family cannot be cut, or batch or sequence is less than 1.
    """
    if batch < 1 or sequence < 1:
        raise InvalidInput(f"costs of {batch} sequences of {sequence} tokens: give at least 1 of each")
    units = find_units(language_model)
    model = language_model.model
    if quantity == "parameters":
        attentions = [_attention_parameters(model, block.attention) for block in units]
        mlps = [_mlp_parameters(model, block.mlp, block.name) for block in units]
    elif quantity == "flops":
        attentions = [_attention_flops(block.attention, batch, sequence) for block in units]
        mlps = [MlpCost(0, 2 * batch * sequence * _neuron_weights(block.mlp)) for block in units]
    else:
        itemsize = (language_model.stored_dtype or model.dtype).itemsize
        attentions = [AttentionCost(0, 2 * block.attention.head_dim * itemsize, 0) for block in units]
        mlps = [MlpCost(0, 0) for _ in units]
    blocks = UnitCosts(quantity, 0, tuple(block.widths for block in units), tuple(attentions), tuple(mlps))
    rest = 0
    if quantity == "parameters":
        rest = sum(parameter.numel() for parameter in model.parameters()) - blocks.dense
    elif quantity == "flops":
        rest = 2 * batch * sequence * model.get_output_embeddings().get_parameter("weight").numel()
    return UnitCosts(quantity, rest, blocks.widths, blocks.attention, blocks.mlp)


def _attention_parameters(model: nn.Module, units: AttentionUnits) -> AttentionCost:
    dense = units.parameters(units.groups, units.heads // units.groups)
    hidden, out = units.inputs[0].site.in_features, units.output.site.out_features
    has_bias = [bound.bias() is not None for bound in units.inputs]
    query, key, value = has_bias * 3 if units.fused else has_bias
    per_head = units.head_dim * (hidden + query + out)
    per_group = units.head_dim * (2 * hidden + key + value)
    counted = {bound.module for bound in (*units.inputs, units.output)} | set(map(model.get_submodule, units.norms))
    fixed = dense - units.groups * per_group - units.heads * per_head
    fixed += _parameters(model, units.norms) + _beside(model.get_submodule(units.name), counted)
    return AttentionCost(fixed, per_group, per_head)


def _mlp_parameters(model: nn.Module, units: MlpUnits, block: str) -> MlpCost:
    per_neuron = units.parameters(2) - units.parameters(1)
    matrices = {bound.module for bound in (*units.inputs, units.output)}
    fixed = units.parameters(1) - per_neuron + _parameters(model, units.norms)
    if units.name != block:
        fixed += _beside(model.get_submodule(units.name), matrices)
    return MlpCost(fixed, per_neuron)


def _attention_flops(units: AttentionUnits, batch: int, sequence: int) -> AttentionCost:
    tokens, hidden = batch * sequence, units.inputs[0].site.in_features
    per_head = tokens * units.head_dim * (hidden + units.output.site.out_features + 2 * sequence)
    return AttentionCost(0, 2 * tokens * units.head_dim * 2 * hidden, 2 * per_head)


def _neuron_weights(units: MlpUnits) -> int:
    rows = sum(bound.site.weights for bound in units.inputs) // units.neurons
    return rows + units.output.site.out_features


def _parameters(model: nn.Module, names: Sequence[str]) -> int:
    return sum(parameter.numel() for name in names for parameter in model.get_submodule(name).parameters())


def _beside(module: nn.Module, counted: set[nn.Module]) -> int:
    """Parameters inside a module that are not those of what was counted already."""
    inner = (part for part in module.modules() if part not in counted)
    return sum(parameter.numel() for part in inner for parameter in part.parameters(recurse=False))


def _part(values: Any, linear: type[AttentionCost] | type[MlpCost]) -> PartCosts:
    if "table" in values:
        entries = sorted((tuple(map(int, key)), int(cost)) for *key, cost in values["table"])
        return CostTable(tuple(entries))
    return linear(**{name: int(value) for name, value in values.items()})
