"""evoprune: search for the best way to prune a neural network.

    import evoprune

    run = evoprune.search_metric("path/or/hub-id", sparsity=0.6, evaluations=250)
    run.best["expression"]
    run.export("metric.py")
    evoprune.prune("path/or/hub-id", metric="metric.py", sparsity=0.6, out="pruned")
    evoprune.evaluate("pruned", dense="path/or/hub-id").perplexity

Importing evoprune loads nothing heavy: torch and transformers come with the first call that needs them, Ray and Optuna
with the first search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evoprune.api import allocate, collect_statistics, evaluate, load_model, prune
    from evoprune.classifiers import load_classifier, prune_classifier
    from evoprune.fitness.semi_structured import to_semi_structured
    from evoprune.fitness.statistics_import import import_gradients
    from evoprune.metrics.allocation import Allocation
    from evoprune.metrics.shape import Shape
    from evoprune.outcomes import CutModel, Evaluation, Pruned, PrunedClassifier, PrunedFiles, PrunedPipeline
    from evoprune.pipelines import load_pipeline, prune_pipeline
    from evoprune.policies import prune_policy
    from evoprune.recipes import prune_recipe
    from evoprune.runs import Run, list_runs
    from evoprune.searches import resume, search_allocation, search_metric
    from evoprune.searches_joint import search_joint
    from evoprune.searches_policy import search_policy
    from evoprune.searches_structure import search_structure
    from evoprune.shapes import prune_shape, prune_structure
    from evoprune.streaming import prune_streamed

    __version__: str

# Which module has what this package offers by name.
_HOMES = {
    "Allocation": "evoprune.metrics.allocation",
    "CutModel": "evoprune.outcomes",
    "Evaluation": "evoprune.outcomes",
    "Pruned": "evoprune.outcomes",
    "PrunedClassifier": "evoprune.outcomes",
    "PrunedFiles": "evoprune.outcomes",
    "PrunedPipeline": "evoprune.outcomes",
    "Run": "evoprune.runs",
    "Shape": "evoprune.metrics.shape",
    "allocate": "evoprune.api",
    "collect_statistics": "evoprune.api",
    "evaluate": "evoprune.api",
    "import_gradients": "evoprune.fitness.statistics_import",
    "list_runs": "evoprune.runs",
    "load_classifier": "evoprune.classifiers",
    "load_model": "evoprune.api",
    "load_pipeline": "evoprune.pipelines",
    "prune": "evoprune.api",
    "prune_classifier": "evoprune.classifiers",
    "prune_pipeline": "evoprune.pipelines",
    "prune_policy": "evoprune.policies",
    "prune_recipe": "evoprune.recipes",
    "prune_streamed": "evoprune.streaming",
    "prune_shape": "evoprune.shapes",
    "prune_structure": "evoprune.shapes",
    "resume": "evoprune.searches",
    "search_allocation": "evoprune.searches",
    "search_joint": "evoprune.searches_joint",
    "search_metric": "evoprune.searches",
    "search_policy": "evoprune.searches_policy",
    "search_structure": "evoprune.searches_structure",
    "to_semi_structured": "evoprune.fitness.semi_structured",
}

__all__ = [
    "Allocation",
    "CutModel",
    "Evaluation",
    "Pruned",
    "PrunedClassifier",
    "PrunedFiles",
    "PrunedPipeline",
    "Run",
    "Shape",
    "__version__",
    "allocate",
    "collect_statistics",
    "evaluate",
    "import_gradients",
    "list_runs",
    "load_classifier",
    "load_model",
    "load_pipeline",
    "prune",
    "prune_classifier",
    "prune_pipeline",
    "prune_policy",
    "prune_recipe",
    "prune_shape",
    "prune_streamed",
    "prune_structure",
    "resume",
    "search_allocation",
    "search_joint",
    "search_metric",
    "search_policy",
    "search_structure",
    "to_semi_structured",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for."""
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'evoprune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    """The installed version; a copy of the sources that was never installed has no metadata."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("evoprune")
    except PackageNotFoundError:
        return "0+unknown"
