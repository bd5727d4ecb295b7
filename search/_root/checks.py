"""What `evoprune doctor` looks at."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from evoprune.metrics.errors import EvopruneError

Status = Literal["ok", "absent", "broken"]

ESSENTIAL = ("torch", "transformers", "safetensors", "deap", "numpy", "sympy", "ray", "optuna")
# Distribution -> (module, what it is for).
EXTRAS = {
    "grpcio": ("grpc", "`--address ray://...`: pip install 'evoprune[cluster]'"),
    "aiohttp": ("aiohttp", "`ray job submit`: pip install 'evoprune[cluster]'"),
    "optuna-dashboard": ("optuna_dashboard", "`evoprune dashboard`: pip install 'evoprune[dashboard]'"),
    "datasets": ("datasets", "Hub data sets as text: pip install 'evoprune[data]'"),
    "pyarrow": ("pyarrow", "Parquet files as text: pip install 'evoprune[data]'"),
    "cmaes": ("cmaes", "`search allocation --searcher cmaes`: pip install 'evoprune[samplers]'"),
    "scipy": ("scipy", "`search allocation --searcher gp`: pip install 'evoprune[samplers]'"),
    "torch-pruning": (
        "torch_pruning",
        "shapes of families without an adapter, and metrics as its importances: pip install 'evoprune[torch-pruning]'",
    ),
    "llmcompressor": (
        "llmcompressor",
        "metrics as its modifiers: pip install 'evoprune[llmcompressor]', in an environment of its own",
    ),
    "accelerate": ("accelerate", "`prune --recovery`: pip install 'evoprune[recovery]'"),
    "peft": ("peft", "`prune --recovery lora`: pip install 'evoprune[recovery]'"),
    "lm-eval": ("lm_eval", "`eval --tasks`: pip install 'evoprune[tasks]'"),
    "diffusers": ("diffusers", "diffusion pipelines: pip install 'evoprune[diffusion]'"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: ``ok``; ``absent``, which only matters to who wants it; or ``broken``.
        detail: a version, a place, or what is wrong and how to mend it.
    """

    name: str
    status: Status
    detail: str

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return asdict(self)


def all_checks() -> Iterator[Check]:
    """Every check, one after another; none raises."""
    import evoprune

    yield Check("evoprune", "ok", evoprune.__version__)
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ESSENTIAL:
        yield _attempt(name, partial(_imported, name, name))
    yield _attempt("devices", _devices)
    yield _attempt("reference model", _reference_model)
    yield _attempt("corpus", _corpus)
    yield _attempt("runs folder", _runs)
    yield _attempt("cache folder", _cache)
    for distribution, (module, purpose) in EXTRAS.items():
        if _is_installed(distribution):
            yield _attempt(distribution, partial(_imported, module, distribution))
        else:
            yield Check(distribution, "absent", f"for {purpose}")


def _attempt(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", look())
    except EvopruneError as error:
        return Check(name, "broken", str(error))
    except Exception as error:  # whatever a broken installation comes up with
        return Check(name, "broken", f"{type(error).__name__}: {error}".splitlines()[0])


def _imported(module: str, distribution: str) -> str:
    """The version of a package that can be imported."""
    import_module(module)
    return version(distribution) if _is_installed(distribution) else "of unknown version"


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _devices() -> str:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [f"{cores} CPU cores"]
    for index in range(torch.cuda.device_count()):
        facts: Any = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {facts.name} with {facts.total_memory / 2**30:.0f} GiB")
    return ", ".join(found)


def _reference_model() -> str:
    from evoprune.fitness.models import load_model

    model = load_model("reference", device="cpu").model
    return f"{model.num_parameters() / 1e6:.1f} M parameters, {model.config.model_type}"


def _corpus() -> str:
    from evoprune.fitness.text import source_hash

    return f"text C has the hash {source_hash('corpus', 'C')[:12]}"


def _runs() -> str:
    from evoprune.search.rundir import runs_folder

    return _writable(runs_folder())


def _cache() -> str:
    from evoprune.fitness.cache import cache_folder

    return _writable(cache_folder())


def _writable(folder: Path) -> str:
    """Where a folder is or will be, and the room there.

    Raises:
        OSError: nothing can be written there.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    with tempfile.TemporaryFile(dir=existing):
        pass
    return f"{folder.absolute()}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free"
