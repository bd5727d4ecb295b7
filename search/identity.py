"""What a run was made with: versions, code, git commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import evoprune.fitness
import evoprune.metrics
import evoprune.search

PACKAGES = ("evoprune", "torch", "transformers", "ray", "optuna", "deap", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Version of Python and of each package that results may depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_hash() -> str:
    """sha256 over evoprune's own source files, whatever folder they lie in; those of the door change no result."""
    digest = hashlib.sha256()
    for package in (evoprune.metrics, evoprune.fitness, evoprune.search):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            if path.relative_to(root).parts[0] == "_root":  # a wheel has it elsewhere
                continue
            digest.update(f"{package.__name__}/{path.relative_to(root).as_posix()}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def git_commit() -> str | None:
    """The commit of evoprune's checkout, None outside of one."""
    root = Path(evoprune.metrics.__path__[0]).parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
