"""Commands about runs: `runs`, `show`, `report`, `export`, `dashboard`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evoprune.console import Output
from evoprune.metrics.errors import InvalidInput
from evoprune.options import OUTPUT, Json, KnownStorage, RunArgument

if TYPE_CHECKING:
    from evoprune.search.rundir import RunDirectory


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
    follow: Annotated[
        bool, typer.Option("--follow", help="first watch a running search to its end; Ctrl-C leaves it alone")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a run: its state, its best candidate, the baselines, and all of them on held-out text."""
    with Output(as_json) as output:
        from evoprune.search.rundir import RunDirectory
        from evoprune.summaries import run_document

        directory = RunDirectory.open(run)
        if follow:
            from evoprune.following import follow as watch

            watch(directory)
        if as_json:
            output.json(run_document(directory))
            return
        from evoprune.search.kinds import config_of, kind_of
        from evoprune.search.tables import unfinished_view

        result = directory.result
        if result is not None:
            output.show(*kind_of(directory.kind).result_view(result, directory.path))
        else:
            failures = [event for event in directory.read_events() if event["event"] == "failed"]
            error = failures[-1].get("error") if directory.state == "failed" else None
            history = list(directory.history())
            config = config_of(directory)
            view = unfinished_view(run_document(directory), config, directory.path, history, error)
            output.show(*view)


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
            help="a metric: .py (needs torch only), .json, or .tex; an allocation: .json, .txt for EvoPress, or .py of "
            "a formula; of a joint search, allocation*.json is the allocation and any other .json the metric",
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
    storage: KnownStorage = None,
    host: Annotated[str, typer.Option("--host", metavar="H", help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="port to listen at")] = 8080,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="let other machines in: there is no password, and who reaches it can delete the study"
        ),
    ] = False,
) -> None:
    """Serve Optuna Dashboard for a run, on this machine only unless told otherwise, until Ctrl-C."""
    with Output() as output:
        from evoprune.search.engine.address import is_loopback
        from evoprune.search.engine.board_server import check_installed, serve
        from evoprune.search.kinds import board_kind_of
        from evoprune.search.rundir import RunDirectory

        directory = RunDirectory.open(run)
        board_kind_of(directory)
        check_installed()
        exposed = not is_loopback(host)
        if exposed and not insecure:
            raise InvalidInput(
                f"--host {host} can be reached from other machines, and Optuna Dashboard asks nobody for a password: "
                "whoever reaches it reads, changes and deletes the study; forward the port by ssh, or add --insecure"
            )
        url = storage or _known_storage(directory)
        if rebuild:
            from evoprune.search.publishing import rebuild_board

            rebuild_board(directory, url)
        if url is None and not (directory.path / "optuna.log").exists():
            raise InvalidInput(f"{directory.path} has no optuna.log yet; --rebuild writes it from the history")
        if exposed:
            output.tell(f"warning: everyone who reaches {host}:{port} can read, change and delete the study")
        output.tell(f"Optuna Dashboard: http://{host}:{port}/dashboard (Ctrl-C ends it)")
        serve(directory.path, url, host, port)


def _known_storage(run: RunDirectory) -> str | None:
    """The database that the run's board is in, None for its own file.

    Raises:
        InvalidInput: it takes a password, which no run folder has.
    """
    from evoprune.search.engine.board_storage import lacks_password

    url = run.storage
    if url is not None and lacks_password(url):
        raise InvalidInput(f"the study of this run is in {url}: give --storage with the password")
    return url
