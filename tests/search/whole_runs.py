"""What tests of whole runs, of every kind, ask of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna

from evoprune.search.breeders import BREEDERS
from evoprune.search.rundir import RunDirectory


def tiny_options(world: Path) -> dict[str, Any]:
    """Options, by dotted key, that make any search on the fixture `world` one of seconds."""
    return {
        "model.name": str(world / "model"),
        "data.source": str(world / "text.txt"),
        "data.window": 32,
        "data.calibration_window": 32,
        "data.calibration_sequences": 8,
        "data.heldout_windows": 8,
        "target.sparsity": 0.5,
    }


def history(run: RunDirectory) -> bytes:
    return (run.path / "history.jsonl").read_bytes()


def lines_of(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in history(run).splitlines()]


def result_of(run: RunDirectory) -> dict[str, Any]:
    assert run.result is not None
    return run.result


def timeless(result: dict[str, Any] | None) -> dict[str, Any]:
    """A result without what names the run."""
    assert result is not None
    return {name: value for name, value in result.items() if name != "run"}


def stopping_in(path: Path, phase: str, polls: int) -> Callable[[], Any]:
    """In place of `stop_on_signals`: the user stops a session of the run in `path` when a phase has asked so often."""
    asked = itertools.count()

    def stopping() -> bool:
        phases = [event["phase"] for event in RunDirectory.open(path).read_events() if event["event"] == "phase"]
        return bool(phases) and phases[-1] == phase and next(asked) >= polls

    return lambda: nullcontext(stopping)


def study(run: RunDirectory) -> optuna.Study:
    """What the board of a run holds."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(run.path / "optuna.log")))
    return optuna.load_study(study_name=run.run_id, storage=storage)


def installed_breeders() -> list[str]:
    """Searchers of allocations whose packages are there."""
    return [name for name in BREEDERS if all(find_spec(package) for package in BREEDERS[name].needs)]
