"""What a run was made with: versions, code, git commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

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


def code_hash() -> str:
    """sha256 over the source files that a search depends on: all of evoprune but its door."""
    return _hash_of(evoprune.metrics, evoprune.fitness, evoprune.search)


def evaluation_code_hash() -> str:
    """sha256 over the source files that the fitness of a given candidate depends on."""
    return _hash_of(evoprune.metrics, evoprune.fitness)


@cache
def _hash_of(*packages: ModuleType) -> str:
    """sha256 over the packages' source files, whatever folders they lie in."""
    digest = hashlib.sha256()
    for package in packages:
        root = Path(package.__path__[0])
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
        for name, path in sorted(files.items()):
            if not name.startswith("_root/"):  # the door lies here in a checkout, and elsewhere once installed
                digest.update(f"{package.__name__}/{name}\n".encode())
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
