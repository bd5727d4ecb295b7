"""Stopping on SIGINT and SIGTERM. They end a command at once; of a search the first asks, and the second insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = "stopped; nothing half-written is left"
"""What a command says that was ended at once."""

_insisted = threading.Event()


class StopFlag:
    """True once a stop was asked for."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt inside the block, so that whatever runs cleans up behind itself."""

    def handle(number: int, frame: FrameType | None) -> None:
        _insisted.set()
        raise KeyboardInterrupt

    with _handled_by(handle):
        yield


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGINT and SIGTERM set inside the block; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python forbids handlers, the flag stays as it is.
    """
    flag = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.asked:
            _insisted.set()
            raise KeyboardInterrupt
        flag.asked = True

    with _handled_by(handle):
        yield flag


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Both signals go to `handle` inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _insisted.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_insisted() -> None:
    """Raise KeyboardInterrupt once more if a signal has raised it inside one of the blocks above.

    Native code may catch the first one and report an error of its own in its place, as of the shape of a tensor, which
    would then count against the candidate that was being evaluated, or pass for the fault of a command.
    """
    if _insisted.is_set():
        raise KeyboardInterrupt
