"""One driver per run: an advisory lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.durable import disk_errors

PATIENCE = 0.5
"""Seconds to keep trying: a reader that asks `is_held` has the lock for an instant."""
BEAT_SECONDS = 90.0
"""A driver on another machine, whose lock a shared file system may hide, is believed alive for so long."""


class RunLock:
    """The lock of a run folder.

    Args:
        path: the lock file; its content, process id and host, is for readers: the lock itself is the system's.
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
                owner = _owner(file)
                file.close()
                where = f" on {owner[1]}" if owner[1:] not in ([], [socket.gethostname()]) else ""
                who = f"process {owner[0]}{where}" if owner else "another process"
                raise InvalidInput(f"{self._path.parent} is locked: {who} is running it; stop that one first")
            time.sleep(0.02)
        with contextlib.suppress(OSError):  # a full disk matters where something is written in earnest
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}\n")
            file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            self._file.close()
            self._file = None

    def beat(self) -> None:
        """Renew the file's time, if this process has the lock."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def is_held(self) -> bool:
        """Whether a process, perhaps this one or one on another machine, has the lock now."""
        if self._file is not None:
            return True
        try:
            with self._path.open() as file:
                if not _try(file, fcntl.LOCK_SH):
                    return True
                owner = _owner(file)
                elsewhere = len(owner) == 2 and owner[1] != socket.gethostname()
                return elsewhere and time.time() - os.fstat(file.fileno()).st_mtime < BEAT_SECONDS
        except OSError:  # no such file, or not ours to read
            return False


def _owner(file: IO[str]) -> list[str]:
    """Process id and host of who has, or had, the lock; empty once it was given back."""
    file.seek(0)
    return file.read(300).split()


def _try(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
