"""The command `search joint`."""

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
    MetricCompressor,
    Minutes,
    OptionalModel,
    Revision,
    RunDir,
    SearchCalibrationText,
    SearchSeed,
    SearchText,
    Settings,
    Sparsity,
    Storage,
    Threads,
    TrustRemoteCode,
    Workers,
    option,
)
from evoprune.search_output import command_line, finish, show_config


def search_joint(
    ctx: typer.Context,
    model: OptionalModel = None,
    sparsity: Sparsity = None,
    granularity: Annotated[
        Literal["matrix", "block", "kind"] | None,
        option("--granularity", help="what has a sparsity of its own", panel=TARGET, default="matrix"),
    ] = None,
    compressor: MetricCompressor = None,
    rounds: Annotated[
        int | None,
        option(
            "--rounds",
            metavar="N",
            help="of a metric search, then an allocation search, each at what the other found",
            panel=BUDGET,
            default=2,
        ),
    ] = None,
    evaluations: Annotated[
        int | None,
        option(
            "--evaluations",
            metavar="N",
            help="candidates with a forward pass in all rounds, at most, the same in each",
            panel=BUDGET,
            default="1000, or no limit with --minutes",
        ),
    ] = None,
    metric_share: Annotated[
        float | None,
        option(
            "--metric-share",
            metavar="X",
            help="of the evaluations and minutes that metrics get; allocations get the rest",
            panel=BUDGET,
            default=0.4,
        ),
    ] = None,
    minutes: Minutes = None,
    seed: SearchSeed = None,
    window: Annotated[
        int | None,
        option(
            "--window",
            metavar="N",
            help="births of a metric search that may wait; part of a run's identity",
            panel=SEARCH,
            default=16,
        ),
    ] = None,
    seed_from: Annotated[
        str | None,
        option(
            "--seed-from",
            metavar="FILE|RUN",
            help="an exported metric, or a run of such, to start from",
            panel=SEARCH,
            autocompletion=completion.runs,
        ),
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
    """Evolve a metric and how much each matrix loses, in turn, and compare each half and both on held-out text."""
    from evoprune.configuration import JOINT_KEYS, joint_config

    with Output(as_json) as output:
        options = {name: value for name, value in ctx.params.items() if name in JOINT_KEYS}
        # A flag that was not given leaves the file its say.
        options["trust_remote_code"] = trust_remote_code or None
        resolved = joint_config(options, files=config or (), assignments=settings or ())
        if dry_run:
            show_config(output, resolved)
            return
        from evoprune.search.worker_session import Resources
        from evoprune.sessions import start

        resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
        finish(output, start(resolved, resources, run_dir=run_dir, argv=command_line(storage)))
