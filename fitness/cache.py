"""Where derived files live between runs: statistics, fetched text, teacher outputs; and what a disk can do to them."""

from __future__ import annotations

import os
import re
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
