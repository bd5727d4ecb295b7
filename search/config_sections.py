"""Parts of a configuration that every kind of search has. A misspelt key is an error that names it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from evoprune.fitness.context import EvaluationContext
from evoprune.metrics.files import content_hash


class Section(BaseModel):
    """Options that belong together."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _inside(sparsity: float) -> float:
    if not 0 < sparsity < 1:  # a NaN is refused too
        raise ValueError(f"sparsity {sparsity} is not between 0 and 1: give the fraction to remove, such as 0.6")
    return sparsity


Sparsity = Annotated[float, AfterValidator(_inside)]
"""A fraction of weights to remove, in (0, 1)."""

Range = tuple[float, float]
"""The least and the most."""


def _is_range(ends: Any) -> bool:
    """Whether these are two different fractions, the lower first."""
    pair = isinstance(ends, (list, tuple)) and len(ends) == 2
    return pair and all(isinstance(end, (int, float)) for end in ends) and 0 < ends[0] < ends[1] < 1


def _ordered(ends: Range) -> Range:
    if not _is_range(ends):
        raise ValueError(
            f"{ends[0]:g} to {ends[1]:g} is no range of sparsities: give two different ones between 0 and 1, the lower "
            "first, such as 0.4 0.7"
        )
    return ends


SparsityRange = Annotated[Range, AfterValidator(_ordered)]
"""The least and the most that goes on a front, both in (0, 1)."""


def with_range(values: dict[str, Any], default: Range) -> dict[str, Any]:
    """Options of the target of a front with its range, and the sparsity in the middle unless there is one."""
    ends = values.get("sparsity_range") or default
    written = {**values, "sparsity_range": ends}
    if "sparsity" not in values and _is_range(ends):
        written["sparsity"] = round(sum(ends) / 2, 6)
    return written


def check_front(pareto: str | None, ends: Range | None, sparsity: float, winner: str) -> None:
    """Refuse a range without a front, and a sparsity outside the range.

    Args:
        winner: what the member at this sparsity is exported as.

    Raises:
        ValueError: says what would be right.
    """
    if ends is None:
        return
    if pareto is None:
        raise ValueError("a range of sparsities is that of a front: add --pareto parameters, or give one --sparsity")
    low, high = ends
    if not low <= sparsity <= high:
        raise ValueError(
            f"sparsity {sparsity:g} is outside the range {low:g} to {high:g}: it says which of the front is exported "
            f"as the {winner}"
        )


class ModelConfig(Section):
    """The model to prune."""

    name: str = Field("reference", description="`reference`, a folder, or a Hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the forward pass")
    device: str = Field("auto", description="cpu, cuda, cuda:1; auto takes a GPU if there is one")
    trust_remote_code: bool = Field(False, description="run Python code that the model brings along")


class DataConfig(Section):
    """The three disjoint texts: calibration (A), search (B), held-out (C)."""

    source: str = Field("corpus", description="text of B and C: corpus, a file, a folder, or a datasets name")
    window: int = Field(256, ge=8, description="tokens in a window")
    heldout_windows: int | None = Field(80, ge=2, description="windows of text C; none takes all")
    calibration: str | None = Field(None, description="text of A; none takes the same source")
    calibration_sequences: int = Field(64, ge=1, description="sequences for statistics")
    calibration_window: int = Field(256, ge=8, description="tokens in each of them")


class SearchConfig(Section):
    """What every search has."""

    kind: str
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: str = Field("kl", description="a name from `evoprune list objectives`")
    top_k: int | None = Field(
        None,
        ge=2,
        description="with the objective kl: compare by the KL over so many of the dense model's most likely tokens, "
        "both distributions renormalised over these; none takes the whole vocabulary. Held-out text always has all",
    )
    evaluations: int | None = Field(
        250,
        ge=1,
        description="candidates with a forward pass, at most; none leaves it to the minutes, and is the default then",
    )
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False, description="time for the search, at most")
    seed: int = Field(0, ge=0, lt=1 << 63, description="fixes texts A and B and the search")
    window: int = Field(16, ge=1, description="births that may wait for results; part of a run's identity")
    threads: int = Field(1, ge=1, description="torch threads of a worker on a CPU; part of a run's identity")
    seed_from: str | None = Field(None, description="an exported result or a run to start from")
    deadline: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto", description="seconds after which a worker counts as hung; auto takes many times what it should need"
    )
    numerics: Literal["strict", "relaxed"] = Field(
        "strict", description="refuse workers whose numbers differ in any bit, or take them and say so"
    )

    @model_validator(mode="before")
    @classmethod
    def _minutes_alone(cls, values: Any) -> Any:
        """A budget in minutes is one by itself: the default number of evaluations does not cut it short."""
        if isinstance(values, dict) and values.get("minutes") is not None and "evaluations" not in values:
            return {**values, "evaluations": None}
        return values

    @model_validator(mode="after")
    def _ends(self) -> SearchConfig:
        if self.evaluations is None and self.minutes is None:
            raise ValueError("a search needs an end: give --evaluations, --minutes or both")
        return self

    @model_validator(mode="after")
    def _divergence(self) -> SearchConfig:
        if self.top_k is not None and self.objective != "kl":
            raise ValueError(
                f"top_k={self.top_k} says over which tokens the KL is, and the objective is {self.objective}: leave it "
                "out, or give objective=kl"
            )
        return self

    @property
    def identity(self) -> str:
        """Hash of every option that a birth depends on: all but how long things may take."""
        return content_hash(self.model_dump(mode="json", exclude={"minutes", "deadline"}))

    @abstractmethod
    def context(self) -> EvaluationContext:
        """What workers have to know."""

    @property
    def aim(self) -> str:
        """How much goes, in a word or two."""
        return str(self.context().rule)


Config = TypeVar("Config", bound=SearchConfig)


def with_window(config: Config, window: int) -> Config:
    """The same configuration with the tokens that a sample has on average, where it is images that are read."""
    return config.model_copy(update={"data": config.data.model_copy(update={"window": window})})
