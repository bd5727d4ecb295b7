"""Where a policy starts beside its prior: a shape, an allocation or a policy that was found before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoprune.fitness import policy_file
from evoprune.fitness.mask_units import UnitRow, UnitTable
from evoprune.fitness.maskers import ByUnits, parts_of
from evoprune.fitness.policy_file import FORMAT, LearnedPolicy, read_policy
from evoprune.fitness.units import PARTS
from evoprune.metrics import allocation_file, shape_file
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import read_sparsities
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import strict_json, user_text
from evoprune.metrics.records import Site
from evoprune.metrics.shape import BlockShape, BlockWidths, Shape
from evoprune.metrics.shape_file import FORMAT as SHAPE_FORMAT
from evoprune.metrics.shape_file import read_shape
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.structure import part_sparsities

Start = Shape | Allocation | LearnedPolicy

PRIOR_SHARE = 0.5
"""What the prior still has to say where something was found before."""
LEAST = 0.05
"""Probability of a unit that a start removes: nothing is ruled out."""


def given_start(source: str | None) -> Start | None:
    """What ``seed_from`` names: a file, or what a finished run exported.

    Raises:
        InvalidInput: it is none of these, or the run is not finished.
    """
    if source is None:
        return None
    path = Path(source)
    if path.suffix == ".json" and not path.is_dir():
        return _read(path)
    run = RunDirectory.open(source)
    if run.result is None and run.kind != "metric":
        raise InvalidInput(f"run {source} is not finished: resume it first")
    for name in ("policy", "shape", "allocation"):
        file = run.path / "export" / f"{name}.json"
        if file.exists():
            return _read(file)
    raise InvalidInput(f"run {source} searched {run.kind}s: a shape, an allocation or a policy is needed")


def start_json(start: Start) -> dict[str, Any]:
    """A start as its file has it."""
    if isinstance(start, LearnedPolicy):
        return policy_file.to_json(start)
    return allocation_file.to_json(start) if isinstance(start, Allocation) else shape_file.to_json(start)


def check_start(
    start: Start, source: str, table: UnitTable, model_class: str, sites: Sequence[Site], widths: Sequence[BlockWidths]
) -> None:
    """Refuse a start that is of another model, or of other units.

    Args:
        start: what `source` names.
        table: the units of this run.
        model_class, sites, widths: of the model.

    Raises:
        InvalidInput: says what differs.
    """
    try:
        if isinstance(start, LearnedPolicy):
            if start.table.hash != table.hash:
                raise InvalidInput("the policy is of other units, or of another model: give the same --units")
        elif not isinstance(table.masker, ByUnits):
            raise InvalidInput("a policy in a pattern starts from a policy only")
        elif isinstance(start, Allocation):
            start.check(model_class, sites)
        else:
            start.check(model_class, widths)
    except InvalidInput as error:
        raise InvalidInput(f"{source}: {error}") from None


def logits_from(
    start: Start, table: UnitTable, prior: NDArray[np.float64], sites: Sequence[Site]
) -> NDArray[np.float64]:
    """Logits of the policy that a start stands for.

    What a shape or an allocation keeps of a unit, or of the part that it is in, becomes its probability, at least
    `LEAST` from both ends; between units of which it says the same, the prior decides.

    Args:
        start: see `check_start`.
        table: the units.
        prior: [n] logits by the prior alone.
        sites: the matrices of the model.
    """
    if isinstance(start, LearnedPolicy):
        known = start.mask.astype(np.float64) if start.probabilities is None else start.probabilities
        return _logit(known, LEAST if start.probabilities is None else 0.0025)
    shares = np.ones(table.n)
    lost = part_sparsities(sites, [site.sparsity for site in start.sites]) if isinstance(start, Allocation) else []
    for index, row in enumerate(table.rows):
        units = table.of_row(index)
        if isinstance(start, Allocation):
            gone = [lost[2 * row.block + PARTS.index(part)] for part in parts_of(row.kind)]
            shares[units] = 1 - np.mean(gone)
        else:
            shares[units] = _kept_shares(row, start.blocks[row.block], start.widths[row.block])
    return _logit(shares, LEAST) + PRIOR_SHARE * prior


def _kept_shares(row: UnitRow, block: BlockShape, widths: BlockWidths) -> NDArray[np.float64]:
    """[units of the row]: how much of each a shape keeps."""
    kept, count = (
        (block.groups, widths.groups)
        if row.kind == "kv-group"
        else (block.heads, widths.heads)
        if "attention" in parts_of(row.kind)
        else (block.neurons, widths.neurons)
    )
    members = np.zeros(count)
    members[list(kept)] = 1
    if row.of != count:  # a whole part, or a whole block, of which the heads speak
        return np.full(row.count, members.mean())
    return np.array([members[list(row.members(index))].mean() for index in range(row.count)])


def _logit(probabilities: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    clipped = np.clip(probabilities, least, 1 - least)
    return np.log(clipped) - np.log1p(-clipped)


def _read(file: Path) -> Start:
    """A file by what it says that it is."""
    text = user_text(file, "start", "a .json of a shape, an allocation or a policy", "such a file, or a run")
    try:
        document: Any = strict_json(text)
    except (ValueError, RecursionError):
        document = None
    found = document.get("format") if isinstance(document, dict) else None
    if found == SHAPE_FORMAT:
        return read_shape(file)
    return read_policy(file) if found == FORMAT else read_sparsities(file)
