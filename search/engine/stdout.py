"""Keeping stdout for results while a library prints to it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from evoprune.search.engine.executor import Notify


class _Aside:
    """Stands in for stdout: Ray's reports of dead workers become events, all else goes to stderr with other chatter."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._end_follows = False

    def write(self, text: str) -> int:
        if "(raylet)" in text:
            self._notify("debug", "raylet", text=text.strip()[:2000])
            self._end_follows = not text.endswith("\n")  # print writes the line's end by itself
        elif self._end_follows and text == "\n":
            self._end_follows = False
        else:
            sys.stderr.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@contextlib.contextmanager
def stdout_kept_clean(notify: Notify) -> Iterator[None]:
    """Inside the block nothing is printed to stdout: results stay alone on the stream that the caller kept."""
    kept, stand_in = sys.stdout, _Aside(notify)
    sys.stdout = stand_in
    try:
        yield
    finally:
        if sys.stdout is stand_in:
            sys.stdout = kept
