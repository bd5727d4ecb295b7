"""Start a search in a new folder, or continue one: a session, from the lock to the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TextIO

from evoprune.metrics.errors import Interrupted, NoCapacity
from evoprune.search.config_sections import SearchConfig
from evoprune.search.engine.board_storage import check_storage
from evoprune.search.identity import git_commit, versions
from evoprune.search.kinds import config_of, kind_of
from evoprune.search.loop import evaluated
from evoprune.search.progress import Progress
from evoprune.search.rundir import RunDirectory
from evoprune.search.signals import stop_on_signals
from evoprune.search.worker_session import Resources


def start_search(
    config: SearchConfig,
    resources: Resources | None = None,
    *,
    run_dir: Path | str | None = None,
    argv: Sequence[str] = (),
    stream: TextIO | None = None,
) -> RunDirectory:
    """Search in a new folder and return it, finished.

    Raises:
        Interrupted: SIGINT or SIGTERM; the run's folder holds what `resume_search` needs.
        InvalidInput: the configuration, the model or the data is not usable.
    """
    resources = resources or Resources()
    kind_of(config.kind).check_names(config)
    if resources.storage is not None:
        check_storage(resources.storage)
    identity = {"versions": versions(), "git": git_commit(), "argv": list(argv)}
    run = RunDirectory.create(config.kind, config.model_dump(mode="json"), identity, run_dir=run_dir)
    with closing(run):
        _session(run, config, resources, stream)
    return run


def resume_search(
    run: RunDirectory, resources: Resources | None = None, *, stream: TextIO | None = None
) -> RunDirectory:
    """Continue an interrupted run to its end; a finished one is returned as it is.

    Raises:
        InvalidInput: model, data or code changed, or another process drives the run.
    """
    if run.result is not None:
        return run
    config = config_of(run)
    run.lock()
    if (run.path / "evaluations.wal").exists():
        run.events("info", "resumed")
    with closing(run):
        _session(run, config, resources or Resources(), stream)
    return run


def _session(run: RunDirectory, config: SearchConfig, resources: Resources, stream: TextIO | None) -> None:
    state = run.peek()
    done = 0 if state is None else evaluated(state)
    title = f"evoprune {run.run_id}: {config.model.name} at {config.aim}, seed {config.seed}"
    with (
        stop_on_signals() as stopping,
        Progress(config.evaluations, config.minutes, stream, title=title, done=done, elapsed=run.seconds) as progress,
    ):
        carry_out(run, config, resources, progress, stopping)


def carry_out(
    run: RunDirectory, config: SearchConfig, resources: Resources, progress: Progress, stopping: Callable[[], bool]
) -> None:
    """One session of a run that this process has locked; how it ends is noted in the run's events.

    Raises:
        Interrupted: `stopping` became true.
        InvalidInput: see `start_search`.
    """
    try:
        kind_of(run.kind).session(config)(run, config, resources, progress).execute(stopping)
    except (Interrupted, NoCapacity, KeyboardInterrupt) as reason:
        run.events("info", "interrupted", reason=str(reason) or "stopped at once")
        raise
    except BaseException as error:
        run.events("error", "failed", error=f"{type(error).__name__}: {error}")
        raise
