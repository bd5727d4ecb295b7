"""Allocations as files: evoprune's JSON, and the text that EvoPress reads and writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evoprune.metrics.allocation import Allocation, BitBudget, SiteSparsity
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.evopress import from_evopress, to_evopress
from evoprune.metrics.files import canonical_json, strict_json, user_path, user_text, write_atomically
from evoprune.metrics.records import Site

FORMAT = "evoprune-allocation/1"
BITS_FORMAT = "evoprune-allocation/2"
"""That of allocations with bits, which a version that knows no bits must not take for one without."""

_MOST_BITS = 16
_KEYS = ("format", "model", "allocator", "parameters", "sparsity", "sites")


def to_json(allocation: Allocation) -> dict[str, Any]:
    """The document that `from_json` reads."""
    return {
        "format": FORMAT if allocation.bits is None else BITS_FORMAT,
        "model": allocation.model,
        **({} if allocation.fingerprint is None else {"fingerprint": allocation.fingerprint}),
        **allocation.summary(),
        "sites": [
            {
                "name": site.name,
                "shape": list(site.shape),
                "sparsity": site.sparsity,
                **({} if site.bits is None else {"bits": site.bits}),
            }
            for site in allocation.sites
        ],
    }


def from_json(document: Any) -> Allocation:
    """The allocation that a document describes.

    Raises:
        InvalidInput: it is no such document, a sparsity is outside [0, 1), or they, or the bits, do not add up to the
            budget.
    """
    if not isinstance(document, dict) or document.get("format") not in (FORMAT, BITS_FORMAT):
        shown = str(document.get("format"))[:40] if isinstance(document, dict) else type(document).__name__
        raise InvalidInput(f"format {shown!r} is not known; this version reads {FORMAT!r} and {BITS_FORMAT!r}")
    if missing := [key for key in _KEYS if key not in document]:
        raise InvalidInput(f"it has no {missing[0]!r}")
    parameters, rows, fingerprint = document["parameters"], document["sites"], document.get("fingerprint")
    if not isinstance(parameters, dict) or not isinstance(rows, list) or not rows:
        raise InvalidInput("'parameters' must be an object and 'sites' a list of at least one matrix")
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise InvalidInput("'fingerprint' must be a string, or not there")
    bits = _budget(document.get("bits")) if document["format"] == BITS_FORMAT else None
    sites = tuple(_site(row, index, bits is not None) for index, row in enumerate(rows))
    if len({site.name for site in sites}) < len(sites):
        names = [site.name for site in sites]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(f"{twice[:120]} is in it twice: give each matrix one sparsity")
    sparsity = _fraction(document["sparsity"], "the budget 'sparsity'")
    model, allocator = str(document["model"]), str(document["allocator"])
    allocation = Allocation(model, sparsity, sites, allocator, parameters, fingerprint, bits)
    allocation.check_budget()
    return allocation


def to_text(allocation: Allocation) -> str:
    """JSON with one line for each matrix."""
    document = to_json(allocation)
    head = json.dumps({key: value for key, value in document.items() if key != "sites"}, indent=2, ensure_ascii=False)
    rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in document["sites"])
    canonical_json(document)  # a NaN is refused here, and not by whoever reads it
    return f'{head[:-2]},\n  "sites": [\n{rows}\n  ]\n}}\n'


def write_allocation(allocation: Allocation, path: str | Path, *, step: int = 1) -> Path:
    """Write an allocation to a file, whole or not at all.

    Args:
        allocation: what to write.
        path: ``.txt`` gives EvoPress's text, which has no bits; anything else JSON with a line for each matrix.
        step: see `to_evopress`.

    Returns:
        The path.

    Raises:
        InvalidInput: the file cannot be written, or EvoPress's text is asked of an allocation with bits.
    """
    place = user_path(path)
    text = to_evopress(allocation, step) if place.suffix == ".txt" else to_text(allocation)
    try:
        write_atomically(place, text)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror or error}") from None
    return place


def read_allocation(
    path: str | Path,
    *,
    model: str | None = None,
    sites: Sequence[Site] | None = None,
    sparsity: float | None = None,
    step: int | None = None,
) -> Allocation:
    """The allocation in a file of ours, or in EvoPress's text.

    Args:
        path: a ``.json`` that `write_allocation` wrote, or what EvoPress writes: see `from_evopress`.
        model: class name of the model that it is for; needed for EvoPress's text.
        sites: matrices of that model; needed for EvoPress's text.
        sparsity: the budget; for EvoPress's levels, which do not hold it.
        step: weights in a level; for EvoPress's levels, which do not hold it.

    Raises:
        InvalidInput: no such file, or not one of these; the text needs what is not given; or the allocation is of
            another model, which is only asked if `model` and `sites` are given.
    """
    text = user_text(
        path, "allocation", "an allocation's .json or .txt", "an allocation's .json or .txt, or an allocator's name"
    )
    name = Path(path).name[:80]
    try:
        if text.lstrip().startswith(("{", "[")):
            allocation = from_json(strict_json(text))
        else:
            return from_evopress(text, model=model, sites=sites, sparsity=sparsity, step=step)
    except InvalidInput as error:
        raise InvalidInput(f"{name!r}: {error}") from None
    except (ValueError, RecursionError, MemoryError):
        raise InvalidInput(f"{name!r} is not a JSON document of an allocation") from None
    if model is not None and sites is not None:
        allocation.check(model, sites)
    return allocation


def read_sparsities(path: str | Path) -> Allocation:
    """`read_allocation` for who makes use of sparsities alone.

    Raises:
        InvalidInput: as there; or the allocation has bits.
    """
    found = read_allocation(path)
    if found.bits is not None:
        raise InvalidInput(f"{Path(path).name[:80]!r} holds bits, which no search reads: give sparsities alone")
    return found


def _budget(value: Any) -> BitBudget:
    mean, total = (value.get("mean"), value.get("budget")) if isinstance(value, dict) else (None, None)
    known = isinstance(mean, (int, float)) and not isinstance(mean, bool) and 0 < mean < float("inf")
    if mean is None or not known or type(total) is not int or total < 0:
        raise InvalidInput("'bits' must be an object with a 'mean' above 0 and a whole number as 'budget'")
    return BitBudget(float(mean), total)


def _bits(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_BITS:
        raise InvalidInput(f"the bits of {name[:120]} are {str(value)[:40]}: give a whole number up to {_MOST_BITS}")
    return value


def _site(row: Any, index: int, bits: bool) -> SiteSparsity:
    shape = row.get("shape") if isinstance(row, dict) else None
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("name"), str)
        or not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(size, int) and 0 < size < 1 << 32 for size in shape)
    ):
        raise InvalidInput(
            f"entry {index + 1} of 'sites' is no matrix with a name, a shape of two sizes and a sparsity"
        )
    name = row["name"]
    return SiteSparsity(
        name,
        (shape[0], shape[1]),
        _fraction(row.get("sparsity"), f"the sparsity of {name[:120]}", whole=True),
        _bits(row.get("bits"), name) if bits else None,
    )


def _fraction(value: Any, what: str, *, whole: bool = False) -> float:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not (0 <= value < 1 or (whole and value == 1)):
        span = "[0, 1]" if whole else "[0, 1)"
        raise InvalidInput(f"{what} is {str(value)[:40]}, outside {span}: give the fraction of weights to remove")
    return float(value)
