"""Stopping on SIGINT and SIGTERM: the first asks, the second insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_insisted = threading.Event()


class StopFlag:
    """True once a stop was asked for."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGINT and SIGTERM set inside the block; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python forbids handlers, the flag stays as it is.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.asked:
            _insisted.set()
            raise KeyboardInterrupt
        flag.asked = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        _insisted.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_insisted() -> None:
    """Raise KeyboardInterrupt once more if a second signal has raised it inside `stop_on_signals`.

    Native code may catch the first one and report an error of its own in its place, as of the shape of a tensor, which
    would then count against the candidate that was being evaluated.
    """
    if _insisted.is_set():
        raise KeyboardInterrupt
