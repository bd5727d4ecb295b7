"""Joint searches in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evoprune.configuration import joint_config
from evoprune.runs import Run
from evoprune.search.worker_session import Resources
from evoprune.searches import as_files, as_text
from evoprune.sessions import start

__all__ = ["search_joint"]


def search_joint(
    model: str | None = None,
    *,
    sparsity: float | None = None,
    granularity: Literal["matrix", "block", "kind"] | None = None,
    compressor: str | None = None,
    rounds: int | None = None,
    evaluations: int | None = None,
    metric_share: float | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    data: str | None = None,
    calibration: str | None = None,
    calibration_sequences: int | None = None,
    calibration_window: int | None = None,
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
    """Evolve a metric and an allocation in turn and return the finished run: `search_metric` for both together.

    Round 1 searches a metric at uniform sparsity, then an allocation for that metric; each later round a metric at the
    last allocation, from the last metric, and an allocation for it, from the last allocation. Each of these steps is a
    run of its own in ``steps`` of the run's folder. The winner is the pair of the round with the least KL on text B.

    Args:
        model: see `search_metric`.
        sparsity: fraction of all prunable weights to remove, in (0, 1); 0.6 unless given.
        granularity: see `search_allocation`.
        compressor: of all searches, see `search_metric`; allocations then have the levels of `search_allocation`.
        rounds: of a metric search, then an allocation search.
        evaluations: candidates with a forward pass in all rounds, at most; every round gets the same.
        metric_share: of the evaluations and minutes that metric searches get; allocation searches get the rest.
        minutes: time for all searches, at most, shared out likewise; how far they get then depends on the machine.
        seed: fixes texts A and B and the searches: one seed, one history.
        data, calibration, calibration_sequences, calibration_window: see `search_metric`.
        seed_from: an exported metric, or a run of metrics, that round 1 starts from.
        window: births of a metric search that may wait for results; a part of the run's identity.
        threads, dtype, device, revision, trust_remote_code, config, settings, run_dir: see `search_metric`. The options
            of both searches are below ``metric`` and ``allocation``, such as ``{"metric.searcher.islands": 2}``.
        executor, workers, gpus_per_worker, address, storage, insecure_cluster, quiet: see `search_metric`.

    Raises:
        InvalidInput, Interrupted, WorkersFailed, NoCapacity: see `search_metric`.
    """
    options = {
        "model": model, "sparsity": sparsity, "granularity": granularity, "compressor": compressor, "rounds": rounds,
        "evaluations": evaluations, "metric_share": metric_share, "minutes": minutes, "seed": seed, "data": data,
        "calibration": calibration, "calibration_sequences": calibration_sequences,
        "calibration_window": calibration_window, "seed_from": as_text(seed_from), "window": window,
        "threads": threads, "dtype": dtype, "device": device, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    resolved = joint_config(options, files=as_files(config), settings=settings)
    resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
    return Run(start(resolved, resources, run_dir=run_dir, quiet=quiet))
