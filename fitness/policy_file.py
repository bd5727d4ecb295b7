"""What a policy search leaves: which units stay and how surely, as a file, and done to a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.card import public_name
from evoprune.fitness.compressors import Goal
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.mask_units import Mask, UnitRow, UnitTable, kept_units, row_from, shape_of, unit_table
from evoprune.fitness.maskers import ByMetrics, ByUnits, ByWeights, criterion_named
from evoprune.fitness.matrix_masks import metric_mask
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import PrunedLayer, reach
from evoprune.fitness.statistics import Statistics
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import canonical_json, strict_json, user_path, user_text, write_atomically
from evoprune.metrics.packed import packed
from evoprune.metrics.shape import BlockShape, Shape
from evoprune.metrics.shape_file import from_ranges, to_ranges
from evoprune.metrics.terminals import STATISTICS

FORMAT = "evoprune-policy/1"
DIGITS = 6
"""Of keep probabilities."""

_TABLE = ("masker", "quantity", "dense", "rest")
_KEYS = ("format", "model", "fingerprint", *_TABLE, "hash", "calibration", "target", "origin", "units")
_ROW = tuple(field.name for field in fields(UnitRow) if field.name != "order")
# What is read is written out in memory, so nobody's typing error may ask for billions.
_MOST_UNITS = 1 << 22


@dataclass(frozen=True)
class Calibration:
    """What the masks of metrics are made from, so that they come out again.

    Attributes:
        text: source of text A; `sequences` windows of `window` tokens of it, drawn by `seed`.
        threads: of torch, on a CPU.
    """

    text: str
    sequences: int
    window: int
    seed: int
    threads: int

    @classmethod
    def of(cls, context: EvaluationContext) -> Calibration:
        """That of a search."""
        window, seed = context.calibration_window, context.seed
        return cls(context.calibration, context.calibration_sequences, window, seed, context.threads)


@dataclass(frozen=True, eq=False)
class LearnedPolicy:
    """Which units of a model stay, as a policy search found it.

    Attributes:
        model: class name of the dense model.
        fingerprint: of its config and weights.
        table: its units.
        mask: [n] bool, True = keep.
        probabilities: [n] in [0, 1], that of each unit to be kept, to `DIGITS` digits; None if nobody says.
        calibration: where masks come from metrics, what they are made from.
        target: what was asked for, in JSON values.
        origin: the search that found it, in JSON values.

    Raises:
        InvalidInput: mask or probabilities are not those of the units, or masks by metrics that read statistics have no
            calibration.
    """

    model: str
    fingerprint: str
    table: UnitTable
    mask: Mask
    probabilities: NDArray[np.float64] | None
    calibration: Calibration | None
    target: Mapping[str, Any]
    origin: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.table.check(self.mask)
        if (given := self.probabilities) is not None:
            if given.shape != (self.table.n,) or not bool(((given >= 0) & (given <= 1)).all()):
                raise InvalidInput(f"keep probabilities are not one in [0, 1] for each of {self.table.n} units")
            object.__setattr__(self, "probabilities", given.round(DIGITS))
        if self.needs and self.calibration is None:
            raise InvalidInput(f"the masks read {', '.join(sorted(self.needs))}: 'calibration' must say from what text")

    @property
    def choices(self) -> dict[str, str]:
        """The metric that masks each matrix, by name; nothing where units are not metrics."""
        masker = self.table.masker
        if not isinstance(masker, ByMetrics):
            return {}
        chosen = self.mask.reshape(len(self.table.rows), -1).argmax(1)
        return {row.name: masker.metrics[metric] for row, metric in zip(self.table.rows, chosen, strict=True)}

    @property
    def needs(self) -> frozenset[str]:
        """Statistics without which the masks cannot be made."""
        return frozenset().union(*(criterion_named(name).needs for name in set(self.choices.values()))) & STATISTICS

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M) of the masks of all matrices; None where units go as a whole."""
        return None if isinstance(self.table.masker, ByUnits) else self.table.masker.pattern

    def check(self, language_model: LanguageModel) -> None:
        """Refuse a model that this policy is not of.

        Raises:
            InvalidInput: names what differs first.
        """
        name = type(language_model.model).__name__
        if name != self.model:
            raise InvalidInput(f"the policy is of another model, {self.model[:80]} and not this {name}")
        # Which neurons are ranked next to each other the file says: nothing is ranked again.
        ranked = find_units(language_model) if self.table.orders else []
        orders = {block.block: range(block.widths.neurons) for block in ranked}
        here = unit_table(language_model, self.table.masker, self.table.quantity, orders).rows
        if len(here) != len(self.table.rows):
            raise InvalidInput(
                f"the policy is of another model: it has {len(self.table.rows)} kinds of units in blocks or matrices, "
                f"this one {len(here)}"
            )
        for found, row in zip(here, self.table.rows, strict=True):
            # What units cost may depend on the dtype that the model was loaded in.
            if (found.name, found.block, found.kind, found.of) != (row.name, row.block, row.kind, row.of):
                raise InvalidInput(
                    f"the policy is of another model: {row.name[:80]} has {row.of} members in units of {row.kind[:40]} "
                    f"there, {found.name} has {found.of} of {found.kind} here"
                )

    def summary(self) -> dict[str, Any]:
        """What reports and the card of a checkpoint say of it: all but the single units, and no place of a text."""
        text = self.calibration
        return {
            "masker": self.table.masker.to_json(),
            "hash": self.table.hash,
            "units": self.table.n,
            "kept": int(self.mask.sum()),
            "calibration": None if text is None else asdict(text) | {"text": public_name(text.text)},
            "target": dict(self.target),
            "origin": dict(self.origin),
        }


def policy_shape(policy: LearnedPolicy, units: Sequence[BlockUnits]) -> Shape | None:
    """What a policy keeps, as a shape; None where none says it, or matrices are masked.

    Args:
        policy: of this model; see `LearnedPolicy.check`.
        units: of all its blocks.
    """
    widths = tuple(block.widths for block in units)
    blocks = shape_of(policy.table, policy.mask, widths) if isinstance(policy.table.masker, ByUnits) else None
    if blocks is None:
        return None
    return Shape(policy.model, policy.fingerprint, blocks, widths, {"method": "none"}, policy.target)


@torch.no_grad()
def apply_policy(
    language_model: LanguageModel, policy: LearnedPolicy, statistics: Statistics | None = None
) -> tuple[PrunedLayer, ...]:
    """Write zeros in place of what a policy removes, in place; every matrix is as large as it was.

    Of a unit the rows go, with their biases, and the columns of the output matrix; of a part of which nothing stays
    also the output bias. Weights that stay are as they were.

    Args:
        language_model: dense.
        policy: of this model.
        statistics: at least what the policy `needs`; None if that is nothing.

    Returns:
        One entry per matrix, in model order.

    Raises:
        InvalidInput: the policy is of another model, or a metric cannot score a matrix.
    """
    policy.check(language_model)
    if not isinstance(policy.table.masker, ByUnits):
        return reach(language_model, _goals(language_model, policy, statistics), statistics=statistics)
    units = find_units(language_model)
    removed: dict[str, int] = {}
    for block, kept in zip(units, kept_units(policy.table, policy.mask, [b.widths for b in units]), strict=True):
        for bound, rows, columns in _slices(block, kept):
            removed[bound.site.name] = _zero_outside(bound, rows, columns)
    sites = [bound.site for bound in language_model.sites]
    return tuple(
        PrunedLayer(site.name, (site.out_features, site.in_features), removed.get(site.name, 0), None) for site in sites
    )


def to_json(policy: LearnedPolicy) -> dict[str, Any]:
    """The document that `from_json` reads."""
    table, bits = policy.table, isinstance(policy.table.masker, ByWeights)
    units = []
    for index, row in enumerate(table.rows):
        part = table.of_row(index)
        kept = policy.mask[part]
        said = packed(kept) if bits else to_ranges(np.flatnonzero(kept).tolist())
        surely = {} if policy.probabilities is None else {"keep": policy.probabilities[part].tolist()}
        units.append({**row.to_json(), "kept": said, **surely})
    return {
        "format": FORMAT,
        "model": policy.model,
        "fingerprint": policy.fingerprint,
        **{key: value for key, value in table.to_json().items() if key in _TABLE},
        "hash": table.hash,
        "calibration": None if policy.calibration is None else asdict(policy.calibration),
        "target": dict(policy.target),
        "origin": dict(policy.origin),
        "units": units,
    }


def from_json(document: Any) -> LearnedPolicy:
    """The policy that a document describes.

    Raises:
        InvalidInput: it is no such document; says which field is wrong.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        shown = str(document.get("format"))[:40] if isinstance(document, dict) else type(document).__name__
        raise InvalidInput(f"format {shown!r} is not known; this version reads {FORMAT!r}")
    if missing := [key for key in _KEYS if key not in document]:
        raise InvalidInput(f"it has no {missing[0]!r}")
    if surplus := [key for key in document if key not in _KEYS]:
        raise InvalidInput(f"it has {surplus[0][:40]!r}, which no policy has")
    for key in ("target", "origin"):
        if not isinstance(document[key], dict):
            raise InvalidInput(f"{key!r} must be an object")
    for key in ("model", "fingerprint", "hash"):
        if not isinstance(document[key], str):
            raise InvalidInput(f"{key!r} must be text")
    rows = document["units"]
    if not isinstance(rows, list) or not rows:
        raise InvalidInput("'units' must be a list of at least one kind of units in a block, or one matrix")
    plain = [_row(row, index) for index, row in enumerate(rows)]
    table = UnitTable.from_parts({**document, "rows": plain})
    if table.hash != document["hash"]:
        raise InvalidInput(f"'hash' is not that of the units, {table.hash[:12]}: the file was changed")
    bits = isinstance(table.masker, ByWeights)
    masks = [_kept(row["kept"], at, bits) for row, at in zip(rows, table.rows, strict=True)]
    probabilities = None
    if any("keep" in row for row in rows):
        probabilities = np.concatenate([_keep(row.get("keep"), at) for row, at in zip(rows, table.rows, strict=True)])
    return LearnedPolicy(
        document["model"],
        document["fingerprint"],
        table,
        np.concatenate(masks),
        probabilities,
        _calibration(document["calibration"]),
        document["target"],
        document["origin"],
    )


def to_text(policy: LearnedPolicy) -> str:
    """JSON with one line for each kind of units in a block, or each matrix."""
    document = to_json(policy)
    canonical_json(document)  # a NaN is refused here, and not by whoever reads it
    head = json.dumps({key: value for key, value in document.items() if key != "units"}, indent=2, ensure_ascii=False)
    rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in document["units"])
    return f'{head[:-2]},\n  "units": [\n{rows}\n  ]\n}}\n'


def write_policy(policy: LearnedPolicy, path: str | Path) -> Path:
    """Write a policy to a file, whole or not at all, and return its path.

    Raises:
        InvalidInput: the file cannot be written.
    """
    place = user_path(path)
    text = to_text(policy)
    try:
        write_atomically(place, text)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from None
    return place


def read_policy(path: str | Path) -> LearnedPolicy:
    """The policy in a file that `write_policy` wrote.

    Raises:
        InvalidInput: no such file, or no policy.
    """
    text = user_text(path, "policy", "a policy's .json", "a policy's .json, or a run that searched a policy")
    name = Path(path).name[:80]
    try:
        return from_json(strict_json(text))
    except InvalidInput as error:
        raise InvalidInput(f"{name!r}: {error}") from None
    except (ValueError, RecursionError, MemoryError):
        raise InvalidInput(f"{name!r} is not a JSON document of a policy") from None


def _goals(
    language_model: LanguageModel, policy: LearnedPolicy, statistics: Statistics | None
) -> Iterator[tuple[SiteModule, Goal]]:
    """What goes from every matrix."""
    pattern, choices = policy.pattern, policy.choices
    assert pattern is not None
    for index, bound in enumerate(language_model.sites):
        if choices:
            keep = metric_mask(bound, choices[bound.site.name], pattern, statistics)
        else:
            chosen = torch.from_numpy(policy.mask[policy.table.of_row(index)].copy())
            keep = chosen.view(bound.site.out_features, bound.site.in_features)
        yield bound, Goal.of_mask(keep.to(bound.weight().device), pattern)


def _slices(block: BlockUnits, kept: BlockShape) -> Iterator[tuple[SiteModule, Sequence[int], Sequence[int]]]:
    """Each matrix of a block, and the rows and columns of it that stay."""
    attention, mlp = block.attention, block.mlp
    heads = attention.rows(kept.groups, kept.heads)
    for part, rows, columns in (
        (attention, heads, attention.columns(kept.heads)),
        (mlp, mlp.rows(kept.neurons), kept.neurons),
    ):
        for bound, some in zip(part.inputs, rows, strict=True):
            yield bound, some, range(bound.site.in_features)
        # Without a column nothing is written, not even a bias.
        yield part.output, range(part.output.site.out_features if len(columns) else 0), columns


def _zero_outside(bound: SiteModule, rows: Sequence[int], columns: Sequence[int]) -> int:
    """Zero what is in none of these rows or none of these columns; how many weights that are."""
    weight, bias = bound.weight(), bound.bias()
    for size, kept, dim in ((weight.shape[0], rows, 0), (weight.shape[1], columns, 1)):
        gone = torch.ones(size, dtype=torch.bool)
        gone[torch.tensor(kept, dtype=torch.int64)] = False
        where = gone.nonzero().flatten().to(weight.device)
        weight.index_fill_(dim, where, 0)
        if bias is not None and dim == 0:
            bias.index_fill_(0, where, 0)
    return bound.site.weights - len(rows) * len(columns)


def _row(row: Any, index: int) -> Any:
    """What a row says of its units, checked for its size; what it says of masks is read later.

    Raises:
        InvalidInput: it says something else than it must.
    """
    if not isinstance(row, dict) or not {*_ROW, "kept"} <= set(row) <= {*_ROW, "kept", "keep", "order"}:
        names = ", ".join(map(repr, (*_ROW, "kept")))
        raise InvalidInput(f"entry {index + 1} of 'units' must have {names} and may have 'keep' and 'order'")
    plain = {name: row[name] for name in (*_ROW, "order") if name in row}
    units = row_from(plain, index).count
    text = row["kept"]
    if not isinstance(text, str) or (units > _MOST_UNITS and len(text) != -(-units // 8) * 2):
        raise InvalidInput(f"entry {index + 1} of 'units' has no 'kept' of {units} units")
    return plain


def _kept(text: str, row: UnitRow, bits: bool) -> Mask:
    if not bits:
        mask = np.zeros(row.count, dtype=np.bool_)
        mask[list(from_ranges(text, row.count, f"'kept' of {row.name[:80]}"))] = True
        return mask
    try:
        found = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
    except ValueError:
        raise InvalidInput(f"'kept' of {row.name[:80]} is no hex") from None
    if len(found) != -(-row.count // 8) * 8:
        raise InvalidInput(f"'kept' of {row.name[:80]} has {len(found)} bits for {row.count} weights")
    return found[: row.count].astype(np.bool_)


def _keep(values: Any, row: UnitRow) -> NDArray[np.float64]:
    known = isinstance(values, list) and len(values) == row.count
    if not known or not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
        raise InvalidInput(f"'keep' of {row.name[:80]} must be {row.count} probabilities in [0, 1]")
    return np.array(values, dtype=np.float64)


def _calibration(values: Any) -> Calibration | None:
    if values is None:
        return None
    names = [field.name for field in fields(Calibration)]
    if not isinstance(values, dict) or set(values) != set(names) or not isinstance(values["text"], str):
        raise InvalidInput(f"'calibration' must be null, or have {', '.join(map(repr, names))}")
    for name, most in (("sequences", 1 << 31), ("window", 1 << 31), ("seed", 1 << 62), ("threads", 1 << 10)):
        least = int(name != "seed")
        if type(values[name]) is not int or not least <= values[name] <= most:
            said = str(values[name])[:40]
            raise InvalidInput(f"{name!r} of 'calibration' is {said}: give a whole number from {least}")
    return Calibration(**values)
