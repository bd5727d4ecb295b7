"""From options, as the command line and the Python API name them, to the configuration of a search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.search.config import Config, resolve, resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.config_sections import SearchConfig
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.given import allocation_file
from evoprune.search.kinds import kind_of
from evoprune.search.rundir import RunDirectory

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
    "allocation": "target.allocation",
    "compressor": "target.compressor",
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

# Of an allocation search, where it differs.
ALLOCATION_KEYS = {
    **{name: key for name, key in KEYS.items() if name not in ("pattern", "group", "allocation", "objective")},
    "population": "searcher.offspring",
    "metric": "target.metric",
    "granularity": "target.granularity",
    "drop": "target.drop",
    "drop_only": "target.drop_only",
    "pareto": "target.pareto",
    "sparsity_range": "target.sparsity_range",
    "surrogate": "searcher.surrogate",
}

# Of a joint search, where it differs.
JOINT_KEYS = {
    **{
        name: key
        for name, key in KEYS.items()
        if name not in ("pattern", "group", "allocation", "objective", "population", "searcher")
    },
    "granularity": "target.granularity",
    "rounds": "rounds",
    "metric_share": "metric_share",
}

# Of a structure search, where it differs.
STRUCTURE_KEYS = {
    **{
        name: key
        for name, key in KEYS.items()
        if name not in ("pattern", "group", "allocation", "compressor", "objective", "population", "searcher")
    },
    "population": "searcher.offspring",
    "surrogate": "searcher.surrogate",
    "selection": "searcher.selection",
    "training_tokens": "searcher.training.tokens",
    **{name: f"target.{name}" for name in ("speedup", "cost", "decode", "heads", "serving_safe")},
    **{name: f"target.{name}" for name in ("drop", "merge", "step", "accumulation")},
    "pareto": "target.pareto",
    "sparsity_range": "target.sparsity_range",
}

# Of a policy search, where it differs.
POLICY_KEYS = {
    **{name: key for name, key in KEYS.items() if name not in ("group", "allocation", "compressor")},
    "population": "searcher.samples",
    "prior": "searcher.prior",
    **{name: f"target.{name}" for name in ("units", "metrics", "cost", "budget", "drop")},
}

_EITHER = (KEYS["sparsity"], KEYS["pattern"])
_STRUCTURE_EITHER = (STRUCTURE_KEYS["sparsity"], STRUCTURE_KEYS["speedup"])


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
    values = given | dict(settings or {})
    config = _settled(resolve(files, values, [*_cleared(_EITHER, values, assignments), *assignments]))
    if config.target.allocation is None:
        return config
    # The file of a run, for `latest` would soon be the search's own.
    file = str(allocation_file(config.target.allocation))
    return config.model_copy(update={"target": config.target.model_copy(update={"allocation": file})})


def allocation_config(
    options: Mapping[str, Any],
    *,
    files: Iterable[Path] = (),
    settings: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> AllocationSearchConfig:
    """`metric_config` for an allocation search, with the options of `ALLOCATION_KEYS`.

    A metric in a file is read, and its expression is what the configuration says: the file may change or go.
    """
    given = {ALLOCATION_KEYS[name]: value for name, value in options.items() if value is not None}
    config = _settled(resolve_as(AllocationSearchConfig, files, given | dict(settings or {}), assignments))
    metric = config.target.metric
    if metric in CRITERIA:
        return config
    inside = load_metric(metric)
    if not isinstance(inside, Metric):
        raise InvalidInput(f"{metric} is no expression of this language, which a search needs: give one, or a name")
    target = config.target.model_copy(update={"metric": inside.expression.text})
    return config.model_copy(update={"target": target})


def joint_config(
    options: Mapping[str, Any],
    *,
    files: Iterable[Path] = (),
    settings: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> JointSearchConfig:
    """`metric_config` for a joint search, with the options of `JOINT_KEYS`."""
    given = {JOINT_KEYS[name]: value for name, value in options.items() if value is not None}
    return _settled(resolve_as(JointSearchConfig, files, given | dict(settings or {}), assignments))


def structure_config(
    options: Mapping[str, Any],
    *,
    files: Iterable[Path] = (),
    settings: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> StructureSearchConfig:
    """`metric_config` for a structure search, with the options of `STRUCTURE_KEYS`."""
    given = {STRUCTURE_KEYS[name]: value for name, value in options.items() if value is not None}
    assignments, values = list(assignments), given | dict(settings or {})
    cleared = _cleared(_STRUCTURE_EITHER, values, assignments)
    config = _settled(resolve_as(StructureSearchConfig, files, values, [*cleared, *assignments]))
    if options.get("training_tokens") is not None and config.searcher.selection != "training-aware":
        raise InvalidInput(
            f"--training-tokens are for training-aware selection, and this is {config.searcher.selection}: add "
            "--selection training-aware, or leave them out"
        )
    return config


def policy_config(
    options: Mapping[str, Any],
    *,
    files: Iterable[Path] = (),
    settings: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> PolicySearchConfig:
    """`metric_config` for a policy search, with the options of `POLICY_KEYS`.

    Units and metrics are names separated by commas, or a sequence of them. A metric in a file that the policy starts
    from is read, and its expression is what the configuration says.
    """
    if options.get("sparsity") is not None and options.get("pattern") is not None:
        raise InvalidInput("give --sparsity or --pattern, not both")
    given = {POLICY_KEYS[name]: value for name, value in options.items() if value is not None}
    for key in (POLICY_KEYS["units"], POLICY_KEYS["metrics"]):
        if isinstance(given.get(key), str):
            given[key] = [name.strip() for name in given[key].split(",")]
    if isinstance(samples := given.get(POLICY_KEYS["population"]), str) and samples.isdecimal():
        given[POLICY_KEYS["population"]] = int(samples)
    assignments, values = list(assignments), given | dict(settings or {})
    cleared = _cleared(_EITHER, values, assignments)
    config = _settled(resolve_as(PolicySearchConfig, files, values, [*cleared, *assignments]))
    prior = config.searcher.prior
    if config.prior_criterion is not None or prior in CRITERIA:
        return config
    inside = load_metric(prior)
    if not isinstance(inside, Metric):
        return config
    searcher = config.searcher.model_copy(update={"prior": inside.expression.text})
    return config.model_copy(update={"searcher": searcher})


def _cleared(either: tuple[str, str], values: Mapping[str, Any], assignments: Iterable[str]) -> list[str]:
    """Assignments by which one of two keys, given here, replaces the other where a file has it."""
    named = {*values, *(assignment.partition("=")[0] for assignment in assignments)}
    return [f"{other}=null" for other, key in (either, either[::-1]) if key in named and other not in named]


def _settled(config: Config) -> Config:
    """`config` with the run that ``latest`` means now, for soon it would be the search's own."""
    if config.seed_from != "latest":
        return config
    return config.model_copy(update={"seed_from": str(RunDirectory.open("latest").path)})


def config_again(
    run: RunDirectory, *, settings: Mapping[str, Any] | None = None, assignments: Iterable[str] = ()
) -> SearchConfig:
    """The configuration of a run, with some options changed; see `metric_config`."""
    resolvers: dict[str, Callable[..., SearchConfig]] = {
        "metric": metric_config,
        "allocation": allocation_config,
        "joint": joint_config,
        "structure": structure_config,
        "policy": policy_config,
    }
    return resolvers[kind_of(run.kind).name](
        {}, files=[run.path / "config.yaml"], settings=settings, assignments=assignments
    )


def check_names(config: SearchConfig) -> None:
    """Refuse, before a run's folder is made, what can be known to be wrong without loading a model.

    Raises:
        InvalidInput: an unknown name, no such model or text, or nothing to start from.
    """
    from evoprune.fitness.examples import holds_images, read_examples, side_examples
    from evoprune.fitness.models import check_model
    from evoprune.fitness.text import CORPUS, side_documents

    kind_of(config.kind).check_names(config)
    model = config.model
    check_model(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    for source in sorted({config.data.source, config.data.calibration or CORPUS} - {CORPUS}):
        if holds_images(source):
            side_examples(read_examples(source), "A")
        else:
            side_documents(source, "A")
