"""Commands that search: `search metric`, `search allocation` and `resume`; the others have files of their own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from evoprune import completion
from evoprune.commands_joint import search_joint
from evoprune.commands_policy import search_policy
from evoprune.commands_structure import search_structure
from evoprune.console import Output
from evoprune.metrics.errors import InvalidInput
from evoprune.options import (
    BUDGET,
    CONFIG,
    SEARCH,
    TARGET,
    Address,
    AllocationSparsity,
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
    KnownStorage,
    MetricCompressor,
    Minutes,
    OptionalModel,
    Pattern,
    Revision,
    RunArgument,
    RunDir,
    SearchCalibrationText,
    SearchCompressor,
    SearchGroup,
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

NOT_LANDED = {
    "experts": "mixture of experts: which stay, and how many are active",
}

ANY_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    search = typer.Typer(help="Search for a better way to prune a model.")
    search.command("metric")(search_metric)
    search.command("allocation")(search_allocation)
    search.command("joint")(search_joint)
    search.command("structure")(search_structure)
    search.command("policy")(search_policy)
    for kind, what in NOT_LANDED.items():
        search.command(kind, help=f"{what[0].upper()}{what[1:]} (not landed yet).", context_settings=ANY_WORDS)(
            _not_landed(kind)
        )
    app.add_typer(search, name="search", rich_help_panel="Searches")
    app.command("resume", rich_help_panel="Searches")(resume)


def _not_landed(kind: str) -> Any:
    def command() -> None:
        raise InvalidInput(
            f"`evoprune search {kind}` has not landed yet; `search metric`, `search allocation`, `search joint`, "
            "`search structure` and `search policy` have"
        )

    return command


def search_metric(
    ctx: typer.Context,
    model: OptionalModel = None,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    group: SearchGroup = None,
    allocation: Annotated[
        str | None,
        option(
            "--allocation",
            metavar="FILE|RUN",
            help="sparsities of the matrices, in place of one: a .json, or a run that left one",
            panel=TARGET,
            autocompletion=completion.runs,
        ),
    ] = None,
    compressor: MetricCompressor = None,
    evaluations: Annotated[
        int | None,
        option(
            "--evaluations",
            metavar="N",
            help="candidates with a forward pass, at most",
            panel=BUDGET,
            default="250, or no limit with --minutes",
        ),
    ] = None,
    minutes: Minutes = None,
    seed: SearchSeed = None,
    population: Annotated[
        int | None, option("--population", metavar="N", help="members over all islands", panel=SEARCH, default=64)
    ] = None,
    searcher: Annotated[
        str | None,
        option(
            "--searcher",
            metavar="NAME",
            help="a name from `evoprune list searchers`",
            panel=SEARCH,
            default="evolution",
            autocompletion=completion.plugins("evoprune.search.searchers"),
        ),
    ] = None,
    objective: Annotated[
        str | None,
        option(
            "--objective",
            metavar="NAME",
            help="a name from `evoprune list objectives`",
            panel=SEARCH,
            default="kl",
            autocompletion=completion.plugins("evoprune.fitness.objectives"),
        ),
    ] = None,
    window: Annotated[
        int | None,
        option(
            "--window", metavar="N", help="births that may wait; part of a run's identity", panel=SEARCH, default=16
        ),
    ] = None,
    seed_from: Annotated[
        str | None,
        option(
            "--seed-from",
            metavar="FILE|RUN",
            help="an exported metric, or a run, to start from",
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
    """Evolve a pruning metric for a model, and compare it with the published ones on held-out text."""
    from evoprune.configuration import KEYS, metric_config

    with Output(as_json) as output:
        options = {name: value for name, value in ctx.params.items() if name in KEYS}
        # A flag that was not given leaves the file its say.
        options["trust_remote_code"] = trust_remote_code or None
        resolved = metric_config(options, files=config or (), assignments=settings or ())
        if dry_run:
            show_config(output, resolved)
            return
        from evoprune.search.worker_session import Resources
        from evoprune.sessions import start

        resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
        finish(output, start(resolved, resources, run_dir=run_dir, argv=command_line(storage)))


def search_allocation(
    ctx: typer.Context,
    model: OptionalModel = None,
    sparsity: AllocationSparsity = None,
    metric: Annotated[
        str | None,
        option(
            "--metric",
            metavar="M",
            help="the criterion inside: a listed one, an expression, or an exported .json or .py",
            panel=TARGET,
            default="wanda",
            autocompletion=completion.plugins("evoprune.metrics.library"),
        ),
    ] = None,
    compressor: SearchCompressor = None,
    granularity: Annotated[
        Literal["matrix", "block", "kind"] | None,
        option("--granularity", help="what has a sparsity of its own", panel=TARGET, default="matrix"),
    ] = None,
    drop: Annotated[
        Literal["none", "parts", "blocks"] | None,
        option(
            "--drop", help="what may go as a whole: attention and MLP parts, or blocks", panel=TARGET, default="none"
        ),
    ] = None,
    drop_only: Annotated[
        bool, typer.Option("--drop-only", help="drop parts or blocks, prune nothing else", rich_help_panel=TARGET)
    ] = False,
    pareto: Annotated[
        Literal["parameters", "flops", "latency"] | None,
        option("--pareto", help="search a front of quality against this cost, by NSGA-II", panel=TARGET),
    ] = None,
    sparsity_range: Annotated[
        tuple[float, float] | None,
        option(
            "--sparsity-range",
            metavar="LOW HIGH",
            help="of a front; --sparsity then says which of it is exported as the allocation",
            panel=TARGET,
            default="0.4 0.7; with --drop-only 0.1 0.5",
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
    searcher: Annotated[
        str | None,
        option(
            "--searcher",
            metavar="NAME",
            help="who breeds them: a name from `evoprune list searchers`",
            panel=SEARCH,
            default="evolution",
            autocompletion=completion.plugins("evoprune.search.breeders"),
        ),
    ] = None,
    seed_from: Annotated[
        str | None,
        option(
            "--seed-from",
            metavar="FILE|RUN",
            help="an allocation (or a formula, for --searcher formula), or a run that found one, to start from",
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
    """Evolve how much each matrix loses, and compare it with the published allocators on held-out text."""
    from evoprune.configuration import ALLOCATION_KEYS, allocation_config

    with Output(as_json) as output:
        options = {name: value for name, value in ctx.params.items() if name in ALLOCATION_KEYS}
        options |= {
            "trust_remote_code": trust_remote_code or None,
            "drop_only": drop_only or None,
            "surrogate": surrogate or None,
        }
        resolved = allocation_config(options, files=config or (), assignments=settings or ())
        if dry_run:
            show_config(output, resolved)
            return
        from evoprune.search.worker_session import Resources
        from evoprune.sessions import start

        if metric is not None and not resolved.target.reads_criterion:
            output.tell(f"{resolved.target.compressor} chooses by itself what goes: only allocators read --metric")
        resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
        finish(output, start(resolved, resources, run_dir=run_dir, argv=command_line(storage)))


def resume(
    run: RunArgument = "latest",
    fork: Annotated[
        bool,
        typer.Option("--fork", help="start a new run that reuses its evaluations", rich_help_panel=CONFIG),
    ] = False,
    settings: Settings = None,
    run_dir: RunDir = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    address: Address = "local",
    insecure_cluster: InsecureCluster = False,
    executor: ExecutorOption = "ray",
    storage: KnownStorage = None,
    as_json: Json = False,
) -> None:
    """Continue an interrupted run; its history will be what it would have been. --set and --run-dir need --fork."""
    with Output(as_json) as output:
        from evoprune.search.rundir import RunDirectory
        from evoprune.search.worker_session import Resources
        from evoprune.sessions import drive, fork_run

        directory = RunDirectory.open(run)
        resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
        if fork:
            argv = command_line(storage)
            directory = fork_run(directory, resources, assignments=settings or (), run_dir=run_dir, argv=argv)
        elif settings or run_dir is not None:
            raise InvalidInput("a resumed run keeps its options and its folder; --fork makes a new run that may differ")
        else:
            drive(directory, resources)
        finish(output, directory)
