"""Commands about runs: `runs`, `show`, `report`, `export`, `dashboard`."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evoprune.console import Output
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.options import OUTPUT, Json, RunArgument, Storage

if TYPE_CHECKING:
    from evoprune.search.rundir import RunDirectory

FOLLOW_SECONDS = 2.0


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    panel = "Runs"
    app.command("runs", rich_help_panel=panel)(runs)
    app.command("show", rich_help_panel=panel)(show)
    app.command("report", rich_help_panel=panel)(report)
    app.command("export", rich_help_panel=panel)(export)
    app.command("dashboard", rich_help_panel=panel)(dashboard)


def runs(as_json: Json = False) -> None:
    """List the runs in `runs` (or where the variable EVOPRUNE_RUNS says), oldest first."""
    with Output(as_json) as output:
        from evoprune.search.rundir import list_runs, runs_folder
        from evoprune.summaries import run_row

        rows = [run_row(run) for run in list_runs()]
        if as_json:
            output.json(rows)
        elif rows:
            from evoprune.search.tables import runs_table

            output.show(runs_table(rows))
        else:
            output.tell(f"no run in {runs_folder()} yet; `evoprune search metric` makes one")


def show(
    run: RunArgument = "latest",
    follow: Annotated[bool, typer.Option("--follow", help="wait for a running search, and tell how it does")] = False,
    as_json: Json = False,
) -> None:
    """Show a run: its state, its best metric, the baselines, and all of them on held-out text."""
    with Output(as_json) as output:
        from evoprune.search.rundir import RunDirectory
        from evoprune.summaries import run_document

        directory = RunDirectory.open(run)
        if follow:
            _follow(directory, output)
        if as_json:
            output.json(run_document(directory))
            return
        from evoprune.search.tables import result_view, unfinished_view

        result = directory.result
        if result is not None:
            output.show(*result_view(result, directory.path))
        else:
            reasons = Counter(line["reason"] for line in directory.history() if line["reason"])
            failures = [event for event in directory.read_events() if event["event"] == "failed"]
            error = failures[-1].get("error") if directory.state == "failed" else None
            view = unfinished_view(run_document(directory), directory.config, directory.path, reasons, error)
            output.show(*view)


def _follow(run: RunDirectory, output: Output) -> None:
    """Tell about every change until nobody drives the run."""
    from evoprune.search.progress import clock
    from evoprune.summaries import run_document

    before: tuple[Any, ...] = ()
    while run.state == "running":
        document = run_document(run)
        best = document["best"]
        seen = (document["evaluations"], None if best is None else best["expression"])
        if seen != before:
            before = seen
            found = "" if best is None else f"  best {best['fitness']:.5g} {best['expression']}"
            output.tell(f"{clock(document['seconds'])}  {document['evaluations']} evaluations{found}")
        time.sleep(FOLLOW_SECONDS)


def report(run: RunArgument = "latest", as_json: Json = False) -> None:
    """Write RUN/report.html, one self-contained page."""
    with Output(as_json) as output:
        from evoprune.runs import Run

        path = Run(run).report()
        output.json({"report": str(path)}) if as_json else output.line(str(path))


def export(
    to: Annotated[
        Path,
        typer.Option(
            "--to",
            metavar="FILE",
            help=".py (needs torch only), .json, or .tex",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ],
    run: RunArgument = "latest",
    as_json: Json = False,
) -> None:
    """Write the winner of a finished run as a file of its own."""
    with Output(as_json) as output:
        from evoprune.runs import Run

        path = Run(run).export(to)
        output.json({"out": str(path)}) if as_json else output.line(str(path))


def dashboard(
    run: RunArgument = "latest",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="first write the study anew from the history")] = False,
    storage: Storage = None,
    host: Annotated[
        str, typer.Option("--host", help="address to listen at; whoever reaches it can change and delete trials")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="port to listen at")] = 8080,
) -> None:
    """Serve Optuna Dashboard for a run, on this machine only unless told otherwise, until Ctrl-C."""
    with Output() as output:
        from evoprune.search.engine.address import is_loopback
        from evoprune.search.rundir import RunDirectory

        directory = RunDirectory.open(run)
        try:
            from optuna_dashboard import run_server
        except ImportError:
            raise InvalidInput("the dashboard is not installed: pip install 'evoprune[dashboard]'") from None
        journal = directory.path / "optuna.log"
        if rebuild:
            _rebuild(directory, storage)
        if storage is None and not journal.exists():
            raise InvalidInput(f"{directory.path} has no optuna.log yet; --rebuild writes it from the history")
        if not is_loopback(f"{host}:{port}"):
            output.tell(f"warning: --host {host}: whoever reaches it can change and delete trials, without a password")
        output.tell(f"Optuna Dashboard: http://{host}:{port}/dashboard (Ctrl-C ends it)")
        try:
            run_server(storage or str(journal), host=host, port=port)
        except (OSError, OverflowError) as error:
            raise EvopruneError(f"cannot listen at {host}:{port}: {error}; give another --port") from None


def _rebuild(directory: RunDirectory, storage: str | None) -> None:
    """Write the run's studies anew from its history.

    Raises:
        InvalidInput: a search drives the run, or the storage cannot be written.
    """
    from evoprune.search.engine.board import Board
    from evoprune.search.trials import DESCRIPTORS, trial_record

    rungs = len(directory.config["racing"]["rungs"])
    directory.lock()
    try:
        board = Board(directory.path, directory.run_id, storage, descriptors=DESCRIPTORS)
        board.rebuild(record for line in directory.history() if (record := trial_record(line, rungs)) is not None)
        board.close()
    finally:
        directory.close()
