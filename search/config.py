"""Every option of a metric search and its default. A misspelt key is an error that names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from evoprune.fitness.context import EvaluationContext
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import GROUPS, MaskRule, parse_pattern
from evoprune.metrics.terminals import STATISTICS, TERMINALS

# Forward, backward and Hessian statistics that a search may read unless told otherwise.
DEFAULT_STATISTICS = ("X_l2", "X_l1", "X_mean", "X_var", "X_max", "Y_l2", "G_l2", "G_l1", "G_mean", "Hinv")

DEFAULT_EVALUATIONS = 250

_SQUARES = {"X_l2": "X_ss", "Y_l2": "Y_ss"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """The model to prune."""

    name: str = Field("reference", description="`reference`, a folder, or a Hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the forward pass")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    trust_remote_code: bool = Field(False, description="run Python code that the model brings along")


class DataConfig(_Section):
    """The three disjoint texts: calibration (A), search (B), held-out (C)."""

    source: str = Field("corpus", description="text of B and C: corpus, a file, a folder, or a datasets name")
    window: int = Field(256, ge=8, description="tokens in a window")
    heldout_windows: int | None = Field(80, ge=2, description="windows of text C; none takes all")
    calibration: str | None = Field(None, description="text of A; none takes the same source")
    calibration_sequences: int = Field(64, ge=1, description="sequences for statistics")
    calibration_window: int = Field(256, ge=8, description="tokens in each of them")


DEFAULT_SPARSITY = 0.6


class TargetConfig(_Section):
    """How much goes, and what is compared."""

    sparsity: float | None = Field(None, description="fraction to remove, in (0, 1); 0.6 unless there is a pattern")
    pattern: str | None = Field(None, description="N:M, N kept of every M")
    group: Literal["row", "layer", "global"] = Field("row", description="what scores are compared within")

    @model_validator(mode="before")
    @classmethod
    def _neither(cls, values: Any) -> Any:
        """The default is written out, so that a resolved configuration says what is removed."""
        if isinstance(values, dict) and values.get("sparsity") is None and values.get("pattern") is None:
            return {**values, "sparsity": DEFAULT_SPARSITY}
        return values

    @field_validator("pattern", mode="before")
    @classmethod
    def _sexagesimal(cls, value: Any) -> Any:
        """YAML 1.1 reads an unquoted 2:4 as 2 minutes and 4 seconds; M of 60 and more it leaves alone."""
        return "{}:{}".format(*divmod(value, 60)) if type(value) is int else value

    @model_validator(mode="after")
    def _one_of_two(self) -> TargetConfig:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("give --sparsity or --pattern, not both")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(
                f"sparsity {self.sparsity} is not between 0 and 1: give the fraction to remove, such as 0.6"
            )
        if self.pattern is not None:
            parse_pattern(self.pattern)
        assert self.group in GROUPS
        return self

    @property
    def rule(self) -> MaskRule:
        """The mask rule."""
        if self.pattern is not None:
            return MaskRule(None, parse_pattern(self.pattern), "row")
        return MaskRule(self.sparsity, None, self.group)


class RacingConfig(_Section):
    """More tokens for fewer candidates."""

    rungs: tuple[int, ...] = Field((4, 16, 64, 192), description="windows of text B seen up to each rung")
    keep: float = Field(0.25, gt=0, le=1, description="share that goes on to the next rung")
    uniform: float = Field(0.1, ge=0, le=1, description="share that goes on whatever its fitness")

    @field_validator("rungs")
    @classmethod
    def _increasing(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if not rungs or rungs[0] < 1 or any(b <= a for a, b in pairwise(rungs)):
            raise ValueError("rungs are numbers of windows that increase, such as [4, 16, 64]")
        return rungs


class SearcherConfig(_Section):
    """Who is born next."""

    name: str = Field("evolution", description="a name from `evoprune list searchers`")
    population: int = Field(64, ge=8, description="members over all islands")
    islands: int = Field(4, ge=1, description="populations that seldom mix")
    crossover: float = Field(0.25, ge=0, le=1, description="share of bred births with two parents")
    tuning: float = Field(0.35, ge=0, le=1, description="share of births that tune exponents and constants")
    immigrants: float = Field(0.05, ge=0, le=1, description="share of births drawn at random")
    tournament: int = Field(5, ge=1, description="candidates compared to choose a parent")
    power_budget: int = Field(30, ge=0, description="evaluations for the tuned power product")
    seeds: tuple[str, ...] | None = Field(None, description="criteria to start from; none takes all that can be scored")
    simplify: Literal["canonical", "opposing"] = Field(
        "canonical", description="births: canonical form, or the published removal of opposite operators"
    )


class MetricSearchConfig(_Section):
    """A metric search, fully resolved."""

    kind: Literal["metric"] = "metric"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    target: TargetConfig = TargetConfig()
    racing: RacingConfig = RacingConfig()
    searcher: SearcherConfig = SearcherConfig()
    objective: str = Field("kl", description="a name from `evoprune list objectives`")
    statistics: tuple[str, ...] = Field(
        DEFAULT_STATISTICS, validate_default=True, description="statistics that candidates may read"
    )
    evaluations: int | None = Field(
        DEFAULT_EVALUATIONS,
        ge=1,
        description="candidates with a forward pass, at most; none leaves it to the minutes, and is the default then",
    )
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False, description="time for the search, at most")
    seed: int = Field(0, ge=0, lt=1 << 63, description="fixes texts A and B and the search")
    window: int = Field(16, ge=1, description="births that may wait for results; part of a run's identity")
    threads: int = Field(1, ge=1, description="torch threads of a worker on a CPU; part of a run's identity")
    seed_from: str | None = Field(None, description="exported metric or run to start from")
    deadline: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto", description="seconds after which a worker counts as hung; auto takes many times what it should need"
    )
    numerics: Literal["strict", "relaxed"] = Field(
        "strict", description="refuse workers whose numbers differ in any bit, or take them and say so"
    )

    @field_validator("statistics")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in STATISTICS:
                raise ValueError(f"no statistic {name!r}; known: {', '.join(sorted(STATISTICS))}")
        # Canonical forms may write the square of a norm as the sum of squares, which is the same statistic.
        squares = tuple(_SQUARES[name] for name in names if name in _SQUARES and _SQUARES[name] not in names)
        return names + squares

    @model_validator(mode="before")
    @classmethod
    def _minutes_alone(cls, values: Any) -> Any:
        """A budget in minutes is one by itself: the default number of evaluations does not cut it short."""
        if isinstance(values, dict) and values.get("minutes") is not None and "evaluations" not in values:
            return {**values, "evaluations": None}
        return values

    @model_validator(mode="after")
    def _ends(self) -> MetricSearchConfig:
        if self.evaluations is None and self.minutes is None:
            raise ValueError("a search needs an end: give --evaluations, --minutes or both")
        return self

    @property
    def identity(self) -> str:
        """Hash of every option that a birth depends on: all but how long things may take."""
        return content_hash(self.model_dump(mode="json", exclude={"minutes", "deadline"}))

    @property
    def terminals(self) -> frozenset[str]:
        """Names that candidates may read: the statistics, and what needs no data."""
        return frozenset(self.statistics) | (frozenset(TERMINALS) - STATISTICS)

    def context(self) -> EvaluationContext:
        """What workers have to know."""
        rule = self.target.rule
        return EvaluationContext(
            model=self.model.name,
            revision=self.model.revision,
            dtype=self.model.dtype,
            device=self.model.device,
            trust_remote_code=self.model.trust_remote_code,
            data=self.data.source,
            seed=self.seed,
            window=self.data.window,
            rungs=self.racing.rungs,
            heldout_windows=self.data.heldout_windows,
            calibration=self.data.calibration or self.data.source,
            calibration_sequences=self.data.calibration_sequences,
            calibration_window=self.data.calibration_window,
            statistics=self.statistics,
            objective=self.objective,
            sparsity=rule.sparsity,
            pattern=rule.pattern,
            group=rule.group,
            threads=self.threads,
        )


def resolve(
    files: Iterable[Path] = (), overrides: Mapping[str, Any] | None = None, assignments: Iterable[str] = ()
) -> MetricSearchConfig:
    """Defaults, then files, then options, then ``key.sub=value`` assignments; later ones win.

    Args:
        files: YAML files.
        overrides: values by dotted key, such as ``{"target.sparsity": 0.6}``; None values are passed over.
        assignments: as given to ``--set``; values are YAML.

    Raises:
        InvalidInput: a file that is not YAML, an unknown key, a value of the wrong kind.
    """
    values: dict[str, Any] = {}
    for path in files:
        _merge(values, _read_yaml(path))
    for key, value in (overrides or {}).items():
        if value is not None:
            _assign(values, key, value)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--set {assignment!r} is not of the form key.sub=value")
        try:
            _assign(values, key, yaml.safe_load(text))
        except (yaml.YAMLError, RecursionError):
            raise InvalidInput(f"--set {key}: {text[:80]!r} is not a YAML value") from None
    return validated(values)


def validated(values: Mapping[str, Any]) -> MetricSearchConfig:
    """The configuration that plain values spell.

    Raises:
        InvalidInput: naming the first wrong key.
    """
    try:
        return MetricSearchConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = "no such option"
        raise InvalidInput(f"{where}: {what}" if where else what) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise InvalidInput(f"{path} is not a YAML file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidInput(f"{path} does not hold options by name")
    return values


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *folders, leaf = key.split(".")
    for folder in folders:
        values = values.setdefault(folder, {})
        if not isinstance(values, dict):
            raise InvalidInput(f"{key}: {folder} is no section")
    values[leaf] = value
