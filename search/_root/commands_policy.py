"""The command `search policy`."""

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
    Pattern,
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


def search_policy(
    ctx: typer.Context,
    model: OptionalModel = None,
    sparsity: Annotated[
        float | None,
        option(
            "--sparsity",
            help="fraction of what heads and MLPs cost that goes, in (0, 1)",
            panel=TARGET,
            default="0.3; none with --pattern",
        ),
    ] = None,
    units: Annotated[
        str | None,
        option(
            "--units",
            metavar="KIND,KIND",
            help="what goes as one: kv-group, query-head, neuron, neurons:N in a row, ranked:N by --metric, attention, "
            "mlp, block; or weights, which is experimental, with --pattern",
            panel=TARGET,
            default="kv-group,ranked:32",
        ),
    ] = None,
    pattern: Pattern = None,
    metrics: Annotated[
        str | None,
        option(
            "--metrics",
            metavar="NAME,NAME",
            help="with --pattern, the metrics whose masks each matrix chooses from",
            panel=TARGET,
            default="those without gradients",
        ),
    ] = None,
    cost: Annotated[
        Literal["parameters", "flops"] | None,
        option("--cost", help="what the sparsity is of", panel=TARGET, default="parameters"),
    ] = None,
    budget: Annotated[
        Literal["global", "kind", "block"] | None,
        option(
            "--budget",
            help="what has a budget of its own: all units together, every kind, or every kind in every block",
            panel=TARGET,
            default="global",
        ),
    ] = None,
    drop: Annotated[
        Literal["none", "parts"] | None,
        option("--drop", help="whether attentions and MLPs may go as a whole", panel=TARGET, default="parts"),
    ] = None,
    evaluations: Annotated[
        int | None,
        option(
            "--evaluations",
            metavar="N",
            help="masks with a forward pass, at most",
            panel=BUDGET,
            default="1500, or no limit with --minutes",
        ),
    ] = None,
    minutes: Minutes = None,
    seed: SearchSeed = None,
    population: Annotated[
        str | None, option("--population", metavar="N|auto", help="masks of a step", panel=SEARCH, default=8)
    ] = None,
    searcher: Annotated[
        str | None,
        option(
            "--searcher",
            metavar="NAME",
            help="who moves the policy: a name from `evoprune list learners`",
            panel=SEARCH,
            default="score-function",
            autocompletion=completion.plugins("evoprune.search.learners"),
        ),
    ] = None,
    prior: Annotated[
        str | None,
        option(
            "--metric",
            metavar="NAME",
            help="what the policy starts from: a unit criterion, or a metric (a name, an expression, or a file)",
            panel=SEARCH,
            default="wanda-sp",
        ),
    ] = None,
    objective: Annotated[
        Literal["kl", "ce", "ce-residual"] | None,
        option(
            "--objective",
            help="KL from the dense model, cross entropy, or what of it exceeds the dense model's",
            panel=SEARCH,
            default="kl",
        ),
    ] = None,
    seed_from: Annotated[
        str | None,
        option(
            "--seed-from",
            metavar="FILE|RUN",
            help="a shape, an allocation or a policy, or a run that found one, to start from",
            panel=SEARCH,
            autocompletion=completion.runs,
        ),
    ] = None,
    window: Annotated[
        int | None,
        option("--window", metavar="N", help="masks that may wait for results", panel=SEARCH, default=64),
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
    """Learn which heads, neurons or blocks stay, by policy gradient from forward passes alone."""
    from evoprune.configuration import POLICY_KEYS, policy_config

    with Output(as_json) as output:
        options = {name: value for name, value in ctx.params.items() if name in POLICY_KEYS}
        # A flag that was not given leaves the file its say.
        options |= {"trust_remote_code": trust_remote_code or None}
        resolved = policy_config(options, files=config or (), assignments=settings or ())
        if dry_run:
            show_config(output, resolved)
            return
        from evoprune.search.worker_session import Resources
        from evoprune.sessions import start

        resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
        finish(output, start(resolved, resources, run_dir=run_dir, argv=command_line(storage)))
