"""Allocations, shapes and policies that a person names: a file, or a run that left one."""

from __future__ import annotations

from pathlib import Path

from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import read_sparsities
from evoprune.metrics.allocation_formula import read_formula
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import Shape
from evoprune.metrics.shape_file import read_shape
from evoprune.search.rundir import RunDirectory


def allocation_file(source: str) -> Path:
    """The file of the allocation that `source` names: itself, or what a finished run exported.

    Raises:
        InvalidInput: EvoPress's text, or a run that is not finished or left none.
    """
    path = Path(source)
    if path.suffix == ".txt" and not path.is_dir():
        raise InvalidInput(f"{source} is no .json: EvoPress's text says neither its budget nor its model")
    if path.suffix == ".json" and not path.is_dir():
        return path
    run = RunDirectory.open(source)
    file = run.path / "export" / "allocation.json"
    if run.result is None and run.kind != "metric":
        raise InvalidInput(f"run {source} is not finished: resume it first")
    if not file.exists():
        raise InvalidInput(f"run {source} searched {run.kind}s: a run that searched allocations is needed")
    return file


def read_named(source: str) -> Allocation:
    """The allocation that `source` names; see `allocation_file`.

    Raises:
        InvalidInput: none can be read there, or it has bits; or a formula is there, which has no sparsities before it
            meets a model.
    """
    file = allocation_file(source)
    if read_formula(file) is not None:
        raise InvalidInput(
            f"{source} holds a formula, which says what matrices lose only beside a model: give an allocation.json"
        )
    return read_sparsities(file)


def shape_file(source: str) -> Path:
    """The file of the shape that `source` names: itself, or what a finished run exported.

    Raises:
        InvalidInput: a run that is not finished, or that searched something else.
    """
    path = Path(source)
    if path.suffix == ".json" and not path.is_dir():
        return path
    run = RunDirectory.open(source)
    if run.kind != "structure":
        raise InvalidInput(f"run {source} searched {run.kind}s: a run that searched a structure is needed")
    if run.result is None:
        raise InvalidInput(f"run {source} is not finished: resume it first")
    return run.path / "export" / "shape.json"


def policy_file(source: str) -> Path:
    """The file of the mask policy that `source` names: itself, or what a finished run exported.

    Raises:
        InvalidInput: a run that is not finished, or that searched something else.
    """
    path = Path(source)
    if path.suffix == ".json" and not path.is_dir():
        return path
    run = RunDirectory.open(source)
    if run.kind != "policy":
        raise InvalidInput(f"run {source} searched {run.kind}s: a run that searched a policy is needed")
    if run.result is None:
        raise InvalidInput(f"run {source} is not finished: resume it first")
    return run.path / "export" / "policy.json"


def given_shape(source: str | None) -> Shape | None:
    """The shape that `source` names; see `shape_file`."""
    return None if source is None else read_shape(shape_file(source))
