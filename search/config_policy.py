"""Every option of a policy search and its default."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.maskers import is_ranked
from evoprune.fitness.unit_criteria import UNIT_CRITERIA
from evoprune.metrics.errors import EvopruneError
from evoprune.metrics.exported import load_metric
from evoprune.metrics.records import parse_pattern
from evoprune.search.config_sections import SearchConfig, Section, Sparsity

DEFAULT_SPARSITY = 0.3
DEFAULT_UNITS = ("kv-group", "ranked:32")
DEFAULT_METRICS = ("magnitude", "nowag", "obs", "ria", "stade", "symwanda", "wanda")
"""Those that need no gradients."""
FIRST_METRIC = "wanda"
WEIGHTS = "weights"
"""The unit of per-group patterns."""


class PolicyTarget(Section):
    """What a mask keeps or removes as one, and how much goes."""

    sparsity: Sparsity | None = Field(
        None,
        description="fraction of what the heads and MLPs of all blocks cost that goes, in (0, 1); 0.3 unless given",
    )
    units: tuple[str, ...] = Field(
        DEFAULT_UNITS,
        description="what goes as one: kv-group, query-head, neuron, neurons:N (N consecutive ones), ranked:N (N that "
        "what the policy starts from ranks next to each other), attention, mlp, block",
    )
    cost: Literal["parameters", "flops"] = Field("parameters", description="what is counted")
    budget: Literal["global", "kind", "block"] = Field(
        "global",
        description="what has a budget of its own: all units together, by their costs; every kind of unit, by number; "
        "or every kind in every block",
    )
    drop: Literal["none", "parts"] = Field(
        "parts", description="whether a block may lose all units of a kind; else the best one of each stays"
    )
    pattern: str | None = Field(
        None, description="N:M, N kept of every M inputs, in place of units: which metric masks each matrix is learned"
    )
    metrics: tuple[str, ...] = Field(
        DEFAULT_METRICS, description="with a pattern, the metrics to choose from; with units weights, where it starts"
    )

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, values: Any) -> Any:
        """What follows from a pattern is written out: a resolved configuration says what is searched."""
        if not isinstance(values, dict):
            return values
        if values.get("pattern") is None:
            return {"sparsity": DEFAULT_SPARSITY, **values}
        return {"units": (), **values}

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                parse_pattern(pattern)
            except EvopruneError as error:
                raise ValueError(str(error)) from None
        return pattern

    @model_validator(mode="after")
    def _together(self) -> PolicyTarget:
        if self.pattern is None:
            if self.sparsity is None:
                raise ValueError("give --sparsity or --pattern, one of the two")
            if not self.units:
                raise ValueError(f"give --units, such as {','.join(DEFAULT_UNITS)}")
            if WEIGHTS in self.units:
                raise ValueError("single weights are learned in a pattern only: add --pattern 2:4")
            return self
        if self.sparsity is not None:
            raise ValueError("a pattern says how much goes: leave out --sparsity, or --pattern")
        if self.units not in ((), (WEIGHTS,)):
            raise ValueError("a pattern is of weights: leave out --units, or --pattern")
        if not self.metrics:
            raise ValueError("give --metrics to choose from, such as ria,wanda")
        return self


class PolicySearcher(Section):
    """How the policy learns."""

    name: str = Field("score-function", description="who moves the policy: a name from `evoprune list learners`")
    samples: int | Literal["auto"] = Field(8, description="masks of a step; auto follows how much steps agree")
    options: dict[str, Any] = Field(
        {}, description="further options of the learner, as `evoprune list learners` shows them"
    )
    prior: str = Field(
        "wanda-sp",
        description="what the policy starts from: a unit criterion, or a metric, a name, an expression or a file",
    )
    mapping: str = Field("logit-z", description="from scores to the first probabilities: logit-z, sigmap, norm ...")
    baselines: tuple[str, ...] = Field(
        ("flap", "magnitude", "wanda-sp"), description="unit criteria to compare the winner with"
    )
    windows: int = Field(128, ge=2, description="windows of text B that minibatches are drawn from")
    batch: int = Field(2, ge=1, description="windows of a minibatch, the same for all masks of a step")
    validation: int = Field(
        32, ge=2, description="further windows of text B, on which modes of the policy are compared"
    )
    validate_every: int = Field(20, ge=1, description="steps between two such comparisons")

    @field_validator("samples")
    @classmethod
    def _several(cls, samples: int | str) -> int | str:
        if isinstance(samples, int) and not 2 <= samples <= 4096:
            raise ValueError(f"{samples} masks of a step are out of range: give from 2 to 4096, such as 8")
        return samples

    @model_validator(mode="after")
    def _fitting(self) -> PolicySearcher:
        if self.batch > self.windows:
            raise ValueError(f"a minibatch of {self.batch} windows is more than the {self.windows} there are")
        return self


class PolicySearchConfig(SearchConfig):
    """A policy search, fully resolved."""

    @model_validator(mode="before")
    @classmethod
    def _of_weights(cls, values: Any) -> Any:
        """With a pattern the policy starts from a metric: Wanda, or the first to choose from if it is none of them."""
        target = values.get("target") if isinstance(values, dict) else None
        if not isinstance(target, dict) or target.get("pattern") is None:
            return values
        metrics = target.get("metrics") or DEFAULT_METRICS
        prior = FIRST_METRIC if FIRST_METRIC in metrics else metrics[0]
        return {**values, "searcher": {"prior": prior, **(values.get("searcher") or {})}}

    kind: Literal["policy"] = "policy"
    target: PolicyTarget = PolicyTarget(sparsity=DEFAULT_SPARSITY)
    searcher: PolicySearcher = PolicySearcher()
    objective: Literal["kl", "ce", "ce-residual"] = Field(
        "kl",
        description="what masks are compared by: KL from the dense model, cross entropy, or what of it exceeds the "
        "dense model's",
    )
    evaluations: int | None = Field(
        1500, ge=1, description="masks with a forward pass, at most; none leaves it to the minutes"
    )
    window: int = Field(64, ge=1, description="masks that may wait for results; changes no history")

    @model_validator(mode="after")
    def _enough(self) -> PolicySearchConfig:
        samples = self.searcher.samples
        # The first mode, one step, the mode after it, and up to three of them in the finals.
        least = (8 if samples == "auto" else samples) + 5
        if self.evaluations is not None and self.evaluations < least:
            raise ValueError(f"{self.evaluations} evaluations are less than one step takes: give at least {least}")
        return self

    @property
    def aim(self) -> str:
        target = self.target
        if target.pattern is not None:
            return target.pattern
        return f"{target.sparsity:g} of the {target.cost} of heads and MLPs"

    @property
    def masker(self) -> dict[str, Any]:
        """What masks mean, as jobs say it."""
        target = self.target
        if target.pattern is None:
            ranked = {"ranked_by": self.searcher.prior} if any(map(is_ranked, target.units)) else {}
            return {"kind": "units", "units": list(target.units), **ranked}
        if target.units:
            return {"kind": "weights", "pattern": target.pattern, "metric": target.metrics[0]}
        return {"kind": "metrics", "pattern": target.pattern, "metrics": list(target.metrics)}

    @property
    def text_windows(self) -> int:
        """Windows of text B in all."""
        return self.searcher.windows + self.searcher.validation

    @property
    def prior_criterion(self) -> str | None:
        """The unit criterion that the policy starts from; None where a metric is."""
        return self.searcher.prior if self.searcher.prior in UNIT_CRITERIA else None

    def context(self) -> EvaluationContext:
        """What workers have to know."""
        needs: set[str] = set()
        if self.target.pattern is None:
            for name in {*self.searcher.baselines, self.searcher.prior} & {*UNIT_CRITERIA}:
                needs |= UNIT_CRITERIA[name].needs
            if self.prior_criterion is None:
                needs |= load_metric(self.searcher.prior).needs
        else:
            for name in self.target.metrics:
                needs |= load_metric(name).needs
        pattern = None if self.target.pattern is None else parse_pattern(self.target.pattern)
        return EvaluationContext(
            model=self.model.name,
            revision=self.model.revision,
            dtype=self.model.dtype,
            device=self.model.device,
            trust_remote_code=self.model.trust_remote_code,
            data=self.data.source,
            seed=self.seed,
            window=self.data.window,
            rungs=(self.searcher.batch, self.text_windows),
            heldout_windows=self.data.heldout_windows,
            calibration=self.data.calibration or self.data.source,
            calibration_sequences=self.data.calibration_sequences,
            calibration_window=self.data.calibration_window,
            statistics=tuple(sorted(needs)),
            objective="kl",
            top_k=self.top_k,
            sparsity=self.target.sparsity,
            pattern=pattern,
            group="row",
            threads=self.threads,
        )
