"""Where things are printed: results to stdout, everything meant for people on the way there to stderr."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 10.0
"""Between two plain lines, and before the first: what takes less needs none."""


class Output:
    """The two streams of a command, as a context manager.

    Inside the block `sys.stdout` leads to stderr, so that no library can print between the results.

    Args:
        as_json: results are one JSON document; what would be printed for people is left out.
    """

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._stdout: TextIO = sys.stdout
        self._progress = StepProgress()

    def __enter__(self) -> Output:
        self._stdout, sys.stdout = sys.stdout, sys.stderr
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._stdout.flush()
        sys.stdout = self._stdout

    def step(self, what: str, done: int, total: int) -> None:
        """Show how far something is; see `StepProgress`."""
        self._progress.step(what, done, total)

    def json(self, document: Any) -> None:
        """Print a result as JSON."""
        self._stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def line(self, text: str) -> None:
        """Print a result as plain text."""
        self._stdout.write(f"{text}\n")

    def show(self, *renderables: RenderableType) -> None:
        """Print a result that is a table."""
        _print(self._stdout, renderables)

    def tell(self, *renderables: RenderableType) -> None:
        """Print something for people to stderr."""
        self._progress.stop()
        _print(sys.stderr, renderables)


class StepProgress:
    """Shows steps on stderr, one after another: as bars on a terminal, else as a line every few seconds."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._last_line: float | None = None
        self._said = ""

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total` parts of `what` are finished."""
        begins, self._what = what != self._what, what
        if sys.stderr.isatty():
            self._draw(what, done, total, begins)
            return
        now = time.monotonic()
        if self._last_line is None:
            self._last_line = now
        elif now - self._last_line > PLAIN_SECONDS:
            line = f"{what}{f': {done} of {total}' if total > 1 else ''}\n"
            if line != self._said:
                self._last_line, self._said = now, line
                sys.stderr.write(line)
                sys.stderr.flush()

    def stop(self) -> None:
        """Leave the bars as they are."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _draw(self, what: str, done: int, total: int, begins: bool) -> None:
        if self._bar is None:
            self._bar = _bars()
            self._bar.start()
            begins = True
        if begins or self._task is None:
            if self._task is not None:  # the step before it ended without saying so
                self._bar.update(self._task, completed=self._bar.tasks[self._task].total)
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=done, total=total)


def _bars() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=_console(sys.stderr),
    )


def _print(stream: TextIO, renderables: tuple[RenderableType, ...]) -> None:
    from rich.text import Text

    console = _console(stream)
    for renderable in renderables:
        # A line of text stays one line, so that commands and paths can be copied.
        console.print(renderable, soft_wrap=isinstance(renderable, (str, Text)))


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    # Names in brackets, such as [out, in], are text and no styles.
    return Console(file=stream, highlight=False, markup=False, emoji=False)
