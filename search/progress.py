"""Live progress on a terminal; the same as plain lines, every few seconds, in a log file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0
"""Between two plain lines, at first: a log of a day is none of eight thousand lines."""
PLAIN_SHARE = 60
"""A plain line says at most one part in so many of the whole time: after an hour there is one a minute."""
PLAIN_LONGEST = 300.0
RATE_SECONDS = 60.0
"""The span over which the rate is taken: long enough to be steady, short enough to be true."""
BAR_WIDTH = 36


class Progress:
    """Shows how a search is doing, as a context manager.

    Args:
        total_evaluations: the budget, or None.
        minutes: the budget in minutes, counted from `clock_starts`, or None.
        stream: where to; a terminal gets a live display, anything else gets lines.
        title: what is running.
        done: evaluations of earlier sessions of a resumed run: part of the count, not of the rate.
        elapsed: seconds that passed before: part of the time shown, not of the budget.
    """

    def __init__(
        self,
        total_evaluations: int | None = None,
        minutes: float | None = None,
        stream: TextIO | None = None,
        *,
        title: str = "",
        done: int = 0,
        elapsed: float = 0.0,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._total = total_evaluations
        self._seconds = None if minutes is None else 60 * minutes
        self._title = title
        self._phase = "starting"
        self._evaluations = done
        self._best: float | None = None
        self._expression = ""
        self._counters: dict[str, int | str] = {}
        self._before = elapsed
        self._begin = time.monotonic()
        self._part = ""
        self._done_before = 0
        self._spent_before = 0.0
        self._clock: float | None = None  # when the budget in minutes began, as if there had been no interruption
        self._samples: deque[tuple[float, int]] = deque()
        self._last_line = 0.0
        self._live: Live | None = None
        self._console = Console(file=self._stream, highlight=False)
        self._spinner = Spinner("dots", style="cyan")

    def __enter__(self) -> Progress:
        self._begin = time.monotonic()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=5,
                redirect_stdout=False,
                redirect_stderr=self._stream is sys.stderr,
            )
            self._live.start()
        elif self._title:
            self._print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()  # draws the last state and leaves it there
            self._live = None
        elif self._evaluations:
            self._print(self._plain())

    def begin_part(self, name: str, done: int, spent: float) -> None:
        """A part of the whole begins, which tells only of itself.

        Args:
            name: shown before its phases.
            done: evaluations of the parts before.
            spent: seconds of the budget in minutes that they took.
        """
        self._part, self._done_before, self._spent_before = name, done, spent

    def phase(self, text: str) -> None:
        """Say what is going on from now on."""
        text = f"{self._part}: {text}" if self._part else text
        changed = text != self._phase
        self._phase = text
        if changed and self._live is None:
            self._print(text)
            self._last_line = time.monotonic()

    def clock_starts(self, spent: float = 0.0) -> None:
        """The budget in minutes counts from now on, `spent` seconds of it being gone already."""
        self._clock = time.monotonic() - spent - self._spent_before

    def update(
        self,
        evaluations: int | None = None,
        *,
        best: float | None = None,
        expression: str | None = None,
        counters: Mapping[str, int | str] | None = None,
    ) -> None:
        """Tell what has changed; what is not given stays.

        Args:
            evaluations: how many candidates have been evaluated so far, all together.
            best: the best fitness so far.
            expression: its candidate.
            counters: further numbers to show, in this order.
        """
        now = time.monotonic()
        if evaluations is not None:
            self._evaluations = self._done_before + evaluations
            self._sample(now)
        self._best = self._best if best is None else best
        self._expression = self._expression if expression is None else expression
        self._counters = self._counters if counters is None else dict(counters)
        pause = min(max(PLAIN_SECONDS, (now - self._begin) / PLAIN_SHARE), PLAIN_LONGEST)
        if self._live is None and now - self._last_line >= pause:
            self._last_line = now
            self._print(self._plain())

    def line(self, text: str) -> None:
        """Print a line that stays, above the live display if there is one."""
        self._print(text)

    @property
    def evaluations(self) -> int:
        """How many candidates have been evaluated, all together."""
        return self._evaluations

    @property
    def rate(self) -> float | None:
        """Evaluations per second of late, or None while that cannot be said."""
        if len(self._samples) < 2:
            return None
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - start) if end - start > 0.5 and after > before else None

    @property
    def seconds_left(self) -> float | None:
        """The time until the first budget is spent, or None while that cannot be said."""
        left = []
        if self._total is not None and self.rate:
            left.append(max(0, self._total - self._evaluations) / self.rate)
        if self._seconds is not None and self._clock is not None:
            left.append(max(0.0, self._seconds - (time.monotonic() - self._clock)))
        return min(left) if left else None

    @property
    def fraction(self) -> float:
        """How much of the budget is spent, by the measure that is further on."""
        parts = [0.0]
        if self._total:
            parts.append(self._evaluations / self._total)
        if self._seconds and self._clock is not None:
            parts.append((time.monotonic() - self._clock) / self._seconds)
        return min(1.0, max(parts))

    def _sample(self, now: float) -> None:
        self._samples.append((now, self._evaluations))
        while len(self._samples) > 2 and now - self._samples[0][0] > RATE_SECONDS:
            self._samples.popleft()

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(Text(text), soft_wrap=True)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def _count(self) -> str:
        budget = f" of {self._total}" if self._total is not None else ""
        return f"{self._evaluations}{budget} evaluations"

    def _elapsed(self) -> str:
        return clock(self._before + time.monotonic() - self._begin)

    def _pace(self) -> list[str]:
        """Rate and time left, as far as they are known."""
        parts = [f"{self.rate:.2g}/s" if self.rate < 10 else f"{self.rate:.0f}/s"] if self.rate else []
        return parts + ([f"{clock(self.seconds_left)} left"] if self.seconds_left is not None else [])

    def _plain(self) -> str:
        """Everything on one line."""
        parts = [self._elapsed(), self._phase, self._count(), *self._pace()]
        if self._best is not None:
            parts.append(f"best {self._best:.5g} {self._expression}".rstrip())
        parts += [f"{name} {value}" for name, value in self._counters.items()]
        return "  ".join(parts)

    def _render(self) -> RenderableType:
        """The live display."""
        head = Table.grid(padding=(0, 1))
        head.add_row(self._spinner, Text(self._phase, style="bold"), Text(self._elapsed(), style="dim"))
        bar = Table.grid(padding=(0, 1))
        pace = " · ".join([self._count(), *self._pace()])
        spent = ProgressBar(
            total=1.0, completed=self.fraction, width=BAR_WIDTH, complete_style="cyan", finished_style="green"
        )
        bar.add_row("", spent, Text(pace))
        title = Text(self._title, style="dim", no_wrap=True, overflow="ellipsis")
        rows: list[RenderableType] = [*([title] if self._title else []), head, bar]
        if self._best is not None:
            best = Text.assemble("  best ", (f"{self._best:.5g}", "bold green"), "  ", (self._expression, "green"))
            best.truncate(self._console.width - 1, overflow="ellipsis")
            rows.append(best)
        if self._counters:
            rows.append(Text("  " + " · ".join(f"{name} {value}" for name, value in self._counters.items()), "dim"))
        return Group(*rows)


def clock(seconds: float) -> str:
    """A duration as people read it: `0:42`, `3:07`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
