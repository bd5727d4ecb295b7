"""What `show` and `runs` say about a run, as plain data. Light: reads the run's small files and loads no model code."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evoprune.search.rundir import RunDirectory

_FROM_RESULT = ("best", "dense", "front", "evaluations", "distinct")
# Of a baseline; `result.json` says more.
_BASELINE = ("name", "fitness", "heldout")


def run_document(run: RunDirectory) -> dict[str, Any]:
    """The document of `evoprune show --json`; from the state and the history while there is no result."""
    document: dict[str, Any] = {
        "run": run.run_id,
        "kind": run.kind,
        "state": run.state,
        "seed": run.config.get("seed"),
        "evaluations": 0,
        "distinct": 0,
        "seconds": run.seconds,
        "best": None,
        "baselines": [],
        "dense": {"heldout": None},
        "front": [],
    }
    result = run.result
    if result is not None:
        baselines = [{name: row[name] for name in _BASELINE} for row in result["baselines"]]
        return document | {name: result[name] for name in _FROM_RESULT} | {"baselines": baselines}
    history = list(run.history())
    return document | {
        # A birth that was answered without an evaluation names the one that it is like, or None.
        "evaluations": sum("same_as" not in line for line in history),
        "distinct": len({line["signature"] for line in history if line.get("signature")}),
        "best": best_so_far(history),
    }


def run_row(run: RunDirectory) -> dict[str, Any]:
    """The entry of `evoprune runs --json`."""
    document = run_document(run)
    best = document["best"]
    return {
        "run": document["run"],
        "kind": document["kind"],
        "state": document["state"],
        "best": None if best is None else {"fitness": best["fitness"], "expression": best["expression"]},
        "seconds": document["seconds"],
    }


def best_so_far(history: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The birth that got furthest and lost least there."""
    best: Mapping[str, Any] | None = None
    for line in history:
        if line.get("rungs") and (best is None or _rank(line) < _rank(best)):
            best = line
    if best is None:
        return None
    return {
        "birth": best["birth"],
        "expression": best["expression"],
        "fitness": best["rungs"][-1],
        "stderr": best["stderr"],
        "rungs": best["rungs"],
        "complexity": best["complexity"],
        "origin": best["origin"],
        "parents": best["parents"],
        "heldout": None,
    }


def _rank(line: Mapping[str, Any]) -> tuple[int, float, int]:
    return -len(line["rungs"]), line["rungs"][-1], line["birth"]


def resume_command(path: Path) -> str:
    """The command that continues the run in `path`."""
    return f"evoprune resume {shlex.quote(str(path))}"
