"""Policy searches in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evoprune.configuration import policy_config
from evoprune.runs import Run
from evoprune.search.worker_session import Resources
from evoprune.searches import as_files, as_text
from evoprune.sessions import start

__all__ = ["search_policy"]


def search_policy(
    model: str | None = None,
    *,
    sparsity: float | None = None,
    units: Sequence[str] | str | None = None,
    pattern: str | None = None,
    metrics: Sequence[str] | str | None = None,
    cost: Literal["parameters", "flops"] | None = None,
    budget: Literal["global", "kind", "block"] | None = None,
    drop: Literal["none", "parts"] | None = None,
    evaluations: int | None = None,
    minutes: float | None = None,
    population: int | Literal["auto"] | None = None,
    searcher: str | None = None,
    metric: str | Path | None = None,
    objective: Literal["kl", "ce", "ce-residual"] | None = None,
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
    """Learn which heads, neurons or blocks stay, by policy gradient, and return the finished run.

    Args:
        model: see `search_metric`.
        sparsity: fraction of what the heads and MLPs of all blocks cost that goes, in (0, 1); 0.3 unless given.
        units: what goes as one: ``kv-group``, ``query-head``, ``neuron``, ``neurons:N`` (blocks of N neurons),
            ``attention``, ``mlp`` or ``block``, several if they do not overlap; ``weights`` with a pattern.
        pattern: ``N:M``, in place of `sparsity` and `units`: learned is which metric masks each matrix.
        metrics: with a pattern, those to choose from.
        cost: what the sparsity is of.
        budget: what has a budget of its own: all units together by their costs (``global``), every ``kind``, or every
            kind in every ``block``, these by number.
        drop: whether a block may lose all units of a kind (``parts``).
        evaluations: masks with a forward pass, at most.
        minutes: time for the search, at most; how far it gets then depends on the machine.
        population: masks of a step.
        searcher: who moves the policy: a name from `evoprune list learners`; its options are
            ``settings={"searcher.options.NAME": ...}``.
        metric: what the policy starts from: a unit criterion or a metric.
        objective: what masks are compared by.
        seed: fixes texts A and B and the search: one seed, one history.
        data, calibration, calibration_sequences, calibration_window: see `search_metric`.
        seed_from: a shape, an allocation or a policy in a file, or a run that left one, to start from.
        window: masks that may wait for results; changes no history.
        threads, dtype, device, revision, trust_remote_code, config, settings, run_dir: see `search_metric`.
        executor, workers, gpus_per_worker, address, storage, insecure_cluster, quiet: see `search_metric`.

    Raises:
        InvalidInput, Interrupted, WorkersFailed, NoCapacity: see `search_metric`.
    """
    options = {
        "model": model, "sparsity": sparsity, "units": units, "pattern": pattern, "metrics": metrics, "cost": cost,
        "budget": budget, "drop": drop, "evaluations": evaluations, "minutes": minutes, "population": population,
        "searcher": searcher, "prior": as_text(metric), "objective": objective, "seed": seed, "data": data,
        "calibration": calibration, "calibration_sequences": calibration_sequences,
        "calibration_window": calibration_window, "seed_from": as_text(seed_from), "window": window,
        "threads": threads, "dtype": dtype, "device": device, "revision": revision,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    resolved = policy_config(options, files=as_files(config), settings=settings)
    resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
    return Run(start(resolved, resources, run_dir=run_dir, quiet=quiet))
