"""Every option of an allocation search and its default."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator, model_validator

from evoprune.fitness.allocators import ALLOCATORS, configured
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.site_statistics import reading
from evoprune.metrics.exported import load_metric
from evoprune.search.breeders import breeder_of
from evoprune.search.config_sections import SearchConfig, Section

DEFAULT_SPARSITY = 0.6


class AllocationTarget(Section):
    """How much of all prunable weights goes, and by which scores."""

    sparsity: float = Field(DEFAULT_SPARSITY, description="fraction of all prunable weights to remove, in (0, 1)")
    metric: str = Field("wanda", description="the criterion inside: a name, an expression, or an exported file")
    granularity: Literal["matrix", "block", "kind"] = Field(
        "matrix", description="what has a level of its own: every matrix, every block, or every kind of matrix"
    )
    drop: Literal["none", "parts", "blocks"] = Field(
        "none", description="what may go as a whole: the attention or the MLP of a block, or whole blocks"
    )
    drop_only: bool = Field(False, description="drop parts or blocks, and prune nothing else")

    @field_validator("sparsity")
    @classmethod
    def _between(cls, sparsity: float) -> float:
        if not 0 < sparsity < 1:  # a NaN is refused too
            raise ValueError(f"sparsity {sparsity} is not between 0 and 1: give the fraction to remove, such as 0.6")
        return sparsity

    @model_validator(mode="after")
    def _together(self) -> AllocationTarget:
        if self.drop_only and self.drop == "none":
            raise ValueError("drop_only needs something to drop: give --drop parts or --drop blocks")
        if self.drop != "none" and not self.drop_only and self.granularity != "matrix":
            raise ValueError("parts can be dropped beside levels of matrices only: leave the granularity at matrix")
        return self


class StageConfig(Section):
    """One round of selection in a generation."""

    windows: int = Field(ge=1, description="of text B, drawn anew in every generation")
    survivors: int = Field(ge=1, description="candidates that go on")


class GenerationsConfig(Section):
    """How a generation is bred and selected."""

    name: str = Field("evolution", description="who breeds: a name from `evoprune list searchers`")
    offspring: int = Field(32, ge=2, description="children of a generation")
    stages: tuple[StageConfig, ...] = Field(
        (
            StageConfig(windows=4, survivors=8),
            StageConfig(windows=16, survivors=3),
            StageConfig(windows=64, survivors=1),
        ),
        description="each with more text for fewer candidates; the last keeps one, the next parent",
    )
    windows: int = Field(192, ge=1, description="of text B in all; the seeds and the finalists are measured on all")
    seeds: tuple[str, ...] | None = Field(None, description="allocators to start from; none takes all")
    terminals: tuple[str, ...] | None = Field(
        None, description="what formulas may read of a matrix (`evoprune list terminals`); none takes all"
    )

    @model_validator(mode="after")
    def _narrowing(self) -> GenerationsConfig:
        stages = self.stages
        if len(stages) < 2 or stages[-1].survivors != 1:
            raise ValueError("there must be 2 stages or more, and the last has 1 survivor, the next parent")
        for first, second in pairwise(stages):
            if second.windows <= first.windows or second.survivors >= first.survivors:
                raise ValueError("each stage must have more windows and fewer survivors than the one before")
        if stages[0].survivors > self.offspring:
            raise ValueError(
                f"{stages[0].survivors} of {self.offspring} offspring cannot go on: give --population "
                f"{stages[0].survivors} or more, or stages with fewer survivors"
            )
        if stages[-1].windows > self.windows:
            raise ValueError(f"the last stage wants {stages[-1].windows} windows, and there are {self.windows}")
        return self


class AllocationSearchConfig(SearchConfig):
    """An allocation search, fully resolved."""

    kind: Literal["allocation"] = "allocation"
    target: AllocationTarget = AllocationTarget()
    searcher: GenerationsConfig = GenerationsConfig()
    objective: Literal["kl"] = Field("kl", description="what candidates are compared by")
    evaluations: int | None = Field(
        500,
        ge=1,
        description="candidates with a forward pass, at most; none leaves it to the minutes, and is the default then",
    )
    window: int = Field(64, ge=1, description="candidates that may wait for results; changes no history")

    @property
    def seeds(self) -> tuple[str, ...]:
        """Allocators to start from, by name; uniform first, for everything is compared with it."""
        names = self.searcher.seeds if self.searcher.seeds is not None else tuple(ALLOCATORS)
        return ("uniform", *(name for name in sorted(names) if name != "uniform"))

    @property
    def terminals(self) -> tuple[str, ...]:
        """What is measured of each matrix for whoever breeds; nothing for most."""
        reads, chosen = breeder_of(self.searcher.name).reads, self.searcher.terminals
        return tuple(name for name in reads if chosen is None or name in chosen)

    def context(self) -> EvaluationContext:
        """What workers have to know."""
        criterion = load_metric(self.target.metric)
        needs = criterion.needs.union(*(configured(name).needs for name in self.seeds), reading(self.terminals).needs)
        stages = self.searcher.stages
        return EvaluationContext(
            model=self.model.name,
            revision=self.model.revision,
            dtype=self.model.dtype,
            device=self.model.device,
            trust_remote_code=self.model.trust_remote_code,
            data=self.data.source,
            seed=self.seed,
            window=self.data.window,
            rungs=tuple(sorted({stages[0].windows, self.searcher.windows})),
            heldout_windows=self.data.heldout_windows,
            calibration=self.data.calibration or self.data.source,
            calibration_sequences=self.data.calibration_sequences,
            calibration_window=self.data.calibration_window,
            statistics=tuple(sorted(needs)),
            objective=self.objective,
            sparsity=self.target.sparsity,
            group="row",
            threads=self.threads,
        )
