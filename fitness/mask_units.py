"""The unit table: what a mask keeps or removes as one, what that costs, and the shape that a mask stands for.

Costs add up. A unit of part of an attention or MLP costs what `UnitCosts` says that it adds; what goes only with the
whole part (output bias, norms of its own, and keys and values under query heads of their own) is no unit's cost but
part of `UnitTable.fixed`, which a budget counts whatever the mask. So the kept costs and what is fixed are never below
the exact cost, `kept_cost`, and equal it where some of every part and of every KV group stays. A unit that is a whole
part costs all of it, as `UnitCosts` has it. A norm that attention and MLP share is in `UnitCosts.rest`, even where both
go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from evoprune.fitness.maskers import ByMetrics, ByUnits, ByWeights, Masker, is_ranked, masker_from, neurons_in, parts_of
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.unit_costs import AttentionCost, Quantity, UnitCosts, unit_costs
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.files import content_hash
from evoprune.metrics.mask import check_pattern
from evoprune.metrics.packed import packed
from evoprune.metrics.shape import BlockShape, BlockWidths

Mask = NDArray[np.bool_]
"""[n] bool, True = keep."""


@dataclass(frozen=True, slots=True)
class UnitRow:
    """Consecutive units of one kind in one block, or of one matrix.

    Attributes:
        kind: of the units; for units of a matrix, the kind of the matrix.
        block: index of the block.
        name: module path of the part or matrix.
        of: members that the units hold together: KV groups, query heads, neurons; 1 for a whole part; metrics to
            choose from, or weights.
        size: members in a unit; where it does not divide `of` the last unit has fewer.
        cost: of a member.
        order: members as they are dealt to units, each once; empty if they are dealt as they come.
    """

    kind: str
    block: int
    name: str
    of: int
    size: int
    cost: int
    order: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, which `row_from` reads; without an order if there is none."""
        values = asdict(self)
        order = values.pop("order")
        return {**values, "order": list(order)} if order else values

    @property
    def count(self) -> int:
        """How many units there are."""
        return -(-self.of // self.size)

    def members(self, index: int) -> Sequence[int]:
        """The members that one of these units holds."""
        dealt = range(index * self.size, min((index + 1) * self.size, self.of))
        return self.order[dealt.start : dealt.stop] if self.order else dealt

    def by_member(self, values: NDArray[Any]) -> NDArray[Any]:
        """[of]: the value of the unit that each member is in, from [units]."""
        dealt = np.repeat(values, self.size)[: self.of]
        if not self.order:
            return dealt
        found = np.empty_like(dealt)
        found[list(self.order)] = dealt
        return found


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit.

    Attributes:
        row: what it is one of.
        index: its place there, from 0.
        members: what it holds of the members of `row`.
        cost: of all of these.
    """

    row: UnitRow
    index: int
    members: Sequence[int]
    cost: int


@dataclass(frozen=True)
class UnitTable:
    """All units of a model, in the order of masks: by block or matrix in model order, attention before MLP.

    Attributes:
        masker: what was asked for.
        quantity: what costs count; see `unit_costs`.
        rows: units by block and kind, or by matrix.
        dense: cost of the heads and MLPs of all blocks, what budgets are fractions of; for units of matrices, which
            cost nothing, the weights in these.
        rest: cost of all else in the model.
    """

    masker: Masker
    quantity: str
    rows: tuple[UnitRow, ...]
    dense: int
    rest: int

    def __post_init__(self) -> None:
        masker = self.masker
        for row in self.rows:
            if isinstance(masker, ByUnits):
                fits = row.kind in masker.kinds and row.size == max(min(neurons_in(row.kind), row.of), 1)
            elif isinstance(masker, ByMetrics):
                fits = (row.of, row.size) == (len(masker.metrics), 1)
            else:
                fits = row.size == 1 and row.of % masker.pattern[1] == 0
            if not fits:
                raise InvalidInput(f"{row.name[:80]} cannot have its units, {row.of} of {row.kind[:40]} by {row.size}")
        if not self.rows:
            raise InvalidInput("a unit table has no units")

    @cached_property
    def n(self) -> int:
        """How many units there are."""
        return sum(row.count for row in self.rows)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """[rows + 1]: the first unit of each row, and behind them `n`."""
        return np.concatenate(([0], np.cumsum([row.count for row in self.rows]))).astype(np.int64)

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """[n]: the row of each unit: its block and kind, or its matrix."""
        return np.repeat(np.arange(len(self.rows), dtype=np.int64), [row.count for row in self.rows])

    @cached_property
    def costs(self) -> NDArray[np.int64]:
        """[n]: what each unit costs."""
        found = np.repeat(np.array([row.cost * row.size for row in self.rows], dtype=np.int64), np.diff(self.starts))
        for row, end in zip(self.rows, self.starts[1:], strict=True):
            found[end - 1] = row.cost * len(row.members(row.count - 1))
        return found

    @cached_property
    def fixed(self) -> int:
        """What of `dense` is no unit's cost: it is counted whatever the mask."""
        return self.dense - int(self.costs.sum())

    @property
    def strata(self) -> tuple[NDArray[np.int64], int] | None:
        """([n] labels, how many units of each are kept) where a mask is a choice; None where a budget says how much."""
        if isinstance(self.masker, ByMetrics):
            return self.groups, 1
        if isinstance(self.masker, ByWeights):
            n, m = self.masker.pattern
            return np.arange(self.n, dtype=np.int64) // m, n
        return None

    @property
    def orders(self) -> Mapping[int, tuple[int, ...]]:
        """The order of neurons by block, where they are dealt to ranked units."""
        return {row.block: row.order for row in self.rows if row.order}

    @cached_property
    def hash(self) -> str:
        """Names the content: equal for the same units at the same costs, in the same order."""
        return content_hash(self.to_json())

    def units(self) -> Iterator[Unit]:
        """Every unit in turn."""
        for row in self.rows:
            for index in range(row.count):
                members = row.members(index)
                yield Unit(row, index, members, row.cost * len(members))

    def of_row(self, index: int) -> slice:
        """The units of a row."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def check(self, mask: Mask) -> None:
        """Refuse what is no mask of these units.

        Raises:
            InvalidInput: another number of units, or a choice that keeps another number of a stratum than it must.
        """
        if mask.shape != (self.n,) or mask.dtype != np.bool_:
            raise InvalidInput(f"a mask of {mask.dtype} {list(mask.shape)} for {self.n} units: give [{self.n}] bool")
        if self.strata is not None:
            labels, keep = self.strata
            kept = np.bincount(labels[mask], minlength=int(labels[-1]) + 1)
            if wrong := np.flatnonzero(kept != keep).tolist():
                row = self.rows[int(self.groups[int(np.flatnonzero(labels == wrong[0])[0])])]
                raise InvalidInput(
                    f"a mask keeps {kept[wrong[0]]} units of choice {wrong[0]}, in {row.name}, where {keep} are kept"
                )

    def packed(self, mask: Mask) -> str:
        """A mask as hex of its packed bits, the first unit in the highest bit; `unpacked` reads it."""
        self.check(mask)
        return packed(mask)

    def unpacked(self, text: Any) -> Mask:
        """The mask that `packed` wrote.

        Raises:
            InvalidInput: it is no hex of so many bits, or no mask of these units.
        """
        try:
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
        except (TypeError, ValueError):
            raise InvalidInput(f"a mask is {str(text)[:40]!r}: give hex of {self.n} packed bits") from None
        if len(bits) != -(-self.n // 8) * 8 or bits[self.n :].any():
            raise InvalidInput(f"a mask has {len(bits)} packed bits: give hex of {self.n}, zeros behind them")
        mask = bits[: self.n].astype(np.bool_)
        self.check(mask)
        return mask

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, that `from_json` reads."""
        return {
            "masker": self.masker.to_json(),
            "quantity": self.quantity,
            "dense": self.dense,
            "rest": self.rest,
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def from_json(cls, values: Any) -> UnitTable:
        """The inverse of `to_json`.

        Raises:
            InvalidInput: this is no unit table; says which field is wrong.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            raise InvalidInput(f"a unit table has {', '.join(map(repr, names))} alone")
        return cls.from_parts(values)

    @classmethod
    def from_parts(cls, values: Mapping[str, Any]) -> UnitTable:
        """`from_json`, from a document that may hold more.

        Raises:
            InvalidInput: see `from_json`.
        """
        masker = masker_from(values["masker"])
        if not isinstance(values["quantity"], str):
            raise InvalidInput(f"'quantity' of a unit table is {str(values['quantity'])[:40]!r}: give text")
        for name in ("dense", "rest"):
            _check_count(values[name], f"{name!r} of a unit table", 0)
        if not isinstance(values["rows"], list) or not values["rows"]:
            raise InvalidInput("'rows' of a unit table must be a list of at least one")
        rows = tuple(row_from(row, index) for index, row in enumerate(values["rows"]))
        return cls(masker, values["quantity"], rows, values["dense"], values["rest"])


def row_from(values: Any, index: int) -> UnitRow:
    """A row of a unit table from JSON values.

    Args:
        index: its place, for messages.

    Raises:
        InvalidInput: it is none.
    """
    names = [field.name for field in fields(UnitRow) if field.name != "order"]
    if not isinstance(values, Mapping) or set(values) - {"order"} != set(names):
        raise InvalidInput(f"entry {index + 1} of the units does not have {', '.join(map(repr, names))}")
    for name in ("kind", "name"):
        if not isinstance(values[name], str):
            raise InvalidInput(f"{name!r} of entry {index + 1} of the units is no text")
    for name, least in (("block", 0), ("of", 1), ("size", 1), ("cost", 0)):
        _check_count(values[name], f"{name!r} of entry {index + 1} of the units", least)
    order = values.get("order", [])
    if order and (not isinstance(order, list) or sorted(order) != list(range(values["of"]))):
        raise InvalidInput(f"'order' of entry {index + 1} of the units does not name each of its members once")
    return UnitRow(**{**values, "order": tuple(order)})


def unit_table(
    language_model: LanguageModel,
    masker: Masker,
    quantity: str = "parameters",
    orders: Mapping[int, Sequence[int]] | None = None,
) -> UnitTable:
    """The units of a dense model.

    Args:
        language_model: its weights are not read.
        masker: says what a unit is.
        quantity: what costs count; units of matrices have none.
        orders: of the neurons by block, as they are dealt to ranked units; see `neuron_orders`.

    Raises:
        InvalidInput: the model cannot be cut; KV groups are asked for where every block has one; M does not divide the
            width of a matrix.
        UnknownName: no such quantity.
    """
    if isinstance(masker, ByUnits):
        if quantity not in get_args(Quantity):
            raise UnknownName("quantity of unit costs", quantity, get_args(Quantity))
        costs: UnitCosts = unit_costs(language_model, quantity)  # type: ignore[arg-type]
        return _table_of_units(masker, find_units(language_model), costs, orders or {})
    sites = [bound.site for bound in language_model.sites]
    for site in sites:
        check_pattern(masker.pattern, site.in_features, site.name)
    metrics = len(masker.metrics) if isinstance(masker, ByMetrics) else None
    rows = [UnitRow(site.kind, site.block, site.name, metrics or site.weights, 1, 0) for site in sites]
    dense = sum(site.weights for site in sites)
    whole = sum(parameter.numel() for parameter in language_model.model.parameters())
    return UnitTable(masker, quantity, tuple(rows), dense, whole - dense)


def kept_units(table: UnitTable, mask: Mask, widths: Sequence[BlockWidths]) -> tuple[BlockShape, ...]:
    """What a mask keeps of every block; the number of query heads may differ between KV groups.

    A KV group stays as long as one of its query heads does. A part that no unit is of stays whole.

    Args:
        table: of units of a model.
        mask: of its units.
        widths: what the blocks of that model have.
    """
    table.check(mask)
    found = [width.whole for width in widths]
    for index, row in enumerate(table.rows):
        kept = row.by_member(mask[table.of_row(index)])
        block, width = found[row.block], widths[row.block]
        for part in parts_of(row.kind):
            if part == "mlp":
                neurons = np.flatnonzero(np.broadcast_to(kept, (width.neurons,)))
                block = BlockShape(block.groups, block.heads, tuple(neurons.tolist()))
            else:
                heads = np.flatnonzero(np.repeat(kept, width.heads // row.of))
                groups = np.unique(heads // width.heads_per_group)
                block = BlockShape(tuple(groups.tolist()), tuple(heads.tolist()), block.neurons)
        found[row.block] = block
    return tuple(found)


def shape_of(table: UnitTable, mask: Mask, widths: Sequence[BlockWidths]) -> tuple[BlockShape, ...] | None:
    """What a mask keeps of every block, as a shape that a model can be cut to; arguments as of `kept_units`.

    Returns:
        A shape for each block; None where the kept KV groups of a block keep different numbers of query heads.
    """
    found = kept_units(table, mask, widths)
    for index, (block, width) in enumerate(zip(found, widths, strict=True)):
        try:
            block.check(index, width)
        except InvalidInput:
            return None
    return found


def kept_cost(table: UnitTable, mask: Mask, costs: UnitCosts) -> int:
    """What the heads and MLPs that a mask keeps cost exactly: what goes with a whole part or KV group is counted.

    Args:
        table: of units of a model.
        mask: of its units.
        costs: of the same model, linear, as `unit_costs` gives them.
    """
    total = 0
    for block, attention, mlp in zip(kept_units(table, mask, costs.widths), costs.attention, costs.mlp, strict=True):
        total += mlp.at(len(block.neurons))
        if block.groups:
            assert isinstance(attention, AttentionCost)
            total += attention.fixed + len(block.groups) * attention.per_group + len(block.heads) * attention.per_head
    return total


def unit_columns(table: UnitTable, units: Sequence[BlockUnits]) -> dict[str, NDArray[np.int64]]:
    """The unit that each column of an output matrix belongs to.

    Args:
        table: of units of a model.
        units: of that model.

    Returns:
        [in] by name of the matrix, in model order; matrices that no unit is of are left out.
    """
    found: dict[str, NDArray[np.int64]] = {}
    for index, row in enumerate(table.rows):
        block, start = units[row.block], int(table.starts[index])
        of_members = row.by_member(start + np.arange(row.count, dtype=np.int64))
        for part in parts_of(row.kind):
            output = block.attention.output if part == "attention" else block.mlp.output
            found[output.site.name] = np.repeat(of_members, output.site.in_features // row.of)
    return found


def _table_of_units(
    masker: ByUnits, units: Sequence[BlockUnits], costs: UnitCosts, orders: Mapping[int, Sequence[int]]
) -> UnitTable:
    if "kv-group" in masker.kinds and all(block.widths.groups == 1 for block in units):
        raise InvalidInput(
            "every block of this model has one KV group, so that is the whole attention: give query-head, or attention"
        )
    rows = []
    ordered = sorted(masker.kinds, key=lambda kind: parts_of(kind)[0])
    for block in units:
        for kind in ordered:
            row = _row(kind, block, costs)
            if is_ranked(kind):
                order = tuple(orders.get(block.block, ()))
                if sorted(order) != list(range(row.of)):
                    raise InvalidInput(f"no order of the {row.of} neurons of {row.name} for units {kind!r}")
                row = replace(row, order=order)
            rows.append(row)
    return UnitTable(masker, costs.quantity, tuple(rows), costs.dense, costs.rest)


def _row(kind: str, block: BlockUnits, costs: UnitCosts) -> UnitRow:
    """The units of one kind in one block."""
    widths, attention, mlp = block.widths, costs.attention[block.block], costs.mlp[block.block]
    groups, each, index = widths.groups, widths.heads_per_group, block.block
    if size := neurons_in(kind):
        return UnitRow(kind, index, block.mlp.name, widths.neurons, min(size, widths.neurons), mlp.at(2) - mlp.at(1))
    if kind in ("kv-group", "query-head"):
        assert isinstance(attention, AttentionCost)
        group = attention.per_group + each * attention.per_head
        if kind == "kv-group":
            return UnitRow(kind, index, block.attention.name, groups, 1, group)
        # Keys and values go with the last query head of their group: with none in particular, if it has several.
        return UnitRow(kind, index, block.attention.name, widths.heads, 1, attention.per_head if each > 1 else group)
    whole = {"attention": attention.at(groups, each), "mlp": mlp.at(widths.neurons)}
    name = block.name if kind == "block" else getattr(block, kind).name
    return UnitRow(kind, index, name, 1, 1, sum(whole[part] for part in parts_of(kind)))


def _check_count(value: Any, what: str, least: int) -> None:
    if type(value) is not int or not least <= value < 1 << 62:
        raise InvalidInput(f"{what} is {str(value)[:40]}: give a whole number from {least}")
