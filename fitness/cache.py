"""Where derived files live between runs: statistics, fetched text, teacher outputs; and what a disk can do to them."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import user_path


def cache_folder() -> Path:
    """The cache folder, which may not exist yet: `EVOPRUNE_CACHE`, else `evoprune` in the user's cache folder.

    Everything in it can be computed or fetched again, so it may be deleted at any time between runs.
    """
    chosen = os.environ.get("EVOPRUNE_CACHE")
    if chosen:
        return user_path(chosen).absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "evoprune"


# Beside what is announced: file headers, and what a disk should not run out of.
_SPARE_BYTES = 64 << 20


def check_room(size: int, what: str, instead: str) -> None:
    """Refuse what the disk of the cache has no room for.

    Args:
        size: bytes that shall be written.
        what: they are, as the subject of a sentence in the plural.
        instead: something else that the user can do.

    Raises:
        InvalidInput: says how much is needed, and what can be done.
    """
    folder = cache_folder()
    free = shutil.disk_usage(folder).free
    if size + _SPARE_BYTES > free:
        raise InvalidInput(
            f"{what} take {size / 2**30:.1f} GiB, and {folder} has {free / 2**30:.1f} GiB free: {instead}, or set "
            "EVOPRUNE_CACHE to a folder on a larger disk"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk can do to us inside the block, full or read-only, into one line that names `path`.

    Raises:
        InvalidInput: in place of an `OSError`, or of what a library makes of one.
    """
    try:
        yield
    except EvopruneError:
        raise
    except Exception as error:
        # The safetensors and tokenizers libraries report the disk's errors in words of this form only.
        told = re.search(r"([^:]+) \(os error \d+\)", str(error))
        if told is not None:
            reason = told[1].strip()
        elif isinstance(error, OSError):
            reason = error.strerror or " ".join(str(error).split())
        else:
            raise
        raise InvalidInput(f"cannot write {path}: {reason}") from error
