"""Wheels of this repository, built from a copy, so that no build folder appears here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.test_house import FOLDERS, ROOT, run_python


def build_wheel(folder: Path, change: Callable[[Path], object] = lambda tree: None) -> Path:
    """A wheel in `folder`.

    Args:
        change: given the copy before it is built.
    """
    tree = folder / "tree"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    change(tree)
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run_python(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(tree), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built
