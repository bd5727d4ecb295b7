"""One driver per run: an advisory lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.durable import disk_errors

PATIENCE = 0.5
"""Seconds to keep trying: a reader that asks `is_held` has the lock for an instant."""


class RunLock:
    """The lock of a run folder.

    Args:
        path: the lock file; its content, a process id, is for messages only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, for as long as this process lives or until `release`.

        Raises:
            InvalidInput: another process has it, or the folder is not ours to write to.
        """
        if self._file is not None:
            return
        with disk_errors(self._path):
            file = self._path.open("a+")
        give_up = time.monotonic() + PATIENCE
        while not _try(file, fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                file.seek(0)
                owner = file.read(20).strip()
                file.close()
                who = f"process {owner}" if owner else "another process"
                raise InvalidInput(f"{self._path.parent} is locked: {who} is running it; stop that one first")
            time.sleep(0.02)
        with contextlib.suppress(OSError):  # a full disk matters where something is written in earnest
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def is_held(self) -> bool:
        """Whether a process, perhaps this one, has the lock now."""
        if self._file is not None:
            return True
        try:
            with self._path.open() as file:
                return not _try(file, fcntl.LOCK_SH)
        except OSError:  # no such file, or not ours to read
            return False


def _try(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
