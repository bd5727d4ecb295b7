"""Shapes as files: JSON that a person can read, with a line for each block and what stays as ranges."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import canonical_json, strict_json, user_path, user_text, write_atomically
from evoprune.metrics.shape import BlockShape, BlockWidths, Shape

FORMAT = "evoprune-shape/1"
UNITS = ("groups", "heads", "neurons")
_KEYS = ("format", "model", "fingerprint", "weights", "target", "blocks")
# Ranges are written out in memory, so nobody's typing error may ask for billions.
_MOST_UNITS = 1 << 22
_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*")


def to_json(shape: Shape) -> dict[str, Any]:
    """The document that `from_json` reads."""
    return {
        "format": FORMAT,
        "model": shape.model,
        "fingerprint": shape.fingerprint,
        "target": dict(shape.target),
        "weights": dict(shape.weights),
        "blocks": [
            {
                "block": index,
                "of": {name: getattr(widths, name) for name in UNITS},
                **{name: to_ranges(getattr(block, name)) for name in UNITS},
            }
            for index, (block, widths) in enumerate(zip(shape.blocks, shape.widths, strict=True))
        ],
    }


def from_json(document: Any) -> Shape:
    """The shape that a document describes.

    Raises:
        InvalidInput: it is no such document, or a block keeps what it does not have.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        shown = str(document.get("format"))[:40] if isinstance(document, dict) else type(document).__name__
        raise InvalidInput(f"format {shown!r} is not known; this version reads {FORMAT!r}")
    if missing := [key for key in _KEYS if key not in document]:
        raise InvalidInput(f"it has no {missing[0]!r}")
    if surplus := [key for key in document if key not in _KEYS]:
        raise InvalidInput(f"it has {surplus[0][:40]!r}, which no shape has")
    for key in ("weights", "target"):
        if not isinstance(document[key], dict):
            raise InvalidInput(f"{key!r} must be an object")
    if not isinstance(document["weights"].get("method"), str):
        raise InvalidInput("'weights' must say its 'method', such as none")
    rows = document["blocks"]
    if not isinstance(rows, list) or not rows:
        raise InvalidInput("'blocks' must be a list of at least one block")
    widths, blocks = zip(*(_block(row, index) for index, row in enumerate(rows)), strict=True)
    return Shape(
        str(document["model"]), str(document["fingerprint"]), blocks, widths, document["weights"], document["target"]
    )


def to_text(shape: Shape) -> str:
    """JSON with one line for each block."""
    document = to_json(shape)
    head = json.dumps({key: value for key, value in document.items() if key != "blocks"}, indent=2, ensure_ascii=False)
    rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in document["blocks"])
    canonical_json(document)  # a NaN is refused here, and not by whoever reads it
    return f'{head[:-2]},\n  "blocks": [\n{rows}\n  ]\n}}\n'


def write_shape(shape: Shape, path: str | Path) -> Path:
    """Write a shape to a file, whole or not at all, and return its path.

    Raises:
        InvalidInput: the file cannot be written.
    """
    place = user_path(path)
    try:
        write_atomically(place, to_text(shape))
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from None
    return place


def read_shape(path: str | Path, *, model: str | None = None, widths: Sequence[BlockWidths] | None = None) -> Shape:
    """The shape in a file.

    Args:
        path: a ``.json`` that `write_shape` wrote.
        model: class name of the model that it is for.
        widths: what the blocks of that model have.

    Raises:
        InvalidInput: no such file, or no shape; or the shape is of another model, which is only asked if `model` and
            `widths` are given.
    """
    text = user_text(path, "shape", "a shape's .json", "a shape's .json")
    name = Path(path).name[:80]
    try:
        shape = from_json(strict_json(text))
    except InvalidInput as error:
        raise InvalidInput(f"{name!r}: {error}") from None
    except (ValueError, RecursionError, MemoryError):
        raise InvalidInput(f"{name!r} is not a JSON document of a shape") from None
    if model is not None and widths is not None:
        shape.check(model, widths)
    return shape


def to_ranges(indices: Sequence[int]) -> str:
    """Ascending indices as text such as ``0-511,513``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def from_ranges(text: Any, count: int, what: str) -> tuple[int, ...]:
    """The indices that `to_ranges` wrote, all below `count`.

    Raises:
        InvalidInput: the text is none of that, or the indices are not ascending from 0 to `count` - 1.
    """
    if text == "":
        return ()
    if not isinstance(text, str) or not _RANGES.fullmatch(text):
        raise InvalidInput(f"{what} are {str(text)[:40]!r}: give ascending ranges such as 0-511,513")
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        first, last = int(low), int(high or low)
        if last >= count or first > last or (found and first <= found[-1]):
            raise InvalidInput(f"{what} have {part!r}, which is not ascending from 0 to {count - 1}")
        found.extend(range(first, last + 1))
    return tuple(found)


def to_rows(blocks: Sequence[BlockShape]) -> list[list[str]]:
    """What every block keeps, as ranges of KV groups, of query heads and of neurons; `from_rows` reads them back."""
    return [[to_ranges(getattr(block, name)) for name in UNITS] for block in blocks]


def from_rows(rows: Any, widths: Sequence[BlockWidths]) -> tuple[BlockShape, ...]:
    """The blocks that `to_rows` wrote.

    Args:
        rows: of JSON.
        widths: what the dense blocks have.

    Raises:
        InvalidInput: it is no list of three ranges for each block, or they do not fit.
    """
    if not isinstance(rows, list) or len(rows) != len(widths):
        raise InvalidInput(f"{str(rows)[:40]!r} is no list of {len(widths)} blocks")
    found = []
    for index, (row, width) in enumerate(zip(rows, widths, strict=True)):
        if not isinstance(row, list) or len(row) != len(UNITS):
            raise InvalidInput(f"block {index} is {str(row)[:40]!r}: give ranges of {', '.join(UNITS)}")
        named = zip(UNITS, row, strict=True)
        kept = [from_ranges(text, getattr(width, name), f"the {name} of block {index}") for name, text in named]
        found.append(BlockShape(*kept))
        found[-1].check(index, width)
    return tuple(found)


def _block(row: Any, index: int) -> tuple[BlockWidths, BlockShape]:
    if not isinstance(row, dict) or set(row) != {"block", "of", *UNITS} or row["block"] != index:
        raise InvalidInput(
            f"entry {index + 1} of 'blocks' is not block {index} with 'of', {', '.join(map(repr, UNITS))}"
        )
    of = row["of"]
    if not isinstance(of, dict) or set(of) != set(UNITS) or not all(_is_count(of[name]) for name in UNITS):
        raise InvalidInput(f"'of' of block {index} must say how many groups, heads and neurons the dense block has")
    widths = BlockWidths(**of)
    if widths.heads % widths.groups:
        raise InvalidInput(f"block {index} cannot have {widths}: all groups have as many heads")
    kept = [from_ranges(row[name], of[name], f"the {name} of block {index}") for name in UNITS]
    return widths, BlockShape(*kept)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_UNITS
