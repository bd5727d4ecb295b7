"""The command line: its commands, and what becomes of their errors: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from evoprune import commands_about, commands_model, commands_runs, commands_search
from evoprune.metrics.errors import EvopruneError, Interrupted
from evoprune.search.signals import STOPPED, stop_if_insisted


class InOrder(TyperGroup):
    """Lists commands from the one that is needed first; typer would list groups after all others."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


ORDER = [
    "search", "resume", "runs", "show", "report", "export", "dashboard", "prune", "eval", "stats", "list", "doctor",
]  # fmt: skip

app = typer.Typer(
    name="evoprune",
    cls=InOrder,
    help="Search for the best way to prune a neural network.",
    epilog="Results go to stdout, all else to stderr. Exit codes: 0 done, 2 bad input, 3 no worker starts, "
    "4 an audit found results that differ, 75 stopped but resumable, 130 interrupted, 1 anything else.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
commands_search.register(app)
commands_runs.register(app)
commands_model.register(app)
commands_about.register(app)

BAD_INPUT = 2
# What typer makes of a KeyboardInterrupt.
INTERRUPTED = 130
# What a disk says when it is the user's to mend.
_DISK = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG)
_WANTED = "it needs a writable folder with room in it"
# What it says of a name that leads nowhere.
_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)


def _print_version(wanted: bool) -> None:
    if wanted:
        import evoprune

        typer.echo(f"evoprune {evoprune.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="print tracebacks of errors")] = False,
) -> None:
    """Search for the best way to prune a neural network."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that `words` spell, by default those of the process.

    Returns:
        The exit code.

    Raises:
        KeyboardInterrupt: a signal came, and something made an error of its own of it.
    """
    given = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in given
    try:
        # Without standalone mode typer raises what it would print in a box of many lines.
        returned = typer.main.get_command(app)(
            [word for word in given if word != "--debug"], prog_name="evoprune", standalone_mode=False
        )
        sys.stdout.flush()
        if returned == INTERRUPTED:
            raise Interrupted(STOPPED)
        return returned if isinstance(returned, int) else 0
    except BrokenPipeError:
        # Who read our output has had enough; Python would complain about it once more on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not isinstance(error, Interrupted):
            stop_if_insisted()
        if debug:
            traceback.print_exc()
        message, code = explain(error)
        sys.stderr.write(f"{'interrupted' if isinstance(error, Interrupted) else 'error'}: {message}\n")
        return code


def explain(error: Exception) -> tuple[str, int]:
    """(one line for people, exit code) of whatever a command raised."""
    if isinstance(error, EvopruneError):
        return one_line(str(error)), error.exit_code
    usage = getattr(error, "format_message", None)
    if usage is not None:
        path = getattr(getattr(error, "ctx", None), "command_path", "evoprune")
        said = one_line(usage()).rstrip(".").replace("Value error, ", "")
        return f"{said}; `{path} --help` shows what there is", BAD_INPUT
    told = re.search(r"([^:]+) \(os error (\d+)\)", str(error))
    if told is not None and int(told[2]) in _DISK:  # libraries written in Rust say it in these words only
        return f"cannot write: {told[1].strip().lower()} ({_WANTED})", BAD_INPUT
    if isinstance(error, OSError) and error.errno in _DISK:
        what = f" {error.filename}" if error.filename else ""
        return (
            f"cannot write{what}: {str(error.strerror).lower()} (it needs a writable folder with room in it)",
            BAD_INPUT,
        )
    if isinstance(error, OSError) and error.errno in _NAMES:
        return f"{str(error.filename)[:80]!r} is no place for a file: {str(error.strerror).lower()}", BAD_INPUT
    text = one_line(str(error))
    return f"{type(error).__name__}{': ' if text else ''}{text} (--debug shows where)", 1


def one_line(text: str) -> str:
    """A message on one line; of a traceback its last line."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if any("Traceback (most recent call last)" in line for line in lines):
        return f"{lines[0].partition(': Traceback')[0]}: {lines[-1]}"
    return " ".join(lines)
