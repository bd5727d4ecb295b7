"""Bytes that stay: appending so that a crash or a full disk leaves whole records, and one clear line when it fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from evoprune.metrics.errors import InvalidInput


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into the one line that a user can act on.

    Raises:
        InvalidInput: the disk is full, read-only, or not ours to write to.
    """
    try:
        yield
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
        raise InvalidInput(f"cannot write {path}: {reason} (it needs a writable folder with room in it)") from problem


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AppendFile:
    """A file that only grows, record by record, each on disk before `append` returns.

    Args:
        path: created when missing.
        size: how many bytes of it count; the rest, left by a crash, is cut off.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._file = path.open("ab", buffering=0)
        if os.fstat(self._file.fileno()).st_size != size:
            self._cut()
        sync_folder(path.parent)

    def append(self, data: bytes) -> None:
        """Write `data` and flush it to disk. If that fails, the file is as before.

        Raises:
            OSError: the disk's own error.
        """
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
            os.fsync(self._file.fileno())
            self.size += len(data)
        except BaseException:
            self._cut()
            raise

    def cut(self, size: int) -> None:
        """Shorten the file to `size` bytes."""
        self.size = size
        self._cut()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut(self) -> None:
        os.ftruncate(self._file.fileno(), self.size)
        os.fsync(self._file.fileno())
