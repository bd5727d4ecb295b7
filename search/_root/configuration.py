"""From options, as the command line and the Python API name them, to the configuration of a search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evoprune.metrics.errors import InvalidInput
from evoprune.search.config import MetricSearchConfig, resolve

# Option -> key of the configuration.
KEYS = {
    "model": "model.name",
    "revision": "model.revision",
    "dtype": "model.dtype",
    "device": "model.device",
    "trust_remote_code": "model.trust_remote_code",
    "data": "data.source",
    "calibration": "data.calibration",
    "calibration_sequences": "data.calibration_sequences",
    "calibration_window": "data.calibration_window",
    "sparsity": "target.sparsity",
    "pattern": "target.pattern",
    "group": "target.group",
    "population": "searcher.population",
    "searcher": "searcher.name",
    "objective": "objective",
    "evaluations": "evaluations",
    "minutes": "minutes",
    "seed": "seed",
    "window": "window",
    "threads": "threads",
    "seed_from": "seed_from",
}

_EITHER = (KEYS["sparsity"], KEYS["pattern"])


def metric_config(
    options: Mapping[str, Any],
    *,
    files: Iterable[Path] = (),
    settings: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> MetricSearchConfig:
    """Defaults, then files, then options, then settings and assignments; later ones win.

    Args:
        options: by name, as in `KEYS`; None is not given.
        files: YAML files.
        settings: values by dotted key.
        assignments: ``key.sub=value``, the value being YAML.

    Raises:
        InvalidInput: a file that cannot be read, an unknown key, a value that cannot be.
    """
    given = {KEYS[name]: value for name, value in options.items() if value is not None}
    if options.get("sparsity") is not None and options.get("pattern") is not None:
        raise InvalidInput("give --sparsity or --pattern, not both")
    assignments = list(assignments)
    # One of the two, given here, replaces the other where a file has it.
    named = {*given, *(settings or {}), *(assignment.partition("=")[0] for assignment in assignments)}
    cleared = [f"{other}=null" for other, key in (_EITHER, _EITHER[::-1]) if key in named and other not in named]
    return resolve(files, given | dict(settings or {}), [*cleared, *assignments])


def check_names(config: MetricSearchConfig) -> None:
    """Refuse, before a run's folder is made, what can be known to be wrong without loading a model.

    Raises:
        InvalidInput: an unknown searcher, objective or criterion, no such model or text, or nothing to start from.
    """
    from evoprune.fitness.models import check_model
    from evoprune.fitness.objectives import OBJECTIVES
    from evoprune.fitness.text import CORPUS, side_documents
    from evoprune.metrics.criterion import CRITERIA
    from evoprune.search.metric_run import seeds_from
    from evoprune.search.searchers import SEARCHERS

    _ = SEARCHERS[config.searcher.name], OBJECTIVES[config.objective]
    for name in config.searcher.seeds or ():
        _ = CRITERIA[name]
    seeds_from(config.seed_from)
    model = config.model
    check_model(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    for source in sorted({config.data.source, config.data.calibration or CORPUS} - {CORPUS}):
        side_documents(source, "A")
