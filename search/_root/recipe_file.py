"""Recipes: everything that decides a checkpoint's weights, as YAML that a person can read, with files beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from evoprune.calibration import ALL_TOKENS, AMIA, TEXT, default_window, token_choice
from evoprune.fitness.amia import TokenChoice
from evoprune.fitness.card import public_name
from evoprune.fitness.compressors import COMPRESSORS, AtRunTime, compressor_of
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.policy_file import LearnedPolicy
from evoprune.fitness.policy_file import to_text as policy_text
from evoprune.fitness.statistics_reader import ModelStatistics
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import to_text as allocation_text
from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.files import strict_json, user_path, user_text
from evoprune.metrics.parameters import parameters_of
from evoprune.metrics.pruner_zero import PrunerZeroMetric
from evoprune.metrics.pruner_zero import from_json as tree_from_json
from evoprune.metrics.records import MaskRule
from evoprune.metrics.shape import Shape
from evoprune.metrics.shape_file import to_text as shape_text
from evoprune.search.config import said_of

FORMAT = "evoprune-recipe/1"
FILE = "recipe.yaml"
KINDS = ("weights", "shape", "method", "policy")
"""What can say what goes; a recipe has one of these sections."""

_HEAD = """\
# How this checkpoint was made. To make it again, in a new folder:
#   evoprune prune --recipe PATH/OF/THIS/FILE --out DIR
# A model or text that is named here by the last part of a local path is given beside it, as MODEL and --calibration.
"""


def _plain(value: Any) -> Any:
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError("give a number, text, true, false or null")
    return value


def _quoted(value: Any) -> Any:
    # YAML reads 2:4 as a number to the base of 60.
    if isinstance(value, int):
        raise ValueError("write a pattern in quotes, such as '2:4'")
    return value


Parameters = dict[str, Annotated[Any, AfterValidator(_plain)]]
Quoted = Annotated[str, BeforeValidator(_quoted)]


class Part(BaseModel):
    """Fields of a recipe that belong together; no value is converted, a misspelt name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Attached(Part):
    """A file beside the recipe, in the same folder."""

    file: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}\.json$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Plugin(Part):
    """A plug-in by its name, with parameters."""

    name: str
    parameters: Parameters = {}


class ModelPart(Part):
    """The dense model; `fingerprint` and `architecture` say which weights it had."""

    name: str
    revision: str | None = None
    architecture: str | None = None
    fingerprint: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    components: list[str] | None = None


class TextPart(Part):
    """Text A; `sha256` is of the token ids that were read."""

    text: str = "corpus"
    sequences: int = Field(TEXT.calibration_sequences, ge=1)
    window: int | None = Field(None, ge=1)
    tokens: Literal["all", "amia"] = "all"
    choice: Parameters = {}
    sha256: str | None = None

    @property
    def chosen(self) -> str | TokenChoice:
        """How tokens are chosen, as `collect_statistics` takes it.

        Raises:
            InvalidInput: `choice` has what no choice has.
        """
        if unknown := self.choice.keys() - {known.name for known in fields(TokenChoice)}:
            raise InvalidInput(f"calibration.choice.{min(unknown)}: no such parameter of a choice of tokens")
        return TokenChoice(**self.choice) if self.choice else self.tokens


class WeightsPart(Part):
    """Single weights go: `metric` is a name or an expression, `expression` what the name stands for."""

    metric: str | None = None
    expression: str | None = None
    metric_file: Attached | None = None
    sparsity: float | None = Field(None, ge=0, lt=1)
    pattern: Quoted | None = None
    group: Literal["row", "layer", "global"] | None = None
    allocation: Attached | None = None
    compressor: Plugin = Plugin(name="mask")
    accumulation: Literal["dense", "path"] = "dense"


class MethodPart(Plugin):
    """A published method makes the model smaller."""

    sparsity: float | None = Field(None, gt=0, lt=1)


class RecoveryPart(Plugin):
    """What is left is trained; the text is another side of `calibration`."""

    tokens: int = Field(ge=1)
    loss: str


class Recipe(Part):
    """All of it. What a recipe leaves out has the default of `prune`; those that evoprune writes leave out nothing."""

    format: Literal["evoprune-recipe/1"]
    made_by: dict[str, str] = {}
    model: ModelPart
    weights: WeightsPart | None = None
    shape: Attached | None = None
    method: MethodPart | None = None
    policy: Attached | None = None
    refit: Literal["path-refit"] | None = None
    correction: float | None = Field(None, ge=0, le=1)
    form: str = "auto"
    calibration: TextPart | None = None
    recovery: RecoveryPart | None = None
    seed: int = 0
    threads: int | None = Field(None, ge=1, le=1024)

    @model_validator(mode="after")
    def _one_kind(self) -> Recipe:
        told = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(told) != 1:
            has = " and ".join(told) or "none"
            raise ValueError(f"one section says what goes, {', '.join(KINDS[:-1])} or {KINDS[-1]}: this has {has}")
        if (self.refit is not None or self.correction is not None) and self.policy is None:
            raise ValueError(
                "refit and correction go with a policy: what else says what goes says by itself what weights become"
            )
        return self


@dataclass(frozen=True)
class StoredRecipe:
    """A recipe and the files that it names.

    Attributes:
        recipe: what `recipe.yaml` says.
        attached: text of the files beside it, by name.
    """

    recipe: Recipe
    attached: Mapping[str, str] = field(default_factory=dict)

    def files(self) -> dict[str, str]:
        """Text of all files of a checkpoint that this is, by name."""
        values = self.recipe.model_dump(mode="json")
        optional = {*KINDS, "refit", "correction"}
        told = {name: value for name, value in values.items() if name not in optional or value is not None}
        return {FILE: _HEAD + yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=120), **self.attached}

    def document(self, attached: Attached) -> Any:
        """The JSON of a file beside the recipe.

        Raises:
            InvalidInput: it is no JSON.
        """
        try:
            return strict_json(self.attached[attached.file])
        except (ValueError, RecursionError):
            raise InvalidInput(f"{attached.file!r} is not a JSON document") from None

    def recovered(self, facts: Mapping[str, Any]) -> StoredRecipe:
        """The same with the recovery that `GivenRecovery.recipe` describes."""
        part = RecoveryPart(
            name=facts["method"], parameters=facts["parameters"], tokens=facts["tokens"], loss=facts["loss"]
        )
        return replace(self, recipe=self.recipe.model_copy(update={"recovery": part}))


def read_recipe(place: str | Path) -> StoredRecipe:
    """The recipe in a file, or in the folder of a checkpoint.

    Raises:
        InvalidInput: no such file, no recipe, or a file beside it that is not the one it names; says which field is
            wrong.
    """
    path = user_path(place)
    if path.is_dir():
        path = path / FILE
    text = user_text(path, "recipe", "a recipe's .yaml", "a recipe's .yaml, or the folder of a checkpoint with one")
    name = repr(path.name[:80])
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InvalidInput(f"{name} is not a YAML file") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        shown = str(values.get("format"))[:40] if isinstance(values, dict) else type(values).__name__
        raise InvalidInput(f"{name}: format {shown!r} is not known; this version reads {FORMAT!r}")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(f"{name}: {said_of(error, 'no such field')}") from None
    weights = recipe.weights
    named = [recipe.shape, recipe.policy, *((weights.allocation, weights.metric_file) if weights else ())]
    attached = {one.file: _verified(path.parent, one, name) for one in named if one is not None}
    return StoredRecipe(recipe, attached)


def _verified(folder: Path, attached: Attached, recipe: str) -> str:
    text = user_text(folder / attached.file, "part of a recipe", "the file that the recipe names", "what belongs to it")
    found = _sha256(text)
    if found != attached.sha256:
        raise InvalidInput(
            f"{attached.file!r} is not the file that {recipe} names: its sha256 is {found[:12]}, not "
            f"{attached.sha256[:12]}"
        )
    return text


def criterion_of(stored: StoredRecipe) -> str | Criterion:
    """The metric of a recipe by which weights go, as `prune` takes it.

    Raises:
        InvalidInput: it is none, or a name that stands for another expression here.
    """
    weights = stored.recipe.weights
    assert weights is not None
    if weights.metric_file is not None:
        return PrunerZeroMetric(tree_from_json(stored.document(weights.metric_file)))
    if weights.expression is None:
        return weights.metric or "wanda"
    if weights.metric is None:
        return weights.expression
    known = load_metric(weights.metric)
    if not isinstance(known, Metric) or known.expression.text != weights.expression:
        here = known.expression.text if isinstance(known, Metric) else "no expression"
        raise InvalidInput(
            f"weights.expression: metric {weights.metric!r} is {here[:80]} here, not {weights.expression[:80]}: leave "
            "out one of the two"
        )
    return weights.metric


def spelled(plugin: Plugin) -> str:
    """A compressor as `prune` takes it: its name, and those parameters that are not as they are by default.

    Raises:
        UnknownName, InvalidInput: there is none, or not with these.
    """
    defaults = parameters_of(COMPRESSORS[plugin.name])
    words = [
        f"{name}={_word(value)}"
        for name, value in plugin.parameters.items()
        if name not in defaults or value != defaults[name]
    ]
    text = f"{plugin.name}:{','.join(words)}" if words else plugin.name
    compressor_of(text)
    return text


def _word(value: Any) -> str:
    if value is None:
        return "auto"
    return str(value).lower() if isinstance(value, bool) else str(value)


def of_weights(
    language_model: LanguageModel,
    loading: Mapping[str, Any],
    metric: str | Criterion,
    criterion: Criterion,
    *,
    rule: MaskRule,
    sparsity: float | None,
    compressor: str,
    allocation: Allocation | None,
    modules: bool,
    statistics: ModelStatistics | None,
    accumulation: Literal["dense", "path"],
    recovers: bool,
    text: Mapping[str, Any],
) -> StoredRecipe | None:
    """The recipe of what `prune` did by a metric or a compressor, without the recovery.

    Args:
        language_model, loading: the model, and how it was loaded.
        metric, criterion: as given, and as understood.
        rule: how many weights went.
        sparsity: as given, for thresholds.
        compressor: with its parameters.
        allocation: sparsity of each matrix; None if all had the same.
        modules: whether layers became modules.
        statistics: that were read.
        accumulation: what their text had gone through.
        recovers: whether a recovery reads text.
        text: calibration, as `collect_statistics` takes it.

    Returns:
        None for a criterion that only Python knows.
    """
    plugin = compressor_of(compressor)
    at_run_time = isinstance(plugin, AtRunTime)
    attached: dict[str, str] = {}
    facts: dict[str, Any] = {}
    if plugin.reads_criterion:
        if isinstance(criterion, Metric):
            facts["metric"] = criterion.expression.text
            if isinstance(metric, str) and metric.strip() in CRITERIA:
                facts |= {"metric": metric.strip(), "expression": criterion.expression.text}
        elif isinstance(criterion, PrunerZeroMetric):
            facts["metric"] = str(criterion.tree)
            facts["metric_file"] = _attach(attached, "metric.json", json.dumps(criterion.tree.to_json()) + "\n")
        else:
            names = [name for name in CRITERIA if CRITERIA[name] is criterion]
            if not names:
                return None
            facts["metric"] = names[0]
    # A group that a compressor has by itself cannot be asked for.
    chooses = not plugin.reads_criterion and rule.group not in plugin.groups
    if rule.pattern is None and allocation is None and not at_run_time and not chooses:
        facts["group"] = rule.group
    part = WeightsPart(
        sparsity=sparsity if at_run_time else rule.sparsity,
        pattern=str(rule) if rule.pattern else None,
        allocation=None if allocation is None else _attach(attached, "allocation.json", allocation_text(allocation)),
        compressor=Plugin(name=compressor.partition(":")[0], parameters=parameters_of(plugin)),
        accumulation=accumulation,
        **facts,
    )
    reads = statistics is not None or at_run_time
    calibration = _text(language_model, text, statistics) if reads else None
    if calibration is None and recovers:
        calibration = TextPart(text=public_name(text["calibration"]))
    form = "modules" if modules else "plain"
    recipe = _recipe(language_model, loading, weights=part, form=form, calibration=calibration, seed=text["seed"])
    return StoredRecipe(recipe, attached)


def of_shape(language_model: LanguageModel, loading: Mapping[str, Any], shape: Shape, **rest: Any) -> StoredRecipe:
    """The recipe of a cut to a shape; `rest` are `form`, `seed`, and `text` if a recovery reads any."""
    attached: dict[str, str] = {}
    part = _attach(attached, "shape.json", shape_text(shape))
    return StoredRecipe(_recipe(language_model, loading, shape=part, **_read_by_recovery(rest)), attached)


def of_policy(
    language_model: LanguageModel, loading: Mapping[str, Any], policy: LearnedPolicy, **rest: Any
) -> StoredRecipe:
    """The recipe of what a policy keeps; `rest` as of `of_shape`, and `refit` with `correction`.

    Where its text lies is left out.
    """
    said = policy.calibration
    if said is not None:
        policy = replace(policy, calibration=replace(said, text=public_name(said.text)))
    attached: dict[str, str] = {}
    part = _attach(attached, "policy.json", policy_text(policy))
    return StoredRecipe(_recipe(language_model, loading, policy=part, **_read_by_recovery(rest)), attached)


def of_method(
    language_model: LanguageModel,
    loading: Mapping[str, Any],
    method: str,
    parameters: Mapping[str, Any],
    sparsity: float | None,
    *,
    form: str,
    text: Mapping[str, Any],
) -> StoredRecipe:
    """The recipe of what a method did; arguments as of `prune_structure`, all `parameters` written out."""
    part = MethodPart(name=method, parameters=dict(parameters), sparsity=sparsity)
    calibration = _text(language_model, text, None)
    recipe = _recipe(language_model, loading, method=part, form=form, calibration=calibration, seed=text["seed"])
    return StoredRecipe(recipe)


def _read_by_recovery(rest: dict[str, Any]) -> dict[str, Any]:
    text = rest.pop("text")
    return {**rest, "calibration": None if text is None else TextPart(text=public_name(text))}


def _text(language_model: LanguageModel, text: Mapping[str, Any], statistics: ModelStatistics | None) -> TextPart:
    choice = token_choice(text.get("tokens", ALL_TOKENS))
    return TextPart(
        text=public_name(text["calibration"]),
        sequences=text["calibration_sequences"],
        window=default_window(language_model, text["calibration_window"]),
        tokens="all" if choice is None else AMIA,  # type: ignore[arg-type]
        choice={} if choice is None else asdict(choice),
        sha256=None if statistics is None else statistics.manifest["windows"],
    )


def _recipe(language_model: LanguageModel, loading: Mapping[str, Any], **parts: Any) -> Recipe:
    model, folder = language_model.model, language_model.folder
    # The Hub's cache names a folder by the commit.
    commit = folder.name if folder is not None and folder.parent.name == "snapshots" else None
    components = language_model.components
    return Recipe(
        format=FORMAT,  # type: ignore[arg-type]
        made_by={name: version(name) for name in ("evoprune", "torch", "transformers")},
        model=ModelPart(
            name=public_name(language_model.name),
            revision=commit or loading.get("revision"),
            architecture=type(model).__name__,
            fingerprint=language_model.fingerprint,
            dtype=str(model.dtype).removeprefix("torch."),
            device=language_model.device.type,
            components=None if components is None else list(components),
        ),
        threads=torch.get_num_threads(),
        **parts,
    )


def _attach(attached: dict[str, str], name: str, text: str) -> Attached:
    attached[name] = text
    return Attached(file=name, sha256=_sha256(text))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
