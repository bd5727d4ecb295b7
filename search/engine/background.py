"""Calls that somebody must make, but nobody should wait for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

LONGEST_PAUSE = 30.0
IDLE_SECONDS = 0.1


class Background:
    """Makes calls one after another in a thread of its own; one that raises is made again, later, until it succeeds.

    So calls must be safe to repeat. The thread starts with the first call.

    Args:
        name: of the thread.
        capacity: how many calls may wait.
        on_failure: called with the exception whenever a call raises, in the thread.
        first_pause: seconds before the first repetition; doubled up to half a minute while failures go on.
    """

    def __init__(
        self, name: str, capacity: int, on_failure: Callable[[Exception], None], *, first_pause: float = 1.0
    ) -> None:
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue(capacity)
        self._on_failure = on_failure
        self._first_pause = first_pause
        self._done = 0
        self._last = False  # no more calls are made
        self._hurry = threading.Event()
        self._give_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def put(self, call: Callable[[], None]) -> bool:
        """Queue a call and return at once; False if there is no room for it."""
        if not self._thread.is_alive() and not self._give_up.is_set():
            self._thread.start()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def close(self, patience: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the calls made so far, then stop. False if some of them are left.

        Args:
            patience: seconds to wait without any call succeeding.
            enough: asked now and then; true once nobody wants to wait any longer.
        """
        if not self._thread.is_alive():
            return self._calls.empty()
        self._hurry.set()
        self._last = True
        done, since = self._done, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < patience and not enough():
            self._thread.join(0.05)
            if self._done != done:
                done, since = self._done, time.monotonic()
        in_time = not self._thread.is_alive()
        self._give_up.set()
        return in_time

    def _run(self) -> None:
        while not self._give_up.is_set():
            try:
                call = self._calls.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                if self._last:
                    return
                continue
            pause = self._first_pause
            while True:
                try:
                    call()
                    self._done += 1
                    break
                except Exception as problem:
                    self._on_failure(problem)
                self._hurry.wait(pause)  # while closing there is no time for long pauses
                if self._give_up.wait(self._first_pause if self._hurry.is_set() else 0.0):
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
