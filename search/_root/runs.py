"""Searches in Python: start one, continue one, look at what it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import write_atomically
from evoprune.search.engine.durable import disk_errors
from evoprune.search.rundir import RunDirectory, RunState
from evoprune.search.rundir import list_runs as run_directories
from evoprune.summaries import resume_command, run_document

if TYPE_CHECKING:
    from rich.table import Table


__all__ = ["Run", "list_runs", "resume", "search_metric"]

EXPORTS = (".py", ".json", ".tex")


class Run:
    """A search on disk, finished or not. What it says is read from its folder whenever it is asked.

    Args:
        run: a folder, a run's id, or `latest`.

    Raises:
        InvalidInput: there is no such run.
    """

    def __init__(self, run: str | Path | RunDirectory = "latest") -> None:
        self._directory = run if isinstance(run, RunDirectory) else RunDirectory.open(run)

    def __repr__(self) -> str:
        best = self.best
        found = "" if best is None else f", best {best['expression']} at {best['fitness']:.5g}"
        return f"<Run {self.id}: {self.state}{found}>"

    @property
    def id(self) -> str:
        """Its name, with the time when it began."""
        return self._directory.run_id

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._directory.path

    @property
    def kind(self) -> str:
        """What it searches: `metric`."""
        return self._directory.kind

    @property
    def state(self) -> RunState:
        """`running`, `interrupted`, `finished` or `failed`."""
        return self._directory.state

    @property
    def config(self) -> dict[str, Any]:
        """Every option, resolved."""
        return self._directory.config

    @property
    def result(self) -> dict[str, Any] | None:
        """All of `result.json`; None while the run is not finished."""
        return self._directory.result

    @property
    def summary(self) -> dict[str, Any]:
        """What `evoprune show --json` prints."""
        return run_document(self._directory)

    @property
    def best(self) -> dict[str, Any] | None:
        """The winner: `expression`, `fitness` (on text B, lower is better) and, once finished, `heldout` (text C).

        None before the first evaluation.
        """
        return self.summary["best"]

    @property
    def front(self) -> list[dict[str, Any]]:
        """Metrics that none beats in both fitness and complexity, simplest first; empty until the run is finished."""
        return self.summary["front"]

    @property
    def baselines(self) -> list[dict[str, Any]]:
        """Published criteria under the same conditions: `name`, `fitness`, `heldout`; empty until it is finished."""
        return self.summary["baselines"]

    @property
    def dense(self) -> dict[str, Any]:
        """The model before pruning: `heldout`, None until the run is finished."""
        return self.summary["dense"]

    def history(self) -> Iterator[dict[str, Any]]:
        """The births so far, in their order."""
        return self._directory.history()

    def table(self) -> Table:
        """Winner, dense model and baselines on held-out text, as a rich table, which a notebook shows as such.

        Raises:
            InvalidInput: the run is not finished.
        """
        from evoprune.search.tables import heldout_table

        return heldout_table(self._finished())

    def export(self, path: str | Path) -> Path:
        """Write the winner as a file of its own.

        Args:
            path: ends in ``.py`` (needs torch only, tests itself when run), ``.json`` or ``.tex``.

        Raises:
            InvalidInput: another ending, the run is not finished, its exports are damaged, or the disk's fault.
        """
        target = Path(path).expanduser()
        if target.suffix not in EXPORTS:
            raise InvalidInput(f"cannot export a metric to {target.name!r}: the ending must be .py, .json or .tex")
        winner = self._finished()["best"]["expression"]
        source = self.path / "export" / f"metric{target.suffix}"
        if target.suffix != ".tex":
            from evoprune.metrics.criterion import Metric
            from evoprune.metrics.exported import load_metric_file

            found = load_metric_file(source)
            if not isinstance(found, Metric) or found.expression.text != winner:
                raise InvalidInput(f"{source} does not hold the run's winner {winner}: it was changed")
        with disk_errors(target):
            write_atomically(target, source.read_bytes())
        return target

    def report(self) -> Path:
        """Write `report.html` into the run's folder, one self-contained page, from whatever the run has so far."""
        from evoprune.search.report import write_report

        return write_report(self._directory)

    def resume(self, **options: Any) -> Run:
        """Continue the run to its end; see `evoprune.resume`."""
        return resume(self._directory, **options)

    def _finished(self) -> dict[str, Any]:
        result = self.result
        if result is None:
            raise InvalidInput(f"run {self.id} is not finished: continue it with `{resume_command(self.path)}`")
        return result


def list_runs(folder: str | Path | None = None) -> list[Run]:
    """The runs in a folder, oldest first.

    Args:
        folder: by default that of the environment variable `EVOPRUNE_RUNS`, else `runs` below the current folder.
    """
    return [Run(directory) for directory in run_directories(None if folder is None else Path(folder))]


def search_metric(
    model: str | None = None,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    group: str | None = None,
    evaluations: int | None = None,
    minutes: float | None = None,
    population: int | None = None,
    seed: int | None = None,
    data: str | None = None,
    calibration: str | None = None,
    calibration_sequences: int | None = None,
    calibration_window: int | None = None,
    objective: str | None = None,
    searcher: str | None = None,
    seed_from: str | Path | None = None,
    window: int | None = None,
    threads: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
    config: str | Path | Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    executor: Literal["ray", "inline"] = "ray",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    address: str = "local",
    storage: str | None = None,
    quiet: bool = False,
) -> Run:
    """Evolve a pruning metric and return the finished run. What is None has the value of `config`, else its default.

    Args:
        model: `reference` (the default, an embedded model of a few million parameters), a folder, or a Hub id.
        sparsity: fraction of the prunable weights to remove, in (0, 1); 0.6 unless `pattern` is given.
        pattern: ``N:M``, N kept of every M consecutive inputs.
        group: compare scores within a ``row``, a ``layer`` or the ``global`` model.
        evaluations: candidates with a forward pass, at most.
        minutes: time for the search, at most; how far it gets then depends on the machine.
        population: members over all islands.
        seed: fixes texts A and B and the search: one seed, one history.
        data: text of fitness (side B) and report (side C): `corpus`, a file, a folder, or a data set.
        calibration: text of the statistics (side A); `data` if not given.
        calibration_sequences: windows of text A.
        calibration_window: tokens in each.
        objective: a name from `evoprune list objectives`.
        searcher: a name from `evoprune list searchers`.
        seed_from: an exported metric, or another run, to start from.
        window: births that may wait for results; a part of the run's identity.
        threads: torch threads of a worker on a CPU; a part of the run's identity.
        dtype, device, revision, trust_remote_code: as `load_model` takes them.
        config: YAML files, later ones win over earlier ones.
        settings: any option by its dotted key, such as ``{"searcher.islands": 2}``; these win over all others.
        run_dir: the run's folder; by default one of its own in `runs`.
        executor: ``ray`` for worker processes, ``inline`` for this process.
        workers: worker processes; None takes one per processor core, or per GPU.
        gpus_per_worker: GPUs of each, or a fraction of one; None takes 1 if there is a GPU.
        address: of a Ray cluster; ``local`` starts a private instance.
        storage: database URL for the Optuna study; None keeps it in the run's folder.
        quiet: show no progress.

    Raises:
        InvalidInput: an option, the model or the text is not usable; nothing is left behind.
        Interrupted: stopped by a signal; the run can be resumed.
        WorkersFailed, NoCapacity: no worker can start, or none is left; the run can be resumed.
    """
    from evoprune.configuration import metric_config
    from evoprune.search.metric_run import Resources
    from evoprune.sessions import start

    options = {
        "model": model, "sparsity": sparsity, "pattern": pattern, "group": group, "evaluations": evaluations,
        "minutes": minutes, "population": population, "seed": seed, "data": data, "calibration": calibration,
        "calibration_sequences": calibration_sequences, "calibration_window": calibration_window,
        "objective": objective, "searcher": searcher, "seed_from": None if seed_from is None else str(seed_from),
        "window": window, "threads": threads, "dtype": dtype, "device": device, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    files = [config] if isinstance(config, (str, Path)) else config
    resolved = metric_config(options, files=map(Path, files), settings=settings)
    resources = Resources(executor, workers, gpus_per_worker, address, storage)
    return Run(start(resolved, resources, run_dir=run_dir, quiet=quiet))


def resume(
    run: str | Path | RunDirectory | Run = "latest",
    *,
    fork: bool = False,
    settings: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
    executor: Literal["ray", "inline"] = "ray",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    address: str = "local",
    storage: str | None = None,
    quiet: bool = False,
) -> Run:
    """Continue an interrupted run to its end, with the history it would have had without the interruption.

    Args:
        run: a folder, a run's id, or `latest`. A finished run is returned as it is.
        fork: start a new run with the same configuration that reuses the evaluations of this one.
        settings: options of the fork that differ, by dotted key, such as ``{"evaluations": 600}``.
        run_dir: the folder of the fork.
        executor, workers, gpus_per_worker, address, storage, quiet: as in `search_metric`; they change no history.

    Raises:
        InvalidInput: no such run, another process drives it, or model, data or code changed since.
        Interrupted, WorkersFailed, NoCapacity: see `search_metric`.
    """
    from evoprune.search.metric_run import Resources
    from evoprune.sessions import drive, fork_run

    directory = run._directory if isinstance(run, Run) else Run(run)._directory
    resources = Resources(executor, workers, gpus_per_worker, address, storage)
    if fork:
        return Run(fork_run(directory, resources, settings=settings, run_dir=run_dir, quiet=quiet))
    if settings or run_dir is not None:
        raise InvalidInput("a resumed run keeps its options and its folder; fork it to change them")
    return Run(drive(directory, resources, quiet))
