"""Every option of a metric search and its default."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from evoprune.fitness.context import EvaluationContext
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import to_json
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import GROUPS, MaskRule, parse_pattern
from evoprune.metrics.terminals import STATISTICS, TERMINALS
from evoprune.search.config_sections import SearchConfig, Section, Sparsity
from evoprune.search.given import read_named
from evoprune.search.removal import COMPRESSOR, followed_by

# Forward, backward and Hessian statistics that a search may read unless told otherwise.
DEFAULT_STATISTICS = ("X_l2", "X_l1", "X_mean", "X_var", "X_max", "Y_l2", "G_l2", "G_l1", "G_mean", "Hinv")

_SQUARES = {"X_l2": "X_ss", "Y_l2": "Y_ss"}


DEFAULT_SPARSITY = 0.6


class TargetConfig(Section):
    """How much goes, and what is compared."""

    sparsity: Sparsity | None = Field(None, description="fraction to remove, in (0, 1); 0.6 unless there is a pattern")
    pattern: str | None = Field(None, description="N:M, N kept of every M")
    group: Literal["row", "layer", "global"] = Field("row", description="what scores are compared within")
    allocation: str | None = Field(
        None,
        description="a file of sparsities, one for each matrix, or a run that left one; its budget is the sparsity",
    )
    compressor: str = Field("mask", description=COMPRESSOR)

    @model_validator(mode="before")
    @classmethod
    def _neither(cls, values: Any) -> Any:
        """The default is written out, so that a resolved configuration says what is removed."""
        if isinstance(values, dict) and values.get("sparsity") is None and values.get("pattern") is None:
            allocation = values.get("allocation")
            budget = read_named(allocation).sparsity if isinstance(allocation, str) else DEFAULT_SPARSITY
            return {**values, "sparsity": budget}
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
        if self.pattern is not None:
            parse_pattern(self.pattern)
        assert self.group in GROUPS
        if self.allocation is not None and self.pattern is not None:
            raise ValueError("a pattern fixes the sparsity of every row: give --allocation or --pattern, not both")
        if self.allocation is not None and self.group != "row":
            raise ValueError(f"an allocation counts by row: leave out --group {self.group}")
        return self

    @property
    def rule(self) -> MaskRule:
        """The mask rule."""
        if self.pattern is not None:
            return MaskRule(None, parse_pattern(self.pattern), "row")
        return MaskRule(self.sparsity, None, self.group)

    def given(self) -> Allocation | None:
        """The allocation as its file has it now.

        Raises:
            InvalidInput: it cannot be read, or its budget is not the sparsity.
        """
        if self.allocation is None:
            return None
        allocation = read_named(self.allocation)
        if allocation.sparsity != self.sparsity:
            raise InvalidInput(
                f"the allocation's budget is a sparsity of {allocation.sparsity:g}, not {self.sparsity:g}: "
                f"give {allocation.sparsity:g} or none"
            )
        return allocation


class RacingConfig(Section):
    """More tokens for fewer candidates."""

    rule: str = Field("halving", description="who goes on: a name of `evoprune.search.racing`")
    rungs: tuple[int, ...] = Field((4, 16, 64, 192), description="windows of text B seen up to each rung")
    keep: float = Field(0.25, gt=0, le=1, description="share that goes on to the next rung")
    uniform: float = Field(0.1, ge=0, le=1, description="share that goes on whatever its fitness")
    finalists: int = Field(4, ge=1, description="best of the last rung, compared once more; the power product joins")
    final_windows: int = Field(
        192, ge=0, description="of text B beside those of the last rung, as far as there are any, for the finalists"
    )

    @field_validator("rungs")
    @classmethod
    def _increasing(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if not rungs or rungs[0] < 1 or any(b <= a for a, b in pairwise(rungs)):
            raise ValueError("rungs are numbers of windows that increase, such as [4, 16, 64]")
        return rungs


class SearcherConfig(Section):
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


class MetricSearchConfig(SearchConfig):
    """A metric search, fully resolved."""

    kind: Literal["metric"] = "metric"
    target: TargetConfig = TargetConfig()
    racing: RacingConfig = RacingConfig()
    searcher: SearcherConfig = SearcherConfig()
    statistics: tuple[str, ...] = Field(
        DEFAULT_STATISTICS, validate_default=True, description="statistics that candidates may read"
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

    @property
    def terminals(self) -> frozenset[str]:
        """Names that candidates may read: the statistics, and what needs no data."""
        return frozenset(self.statistics) | (frozenset(TERMINALS) - STATISTICS)

    @property
    def aim(self) -> str:
        allocated = "" if self.target.allocation is None else " by an allocation"
        return f"{self.target.rule}{allocated}{followed_by(self.target.compressor)}"

    def context(self) -> EvaluationContext:
        """What workers have to know.

        Raises:
            InvalidInput: see `TargetConfig.given`.
        """
        rule, allocation = self.target.rule, self.target.given()
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
            final_windows=self.racing.final_windows,
            heldout_windows=self.data.heldout_windows,
            calibration=self.data.calibration or self.data.source,
            calibration_sequences=self.data.calibration_sequences,
            calibration_window=self.data.calibration_window,
            statistics=self.statistics,
            objective=self.objective,
            top_k=self.top_k,
            sparsity=rule.sparsity,
            pattern=rule.pattern,
            group=rule.group,
            allocation=None if allocation is None else to_json(allocation),
            compressor=self.target.compressor,
            threads=self.threads,
        )
