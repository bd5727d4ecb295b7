"""One session of a run: make its folder or find it, search to the end, and leave it so that one can go on."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evoprune.configuration import check_names, metric_config
from evoprune.metrics.errors import Interrupted, InvalidInput, NoCapacity, WorkersFailed
from evoprune.metrics.files import write_atomically
from evoprune.search.config import MetricSearchConfig
from evoprune.search.engine.address import check_address
from evoprune.search.engine.board_storage import check_storage
from evoprune.search.engine.durable import disk_errors
from evoprune.search.identity import git_commit, versions
from evoprune.search.metric_run import Resources, resume_metric_search
from evoprune.search.report import write_report
from evoprune.search.rundir import RunDirectory, runs_folder
from evoprune.summaries import resume_command


def start(
    config: MetricSearchConfig,
    resources: Resources,
    *,
    run_dir: str | Path | None = None,
    argv: Iterable[str] = (),
    quiet: bool = False,
    forked_from: RunDirectory | None = None,
) -> RunDirectory:
    """Make a run's folder and search to the end; a folder that bad input made useless is removed again."""
    if resources.on_cluster:
        check_address(resources.address, insecure=resources.insecure_cluster)
    check_names(config)
    if resources.storage is not None:
        check_storage(resources.storage)
    parent = runs_folder() if run_dir is None else Path(run_dir)
    made = not parent.exists()
    identity: dict[str, Any] = {"versions": versions(), "git": git_commit(), "argv": list(argv)}
    if forked_from is not None:
        identity["forked_from"] = forked_from.run_id
    directory = RunDirectory.create("metric", config.model_dump(mode="json"), identity, run_dir=run_dir)
    try:
        if forked_from is not None and (log := forked_from.path / "evaluations.wal").exists():
            with disk_errors(directory.path):
                write_atomically(directory.path / log.name, log.read_bytes())
        return drive(directory, resources, quiet)
    except InvalidInput:
        directory.close()
        if directory.peek() is None:
            _remove(directory.path, made, parent)
        raise


def fork_run(
    run: RunDirectory,
    resources: Resources,
    *,
    settings: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    run_dir: str | Path | None = None,
    argv: Iterable[str] = (),
    quiet: bool = False,
) -> RunDirectory:
    """Start a new run from another's configuration and evaluations; see `evoprune.resume`.

    Args:
        assignments: ``key.sub=value``, the value being YAML; these win over `settings`.
    """
    config = metric_config({}, files=[run.path / "config.yaml"], settings=settings, assignments=assignments)
    return start(config, resources, run_dir=run_dir, argv=argv, quiet=quiet, forked_from=run)


def drive(directory: RunDirectory, resources: Resources, quiet: bool = False) -> RunDirectory:
    """Search to the end.

    Raises:
        EvopruneError: where the run can go on, its message says how.
    """
    if resources.on_cluster:
        check_address(resources.address, insecure=resources.insecure_cluster)
    go_on = f"continue with `{resume_command(directory.path)}`"
    try:
        resume_metric_search(directory, resources, stream=io.StringIO() if quiet else None)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped at once; what was finished is saved; {go_on}") from None
    except (Interrupted, NoCapacity, WorkersFailed) as error:
        raise type(error)(f"{error}; {go_on}") from error
    if not (directory.path / "report.html").exists():
        _report(directory)
    return directory


def _report(directory: RunDirectory) -> None:
    """Write the report; a search that went well does not end in an error because its page cannot be drawn."""
    try:
        write_report(directory)
    except Exception as error:
        directory.events("error", "report_failed", error=f"{type(error).__name__}: {error}")


def _remove(path: Path, made: bool, parent: Path) -> None:
    """Undo the making of a run folder: all in it is ours, as it was new or empty."""
    for entry in path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if path != parent or made:
        path.rmdir()
    if made and path != parent and not any(parent.iterdir()):
        parent.rmdir()
