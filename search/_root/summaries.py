"""What `show` and `runs` say about a run, as plain data. Light: reads the run's small files and loads no model code."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.search.engine.board_storage import without_password
from evoprune.search.kinds import kind_of
from evoprune.search.rundir import RunDirectory

if TYPE_CHECKING:
    from evoprune.search.worker_session import Resources

_FROM_RESULT = ("best", "dense", "front", "evaluations", "distinct")
# Of a baseline; `result.json` says more. Beside a front, one allocator is there once for each budget.
_BASELINE = ("name", "expression", "sparsity", "cost", "fitness", "heldout")
# Of a best candidate: its fitness, and what it is, by the name that its kind of search gives it.
_GENOMES = ("fitness", "expression", "allocation", "shape", "policy")


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
        baselines = [{name: row[name] for name in _BASELINE if name in row} for row in result["baselines"]]
        return document | {name: result[name] for name in _FROM_RESULT} | {"baselines": baselines}
    return document | kind_of(run.kind).progress_of(run)


def run_row(run: RunDirectory) -> dict[str, Any]:
    """The entry of `evoprune runs --json`."""
    document = run_document(run)
    best = document["best"]
    return {
        "run": document["run"],
        "kind": document["kind"],
        "state": document["state"],
        "best": None if best is None else {name: best[name] for name in _GENOMES if name in best},
        "seconds": document["seconds"],
    }


def resume_command(path: Path, resources: Resources | None = None) -> str:
    """The command that continues the run in `path`.

    Args:
        resources: of the session that ended. The command names its cluster, which no run folder knows, what was asked
            of that, and its database, without a password.
    """
    words = ["evoprune", "resume", str(path)]
    if resources is not None and resources.on_cluster:
        words += ["--address", resources.address]
        words += [] if resources.workers is None else ["--workers", str(resources.workers)]
        words += [] if resources.gpus_per_worker is None else ["--gpus-per-worker", f"{resources.gpus_per_worker:g}"]
        words += ["--insecure-cluster"] if resources.insecure_cluster else []
    if resources is not None and resources.storage is not None:
        words += ["--storage", without_password(resources.storage, resources.storage)]
    return shlex.join(words)
