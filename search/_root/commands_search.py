"""Commands that search: `search metric` and `resume`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evoprune import completion
from evoprune.console import Output
from evoprune.metrics.errors import InvalidInput
from evoprune.options import (
    BUDGET,
    CONFIG,
    SEARCH,
    TEXT,
    WORKERS,
    Address,
    CalibrationSequences,
    CalibrationWindow,
    Device,
    Dtype,
    ExecutorOption,
    GpusPerWorker,
    InsecureCluster,
    Json,
    OptionalModel,
    Pattern,
    Revision,
    RunArgument,
    RunDir,
    SearchCalibrationText,
    SearchGroup,
    Settings,
    Sparsity,
    Storage,
    TrustRemoteCode,
    Workers,
    option,
)

if TYPE_CHECKING:
    from evoprune.search.rundir import RunDirectory

NOT_LANDED = {
    "allocation": "evolve per-layer sparsity or depth",
    "structure": "evolve structured shapes: heads, KV groups, neurons, blocks",
    "policy": "learn Bernoulli mask policies by policy gradient",
    "experts": "mixture of experts: which stay, and how many are active",
}

ANY_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    search = typer.Typer(help="Search for a better way to prune a model.")
    search.command("metric")(search_metric)
    for kind, what in NOT_LANDED.items():
        anything = {"allow_extra_args": True, "ignore_unknown_options": True}
        search.command(kind, help=f"{what[0].upper()}{what[1:]} (not landed yet).", context_settings=anything)(
            _not_landed(kind)
        )
    app.add_typer(search, name="search", rich_help_panel="Searches")
    app.command("resume", rich_help_panel="Searches")(resume)


def _not_landed(kind: str) -> Any:
    def command() -> None:
        raise InvalidInput(f"`evoprune search {kind}` has not landed yet; `evoprune search metric` has")

    return command


def search_metric(
    ctx: typer.Context,
    model: OptionalModel = None,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    group: SearchGroup = None,
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
    minutes: Annotated[
        float | None,
        option("--minutes", metavar="X", help="time for the search, at most", panel=BUDGET, default="no limit"),
    ] = None,
    seed: Annotated[
        int | None, option("--seed", metavar="N", help="fixes the text and the search", panel=SEARCH, default=0)
    ] = None,
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
    data: Annotated[
        str | None,
        option(
            "--data",
            metavar="TEXT",
            help="a file, a folder, or a data set: fitness (side B) and report (side C)",
            panel=TEXT,
            default="corpus, embedded",
        ),
    ] = None,
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
    threads: Annotated[
        int | None,
        option("--threads", metavar="N", help="of a worker; part of a run's identity", panel=WORKERS, default=1),
    ] = None,
    storage: Storage = None,
    config: Annotated[
        list[Path] | None,
        option("--config", metavar="FILE.yaml", help="options from a file; repeatable", panel=CONFIG),
    ] = None,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved configuration and stop", rich_help_panel=CONFIG)
    ] = False,
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
            plain = resolved.model_dump(mode="json")
            output.json(plain) if as_json else output.line(_yaml(plain))
            return
        from evoprune.search.search_run import Resources
        from evoprune.sessions import start

        resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
        _finish(output, start(resolved, resources, run_dir=run_dir, argv=_command_line(storage)))


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
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Continue an interrupted run; its history will be what it would have been. --set and --run-dir need --fork."""
    with Output(as_json) as output:
        from evoprune.search.rundir import RunDirectory
        from evoprune.search.search_run import Resources
        from evoprune.sessions import drive, fork_run

        directory = RunDirectory.open(run)
        resources = Resources(executor, workers, gpus_per_worker, address, storage, insecure_cluster)
        if fork:
            argv = _command_line(storage)
            directory = fork_run(directory, resources, assignments=settings or (), run_dir=run_dir, argv=argv)
        elif settings or run_dir is not None:
            raise InvalidInput("a resumed run keeps its options and its folder; --fork makes a new run that may differ")
        else:
            drive(directory, resources)
        _finish(output, directory)


def _command_line(storage: str | None) -> list[str]:
    """The words of this command, for the run's record, without the password in `storage`."""
    from evoprune.search.engine.board_storage import without_password

    return ["evoprune", *(without_password(word, storage) for word in sys.argv[1:])]


def _finish(output: Output, run: RunDirectory) -> None:
    """Print what a search found: the table to stderr, its folder to stdout."""
    from evoprune.search.tables import result_view
    from evoprune.summaries import run_document

    result = run.result
    if output.as_json or result is None:
        output.json(run_document(run))
    else:
        output.tell(*result_view(result, run.path))
        output.line(str(run.path))


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, allow_unicode=True).rstrip()
