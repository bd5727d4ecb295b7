"""The command `search structure`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from evoprune import completion
from evoprune.console import Output
from evoprune.options import (
    BUDGET,
    SEARCH,
    TARGET,
    Address,
    CalibrationSequences,
    CalibrationWindow,
    ConfigFiles,
    Device,
    DryRun,
    Dtype,
    ExecutorOption,
    GpusPerWorker,
    InsecureCluster,
    Json,
    Minutes,
    OptionalModel,
    Revision,
    RunDir,
    SearchCalibrationText,
    SearchSeed,
    SearchText,
    Settings,
    Storage,
    Threads,
    TrustRemoteCode,
    Workers,
    option,
)
from evoprune.search_output import command_line, finish, show_config


def search_structure(
    ctx: typer.Context,
    model: OptionalModel = None,
    sparsity: Annotated[
        float | None,
        option(
            "--sparsity",
            help="fraction of what heads and MLPs cost that goes, in (0, 1)",
            panel=TARGET,
            default="0.25; with --pareto the middle of the range",
        ),
    ] = None,
    cost: Annotated[
        Literal["parameters", "flops", "kv_bytes", "latency"] | None,
        option(
            "--cost",
            help="what is counted: parameters, operations of a forward pass, bytes of the cache for each token, or "
            "time on this machine",
            panel=TARGET,
            default="parameters",
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        option(
            "--speedup",
            metavar="TIMES",
            help="how much faster the whole model gets, in place of --sparsity; measured on this machine",
            panel=TARGET,
        ),
    ] = None,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode",
            help="time is that of a token more behind a full cache, and not that of reading a sequence",
            rich_help_panel=TARGET,
        ),
    ] = False,
    pareto: Annotated[
        Literal["parameters", "flops", "kv_bytes", "latency"] | None,
        option(
            "--pareto",
            help="search a front of quality against this cost, by NSGA-II; latency stands beside parameters",
            panel=TARGET,
        ),
    ] = None,
    sparsity_range: Annotated[
        tuple[float, float] | None,
        option(
            "--sparsity-range",
            metavar="LOW HIGH",
            help="of a front; --sparsity then says which of it is exported as the shape",
            panel=TARGET,
            default="0.1 0.5",
        ),
    ] = None,
    heads: Annotated[
        Literal["whole", "groups", "balanced", "both"] | None,
        option(
            "--heads",
            help="what goes of an attention: nothing but all of it, KV groups, as many heads of each, or both",
            panel=TARGET,
            default="both",
        ),
    ] = None,
    serving_safe: Annotated[
        bool,
        typer.Option(
            "--serving-safe",
            help="neurons in multiples of 256, attentions whole or gone, as serving software takes them",
            rich_help_panel=TARGET,
        ),
    ] = False,
    drop: Annotated[
        Literal["none", "parts"] | None,
        option("--drop", help="whether attentions and MLPs may go as a whole", panel=TARGET, default="parts"),
    ] = None,
    step: Annotated[
        int | None,
        option(
            "--step",
            metavar="N",
            help="neurons that an MLP loses or gains at a time",
            panel=TARGET,
            default="a thirty-second of them",
        ),
    ] = None,
    accumulation: Annotated[
        Literal["dense", "expectation", "path"] | None,
        option(
            "--accumulation",
            help="what calibration text has gone through when it reaches a block: dense blocks, a mixture of cut ones, "
            "or after a first round blocks cut as the best so far",
            panel=TARGET,
            default="expectation",
        ),
    ] = None,
    evaluations: Annotated[
        int | None,
        option(
            "--evaluations",
            metavar="N",
            help="candidates with a forward pass, at most",
            panel=BUDGET,
            default="500, or no limit with --minutes",
        ),
    ] = None,
    minutes: Minutes = None,
    seed: SearchSeed = None,
    population: Annotated[
        int | None, option("--population", metavar="N", help="children of a generation", panel=SEARCH, default=32)
    ] = None,
    surrogate: Annotated[
        bool,
        typer.Option(
            "--surrogate",
            help="measure the most promising of four proposals, by what earlier generations have shown",
            rich_help_panel=SEARCH,
        ),
    ] = False,
    selection: Annotated[
        Literal["one-shot", "path-refit", "training-aware"] | None,
        option(
            "--selection",
            help="how the last stage measures: as the database leaves a candidate, after a refit along its own path, "
            "or after a short training",
            panel=SEARCH,
            default="one-shot",
        ),
    ] = None,
    training_tokens: Annotated[
        int | None,
        option(
            "--training-tokens",
            metavar="N",
            help="that training-aware selection trains each candidate on",
            panel=SEARCH,
            default=51_200,
        ),
    ] = None,
    seed_from: Annotated[
        str | None,
        option(
            "--seed-from",
            metavar="FILE|RUN",
            help="a shape, or a run that found one, to start from",
            panel=SEARCH,
            autocompletion=completion.runs,
        ),
    ] = None,
    window: Annotated[
        int | None,
        option("--window", metavar="N", help="candidates that may wait for results", panel=SEARCH, default=64),
    ] = None,
    data: SearchText = None,
    calibration: SearchCalibrationText = None,
    calibration_sequences: CalibrationSequences = None,
    calibration_window: CalibrationWindow = None,
    dtype: Dtype = None,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    address: Address = "local",
    insecure_cluster: InsecureCluster = False,
    executor: ExecutorOption = "ray",
    threads: Threads = None,
    storage: Storage = None,
    config: ConfigFiles = None,
    settings: Settings = None,
    dry_run: DryRun = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Evolve how many heads and neurons every block keeps, and compare it with published methods on held-out text."""
    from evoprune.configuration import STRUCTURE_KEYS, structure_config

    with Output(as_json) as output:
        options = {name: value for name, value in ctx.params.items() if name in STRUCTURE_KEYS}
        # A flag that was not given leaves the file its say.
        options |= {
            "trust_remote_code": trust_remote_code or None,
            "surrogate": surrogate or None,
            "decode": decode or None,
            "serving_safe": serving_safe or None,
        }
        resolved = structure_config(options, files=config or (), assignments=settings or ())
        if dry_run:
            show_config(output, resolved)
            return
        from evoprune.search.worker_session import Resources
        from evoprune.sessions import start

        resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
        finish(output, start(resolved, resources, run_dir=run_dir, argv=command_line(storage)))
