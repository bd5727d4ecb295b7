"""Searches in Python: start one of each kind, continue one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evoprune.configuration import allocation_config, metric_config
from evoprune.metrics.errors import InvalidInput
from evoprune.runs import Run
from evoprune.search.rundir import RunDirectory
from evoprune.search.worker_session import Resources
from evoprune.sessions import drive, fork_run, start

__all__ = ["resume", "search_allocation", "search_metric"]


def search_metric(
    model: str | None = None,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    group: str | None = None,
    allocation: str | Path | None = None,
    compressor: str | None = None,
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
    insecure_cluster: bool = False,
    quiet: bool = False,
) -> Run:
    """Evolve a pruning metric and return the finished run. What is None has the value of `config`, else its default.

    Args:
        model: `reference` (the default, an embedded model of a few million parameters), a folder, or a Hub id.
        sparsity: fraction of the prunable weights to remove, in (0, 1); 0.6 unless `pattern` is given.
        pattern: ``N:M``, N kept of every M consecutive inputs.
        group: compare scores within a ``row``, a ``layer`` or the ``global`` model.
        allocation: a sparsity for each matrix, by row, in place of one: an ``allocation.json``, or a run that left one.
            Its budget is the `sparsity`; the winner is then the best metric at these sparsities.
        compressor: what becomes of the weights that a metric keeps, before every candidate's forward pass: ``mask``
            unless given, or another name from `evoprune list compressors` that reads a metric, such as
            ``refit:steps=10``. The winner is then the best metric for `prune` with the same `compressor`.
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
        workers: worker processes; None takes one per processor core, or per GPU, of the machine or cluster.
        gpus_per_worker: GPUs of each, or a fraction of one; None takes 1 if there is a GPU.
        address: of a Ray cluster: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``; ``local`` starts a private instance.
        storage: database URL for the Optuna study; None keeps it in the run's folder.
        insecure_cluster: use a cluster that asks for no token: whoever reaches it can run code as you on its nodes.
        quiet: show no progress.

    Raises:
        InvalidInput: an option, the model or the text is not usable; nothing is left behind.
        Interrupted: stopped by a signal; the run can be resumed.
        WorkersFailed, NoCapacity: no worker can start, or none is left; the run can be resumed.
    """
    options = {
        "model": model, "sparsity": sparsity, "pattern": pattern, "group": group,
        "allocation": as_text(allocation), "compressor": compressor, "evaluations": evaluations, "minutes": minutes,
        "population": population, "seed": seed, "data": data, "calibration": calibration,
        "calibration_sequences": calibration_sequences, "calibration_window": calibration_window,
        "objective": objective, "searcher": searcher, "seed_from": as_text(seed_from), "window": window,
        "threads": threads, "dtype": dtype, "device": device, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    resolved = metric_config(options, files=as_files(config), settings=settings)
    resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
    return Run(start(resolved, resources, run_dir=run_dir, quiet=quiet))


def search_allocation(
    model: str | None = None,
    *,
    sparsity: float | None = None,
    metric: str | Path | None = None,
    compressor: str | None = None,
    granularity: Literal["matrix", "block", "kind"] | None = None,
    drop: Literal["none", "parts", "blocks"] | None = None,
    drop_only: bool | None = None,
    pareto: Literal["parameters", "flops", "latency"] | None = None,
    sparsity_range: tuple[float, float] | None = None,
    evaluations: int | None = None,
    minutes: float | None = None,
    population: int | None = None,
    seed: int | None = None,
    data: str | None = None,
    calibration: str | None = None,
    calibration_sequences: int | None = None,
    calibration_window: int | None = None,
    searcher: str | None = None,
    surrogate: bool | None = None,
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
    insecure_cluster: bool = False,
    quiet: bool = False,
) -> Run:
    """Evolve how much each matrix loses and return the finished run: `search_metric` for allocations.

    The winner's file, which `Run.export` writes, is what `prune` takes as its `allocation`, beside the same `metric`.

    Args:
        model: see `search_metric`.
        sparsity: fraction of all prunable weights to remove, in (0, 1); 0.6 unless given.
        metric: the criterion inside, which says what a matrix loses first: a name, an expression, or an exported file.
        compressor: what becomes of the weights that stay: ``mask`` unless given, or another name from `evoprune list
            compressors`. For one that changes them, levels on a grid are computed before the search and kept.
        granularity: what has a sparsity of its own: every ``matrix``, every ``block``, or every ``kind`` of matrix.
        drop: what may go as a whole: ``none``, the attention and MLP ``parts`` of blocks, or ``blocks``.
        drop_only: drop parts or blocks, and prune nothing else.
        pareto: search a front of quality against this cost, in `Run.front`: ``parameters`` kept, multiply-adds
            (``flops``), or ``latency`` on this machine, which needs something to drop. `sparsity` then says which
            member of the front is the winner.
        sparsity_range: least and most that goes in such a front; 0.4 and 0.7 unless given.
        evaluations: candidates with a forward pass, at most; the allocators that the search starts from are among them.
        minutes: time for the search, at most; how far it gets then depends on the machine.
        population: children of a generation.
        seed: fixes texts A and B and the search: one seed, one history.
        data, calibration, calibration_sequences, calibration_window: see `search_metric`.
        searcher: who breeds: a name from `evoprune list searchers`.
        surrogate: measure the most promising of four proposals for a child, by what earlier generations have shown.
        seed_from: an allocation in a file, or a run that found one, to start from beside the allocators.
        window: candidates that may wait for results; changes no history.
        threads, dtype, device, revision, trust_remote_code, config, settings, run_dir: see `search_metric`.
        executor, workers, gpus_per_worker, address, storage, insecure_cluster, quiet: see `search_metric`.

    Raises:
        InvalidInput, Interrupted, WorkersFailed, NoCapacity: see `search_metric`.
    """
    options = {
        "model": model, "sparsity": sparsity, "metric": as_text(metric), "compressor": compressor,
        "granularity": granularity, "drop": drop, "drop_only": drop_only, "pareto": pareto,
        "sparsity_range": sparsity_range, "evaluations": evaluations, "minutes": minutes, "population": population,
        "seed": seed, "data": data, "calibration": calibration, "calibration_sequences": calibration_sequences,
        "calibration_window": calibration_window, "searcher": searcher, "surrogate": surrogate,
        "seed_from": as_text(seed_from), "window": window,
        "threads": threads, "dtype": dtype, "device": device, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    resolved = allocation_config(options, files=as_files(config), settings=settings)
    resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
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
    insecure_cluster: bool = False,
    quiet: bool = False,
) -> Run:
    """Continue an interrupted run to its end, with the history it would have had without the interruption.

    Args:
        run: a folder, a run's id, or `latest`. A finished run is returned as it is.
        fork: start a new run with the same configuration that reuses the evaluations of this one.
        settings: options of the fork that differ, by dotted key, such as ``{"evaluations": 600}``.
        run_dir: the folder of the fork.
        executor, workers, gpus_per_worker, address, storage, insecure_cluster, quiet: as in `search_metric`; they
            change no history.

    Raises:
        InvalidInput: no such run, another process drives it, or model, data or code changed since.
        Interrupted, WorkersFailed, NoCapacity: see `search_metric`.
    """
    directory = (run if isinstance(run, Run) else Run(run)).directory
    resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
    if fork:
        return Run(fork_run(directory, resources, settings=settings, run_dir=run_dir, quiet=quiet))
    if settings or run_dir is not None:
        raise InvalidInput("a resumed run keeps its options and its folder; fork it to change them")
    return Run(drive(directory, resources, quiet))


def as_files(config: str | Path | Sequence[str | Path]) -> list[Path]:
    """Configuration files, of which one may be given as it is."""
    return [Path(file) for file in ([config] if isinstance(config, (str, Path)) else config)]


def as_text(path: str | Path | None) -> str | None:
    """A path as the configuration has it."""
    return None if path is None else str(path)
