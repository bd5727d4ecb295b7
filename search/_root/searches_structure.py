"""Structure searches in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evoprune.configuration import structure_config
from evoprune.runs import Run
from evoprune.search.worker_session import Resources
from evoprune.searches import as_files, as_text
from evoprune.sessions import start

__all__ = ["search_structure"]


def search_structure(
    model: str | None = None,
    *,
    sparsity: float | None = None,
    cost: Literal["parameters", "flops", "kv_bytes", "latency"] | None = None,
    speedup: float | None = None,
    decode: bool | None = None,
    pareto: Literal["parameters", "flops", "kv_bytes", "latency"] | None = None,
    sparsity_range: tuple[float, float] | None = None,
    heads: Literal["whole", "groups", "balanced", "both"] | None = None,
    serving_safe: bool | None = None,
    drop: Literal["none", "parts"] | None = None,
    step: int | None = None,
    accumulation: Literal["dense", "expectation", "path"] | None = None,
    evaluations: int | None = None,
    minutes: float | None = None,
    population: int | None = None,
    surrogate: bool | None = None,
    selection: Literal["one-shot", "path-refit", "training-aware"] | None = None,
    training_tokens: int | None = None,
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
    """Evolve how many heads and neurons every block keeps and return the finished run.

    Args:
        model: see `search_metric`.
        sparsity: fraction of what the heads and MLPs of all blocks cost that goes, in (0, 1); 0.25 unless given.
        cost: what is counted: parameters, operations of a forward pass, bytes of keys and values for each token, or
            the time of a forward pass on the machine of the search (``latency``).
        speedup: how many times faster the whole model gets, in place of `sparsity`; above 1, of the cost ``latency``.
        decode: the time is that of a token more behind a full cache, and not that of reading a sequence.
        pareto: search a front of quality against this cost, in `Run.front`, in place of one shape; ``latency`` is a
            third axis beside parameters, and `decode` says of what pass.
        sparsity_range: of a front, the least and the most that goes of the cost (of the parameters beside latency);
            `sparsity` then says which of it is exported as the shape. 0.1 and 0.5 unless given.
        heads: what goes of an attention: nothing but all of it (``whole``), KV groups, as many query heads of every
            group (``balanced``), or both.
        serving_safe: only shapes that serving software with a width for each MLP can take: numbers of neurons are
            multiples of 256, attentions stay whole or go.
        drop: whether attentions and MLPs may go as a whole (``parts``).
        step: neurons that an MLP loses or gains at a time.
        accumulation: what calibration text has gone through when it reaches a block: ``dense`` blocks, the
            ``expectation`` over cut ones, or this first and then, every few generations, blocks along the ``path`` that
            the best so far has cut.
        evaluations: candidates with a forward pass, at most.
        minutes: time for the search, at most; how far it gets then depends on the machine.
        population: children of a generation.
        surrogate: see `search_allocation`.
        selection: how seeds, the last stage and the finals measure candidates: as the database leaves them
            (``one-shot``); after all output matrices are refitted to what the candidate itself gives them
            (``path-refit``, which the exported shape then asks for); or after a short training, which is thrown away
            (``training-aware``).
        training_tokens: of text A that each of these candidates is trained on.
        seed: fixes texts A and B and the search: one seed, one history.
        data, calibration, calibration_sequences, calibration_window: see `search_metric`.
        seed_from: a ``shape.json``, or a run that left one, to start from.
        window: candidates that may wait for results; changes no history.
        threads, dtype, device, revision, trust_remote_code, config, settings, run_dir: see `search_metric`.
        executor, workers, gpus_per_worker, address, storage, insecure_cluster, quiet: see `search_metric`.

    Raises:
        InvalidInput, Interrupted, WorkersFailed, NoCapacity: see `search_metric`.
    """
    options = {
        "model": model, "sparsity": sparsity, "cost": cost, "speedup": speedup,
        "decode": decode, "pareto": pareto, "sparsity_range": sparsity_range, "heads": heads,
        "serving_safe": serving_safe, "drop": drop,
        "step": step,
        "accumulation": accumulation, "evaluations": evaluations, "minutes": minutes, "population": population,
        "surrogate": surrogate, "selection": selection, "training_tokens": training_tokens,
        "seed": seed, "data": data, "calibration": calibration,
        "calibration_sequences": calibration_sequences, "calibration_window": calibration_window,
        "seed_from": as_text(seed_from), "window": window, "threads": threads, "dtype": dtype, "device": device,
        "revision": revision, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    resolved = structure_config(options, files=as_files(config), settings=settings)
    resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
    return Run(start(resolved, resources, run_dir=run_dir, quiet=quiet))
