"""Progress is readable on a terminal and in a log file."""

from __future__ import annotations

import io
import time

import pytest

from evoprune.search import progress as progress_module
from evoprune.search.progress import Progress, clock


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "PLAIN_SECONDS", 0.0)
    stream = io.StringIO()
    with Progress(200, stream=stream, title="evoprune search metric") as progress:
        progress.phase("collecting statistics")
        progress.phase("collecting statistics")
        progress.update(50, best=0.0123456, expression="mul(abs(W),X_l2)", counters={"births": 80, "workers": "2/2"})
        time.sleep(0.6)
        progress.update(100)
        progress.line("worker 1 died; a new one starts")
    text = stream.getvalue()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[:2] == ["evoprune search metric", "collecting statistics"]
    assert "50 of 200 evaluations  best 0.012346 mul(abs(W),X_l2)  births 80  workers 2/2" in lines[2]
    assert "100 of 200 evaluations" in lines[3]
    assert "/s  0:01 left" in lines[3]
    assert lines[4] == "worker 1 died; a new one starts"
    assert len(lines) == 6


def test_lines_are_seldom() -> None:
    stream = io.StringIO()
    with Progress(1000, stream=stream) as progress:
        progress.phase("searching")
        for number in range(1000):
            progress.update(number)
        assert stream.getvalue() == "searching\n"


def test_a_terminal_gets_a_live_display() -> None:
    stream = Terminal()
    with Progress(200, minutes=5, stream=stream, title="evoprune") as progress:
        progress.phase("searching")
        progress.update(50, best=0.5, expression="[bold]mul(W,W)[/bold]" * 20, counters={"births": 80})
        progress.line("a line that [stays]")
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "searching" in text
    assert "50 of 200 evaluations" in text
    assert "[bold]mul(W,W)" in text  # text, not markup
    assert "…" in text
    assert "a line that [stays]" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_dumb_terminals_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(stream=stream) as progress:
        progress.phase("searching")
    assert stream.getvalue() == "searching\n"


def test_the_display_is_taken_down_when_the_search_fails() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(stream=stream):
        raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_rate_and_time_left_follow_the_recent_past(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = Progress(1000, minutes=10, stream=io.StringIO(), done=100)
    with progress:
        assert (progress.rate, progress.seconds_left, progress.fraction) == (None, None, 0.1)
        now[0] += 50  # until workers are ready no budget is spent
        progress.clock_starts(spent=60.0)
        assert progress.seconds_left == 540.0
        progress.update(100)
        for _ in range(200):
            now[0] += 1
            progress.update(progress._evaluations + 1)
        for _ in range(100):
            now[0] += 1
            progress.update(progress._evaluations + 4)
        assert progress.rate == pytest.approx(4)
        assert progress.seconds_left == pytest.approx(75)
        assert progress.fraction == pytest.approx(0.7)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (187, "3:07"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
