"""Write build/links/evoprune: the package as type checkers want to see it, made of symbolic links.

The folders search/, metrics/ and fitness/ are `evoprune.search` and so on by a mapping in pyproject.toml. The editable
install resolves it with an import hook, which mypy and pyright cannot see; they follow these links instead. Folders
are linked whole, so new files appear by themselves; run it again after adding a file to search/_root.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOOR = ROOT / "search" / "_root"
SUBPACKAGES = ("fitness", "metrics", "search")


def link(target: Path) -> Path:
    """Replace the folder `target` by one that looks like the installed package, and return it."""
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in SUBPACKAGES:
        (target / name).symlink_to(ROOT / name, target_is_directory=True)
    for file in sorted(DOOR.iterdir()):
        if file.name != "__pycache__":
            (target / file.name).symlink_to(file)
    return target


if __name__ == "__main__":
    link(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "links" / "evoprune")
