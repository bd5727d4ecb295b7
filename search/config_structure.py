"""Every option of a structure search and its default."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.unit_criteria import UNIT_CRITERIA
from evoprune.search.config_allocation import GenerationsConfig, StageConfig
from evoprune.search.config_sections import SearchConfig, Section, Sparsity
from evoprune.search.spaces.part_genes import Heads

DEFAULT_SPARSITY = 0.25
StructureSearcher = Literal["evolution"]
STRUCTURE_SEARCHERS: tuple[str, ...] = get_args(StructureSearcher)


class StructureTarget(Section):
    """How much of the heads and MLPs goes, and in which pieces."""

    sparsity: Sparsity = Field(
        DEFAULT_SPARSITY, description="fraction of what the heads and MLPs of all blocks cost that goes, in (0, 1)"
    )
    cost: Literal["parameters", "flops", "kv_bytes"] = Field(
        "parameters",
        description="what is counted: parameters, operations of a forward pass, or bytes of the cache for each token",
    )
    sequence: int = Field(2048, ge=1, description="tokens of the forward pass whose operations are counted")
    heads: Heads = Field(
        "both",
        description="how attention shrinks: whole KV groups, as many query heads in every group, or both",
    )
    step: int | None = Field(
        None, ge=1, description="neurons that an MLP loses or gains at a time; none takes a thirty-second of them"
    )
    drop: Literal["none", "parts"] = Field(
        "parts", description="whether the attention or the MLP of a block may go as a whole"
    )
    accumulation: Literal["dense", "expectation"] = Field(
        "expectation",
        description="what calibration text has gone through when it reaches a block: dense blocks, or a mixture of cut "
        "ones",
    )


class StructureGenerations(GenerationsConfig):
    """How a generation is bred and selected."""

    name: StructureSearcher = Field("evolution", description="who breeds")
    stages: tuple[StageConfig, ...] = Field(
        (
            StageConfig(windows=4, survivors=8),
            StageConfig(windows=16, survivors=3),
            StageConfig(windows=64, survivors=1),
        ),
        description="each with more text for fewer candidates; the last keeps one, the next parent",
    )
    seeds: tuple[str, ...] | None = Field(None, description="criteria of units to start from; none takes all")


class StructureSearchConfig(SearchConfig):
    """A structure search, fully resolved."""

    kind: Literal["structure"] = "structure"
    target: StructureTarget = StructureTarget()
    searcher: StructureGenerations = StructureGenerations()
    objective: Literal["kl"] = Field("kl", description="what candidates are compared by")
    evaluations: int | None = Field(
        500,
        ge=1,
        description="candidates with a forward pass, at most; none leaves it to the minutes, and is the default then",
    )
    window: int = Field(64, ge=1, description="candidates that may wait for results; changes no history")

    @model_validator(mode="after")
    def _fitting(self) -> StructureSearchConfig:
        first, last = self.searcher.stages[0], self.searcher.stages[-1]
        if first.survivors > self.searcher.offspring:
            raise ValueError(
                f"{first.survivors} of {self.searcher.offspring} offspring cannot go on: give --population "
                f"{first.survivors} or more, or stages with fewer survivors"
            )
        if last.windows > self.searcher.windows:
            raise ValueError(f"the last stage wants {last.windows} windows, and there are {self.searcher.windows}")
        return self

    @property
    def aim(self) -> str:
        return f"{self.target.sparsity:g} of the {self.target.cost} of heads and MLPs"

    @property
    def seeds(self) -> tuple[str, ...]:
        """Criteria of units to start from, by name."""
        return tuple(sorted(UNIT_CRITERIA)) if self.searcher.seeds is None else self.searcher.seeds

    def context(self) -> EvaluationContext:
        """What workers have to know."""
        needs = frozenset[str]().union(*(UNIT_CRITERIA[name].needs for name in self.seeds))
        return EvaluationContext(
            model=self.model.name,
            revision=self.model.revision,
            dtype=self.model.dtype,
            device=self.model.device,
            trust_remote_code=self.model.trust_remote_code,
            data=self.data.source,
            seed=self.seed,
            window=self.data.window,
            rungs=tuple(sorted({self.searcher.stages[0].windows, self.searcher.windows})),
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
