"""One session of a run: make its folder or find it, search to the end, and leave it so that one can go on."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evoprune.configuration import check_names, config_again
from evoprune.metrics.errors import Interrupted, InvalidInput, NoCapacity, WorkersFailed
from evoprune.metrics.files import write_atomically
from evoprune.search.config_sections import SearchConfig
from evoprune.search.engine.address import check_address
from evoprune.search.engine.board_storage import (
    absolute_storage,
    check_storage,
    lacks_password,
    without_password,
)
from evoprune.search.engine.durable import disk_errors
from evoprune.search.identity import git_commit, versions
from evoprune.search.kinds import kind_of
from evoprune.search.publishing import publish_result
from evoprune.search.report import write_report
from evoprune.search.rundir import RunDirectory, runs_folder
from evoprune.search.session import resume_search
from evoprune.search.worker_session import Resources
from evoprune.summaries import resume_command


def start(
    config: SearchConfig,
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
    _check_resources(resources)
    if resources.storage is not None:
        check_storage(resources.storage)
    parent = runs_folder() if run_dir is None else Path(run_dir)
    made = not parent.exists()
    words = [without_password(word, resources.storage) for word in argv]  # a run folder is there to be shown around
    identity: dict[str, Any] = {"versions": versions(), "git": git_commit(), "argv": words}
    if forked_from is not None:
        identity["forked_from"] = forked_from.run_id
    directory = RunDirectory.create(config.kind, config.model_dump(mode="json"), identity, run_dir=run_dir)
    log = directory.path / "evaluations.wal"
    known = b""
    try:
        if forked_from is not None and (source := forked_from.path / log.name).exists():
            known = source.read_bytes()
            with disk_errors(directory.path):
                write_atomically(log, known)
        return drive(directory, resources, quiet)
    except InvalidInput as error:
        directory.close()
        if directory.peek() is None and not (log.exists() and log.stat().st_size > len(known)):
            _remove(directory.path, made, parent)
        elif isinstance(error.__cause__, OSError):  # the disk's fault: what was evaluated counts once it is mended
            raise InvalidInput(f"{error}; then {_go_on(directory.path, resources)}") from error
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
    config = config_again(run, settings=settings, assignments=assignments)
    return start(config, resources, run_dir=run_dir, argv=argv, quiet=quiet, forked_from=run)


def drive(directory: RunDirectory, resources: Resources, quiet: bool = False) -> RunDirectory:
    """Search to the end.

    Raises:
        EvopruneError: where the run can go on, its message says how.
    """
    _check_resources(resources)
    if resources.on_cluster:
        check_address(resources.address, insecure=resources.insecure_cluster)
    resources = _with_storage(directory, resources)
    go_on = _go_on(directory.path, resources)
    try:
        resume_search(directory, resources, stream=io.StringIO() if quiet else None)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped at once; what was finished is saved; {go_on}") from None
    except (Interrupted, NoCapacity, WorkersFailed) as error:
        raise type(error)(f"{error}; {go_on}") from error
    steps = kind_of(directory.kind).steps(directory)
    for run in (*steps, directory):
        if not (run.path / "report.html").exists():
            _report(run)
            if run is not directory or not steps:  # the steps of a run have its boards
                _publish(run, resources.storage)
    return directory


def _check_resources(resources: Resources) -> None:
    """Refuse numbers of workers and GPUs that cannot be.

    Raises:
        InvalidInput: no worker, or GPUs below zero.
    """
    if resources.workers is not None and resources.workers < 1:
        raise InvalidInput(f"{resources.workers} workers cannot search: give 1 or more")
    if resources.gpus_per_worker is not None and not 0 <= resources.gpus_per_worker < math.inf:
        raise InvalidInput(f"{resources.gpus_per_worker} GPUs per worker cannot be: give 0, a fraction of one, or more")


def _with_storage(run: RunDirectory, resources: Resources) -> Resources:
    """`resources` and where the board goes: where the user says, else where it was, unless that takes a password.

    Raises:
        InvalidInput: no database has such a URL, or its driver is not installed.
    """
    places = (resources.storage, *(one.storage for one in (run, *kind_of(run.kind).steps(run))))
    known = next((place for place in places if place is not None), None)
    if known is None:
        return resources
    if lacks_password(known):
        return replace(resources, storage=None, lost_board=known)
    check_storage(known, reach=False)
    return replace(resources, storage=absolute_storage(known))


def _go_on(path: Path, resources: Resources) -> str:
    """What to do to continue the run in `path`, for people."""
    command = resume_command(path, resources)
    return f"continue with `{command}`{' and the password for ***' if lacks_password(command) else ''}"


def _report(directory: RunDirectory) -> None:
    """Write the report; a search that went well does not end in an error because its page cannot be drawn."""
    try:
        write_report(directory)
    except Exception as error:
        directory.events("error", "report_failed", error=f"{type(error).__name__}: {error}")


def _publish(run: RunDirectory, storage: str | None) -> None:
    """Give the result to the board, which can have it later as well: `evoprune dashboard RUN --rebuild`."""
    try:
        publish_result(run, storage, warn=lambda text: run.events("warning", "board_trouble", text=text))
    except Exception as error:
        run.events("error", "publish_failed", error=without_password(f"{type(error).__name__}: {error}", storage))


def _remove(path: Path, made: bool, parent: Path) -> None:
    """Undo the making of a run folder: all in it is ours, as it was new or empty."""
    for entry in path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if path != parent or made:
        path.rmdir()
    if made and path != parent and not any(parent.iterdir()):
        parent.rmdir()
