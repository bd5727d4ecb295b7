"""Where derived files live between runs: statistics, fetched text, teacher outputs."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder, which may not exist yet: `EVOPRUNE_CACHE`, else `evoprune` in the user's cache folder.

    Everything in it can be computed or fetched again, so it may be deleted at any time between runs.
    """
    chosen = os.environ.get("EVOPRUNE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "evoprune"
