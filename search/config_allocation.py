"""Every option of an allocation search and its default."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from evoprune.fitness.allocators import ALLOCATORS, configured
from evoprune.fitness.compressors import compressor_of, stores_weights
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.site_statistics import reading
from evoprune.fitness.statistics_passes import GRADIENT_NAMES
from evoprune.metrics.exported import load_metric
from evoprune.metrics.records import LEVELS
from evoprune.search.breeders import breeder_of
from evoprune.search.config_sections import (
    Range,
    SearchConfig,
    Section,
    Sparsity,
    SparsityRange,
    check_front,
    with_range,
)
from evoprune.search.removal import COMPRESSOR
from evoprune.search.spaces.levels import reference_name, spread_levels

DEFAULT_SPARSITY = 0.6
DEFAULT_GRID = 16
DEFAULT_RANGE: Range = (0.4, 0.7)
# Where whole parts go, a model is soon ruined.
DEFAULT_DROP_RANGE: Range = (0.1, 0.5)


class AllocationTarget(Section):
    """How much of all prunable weights goes, and by which scores."""

    sparsity: Sparsity = Field(
        DEFAULT_SPARSITY,
        description="fraction of all prunable weights to remove, in (0, 1); of a front, which member is exported as "
        "the allocation: the middle of its range unless given",
    )
    pareto: Literal["parameters", "flops", "latency"] | None = Field(
        None, description="search a front of quality against this cost, in place of one allocation"
    )
    sparsity_range: SparsityRange | None = Field(
        None, description="of a front, the least and the most that goes; 0.4 and 0.7, or 0.1 and 0.5 with drop_only"
    )
    metric: str = Field("wanda", description="the criterion inside: a name, an expression, or an exported file")
    compressor: str = Field("mask", description=COMPRESSOR)
    grid: int | tuple[int, ...] = Field(
        DEFAULT_GRID,
        description="for a compressor that changes weights, whose levels are stored: how many around the target beside "
        "the most that can go, or which, in 256ths",
    )
    granularity: Literal["matrix", "block", "kind"] = Field(
        "matrix", description="what has a level of its own: every matrix, every block, or every kind of matrix"
    )
    drop: Literal["none", "parts", "blocks"] = Field(
        "none", description="what may go as a whole: the attention or the MLP of a block, or whole blocks"
    )
    drop_only: bool = Field(False, description="drop parts or blocks, and prune nothing else")

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, values: Any) -> Any:
        """The defaults of a front are written out, so that a resolved configuration says what is removed."""
        if not isinstance(values, dict) or values.get("pareto") is None:
            return values
        return with_range(values, DEFAULT_DROP_RANGE if values.get("drop_only") else DEFAULT_RANGE)

    @field_validator("grid")
    @classmethod
    def _within(cls, grid: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(grid, int):
            if not 4 <= grid <= 128:
                raise ValueError(f"{grid} levels are out of range: give from 4 to 128, such as 16, or a list of levels")
        elif not grid or not all(0 < level < LEVELS for level in grid) or sorted(set(grid)) != list(grid):
            raise ValueError(
                f"{str(list(grid))[:60]} is no grid: give levels from 1 to {LEVELS - 1} in ascending order, each 256 "
                "times a sparsity, such as [96, 128, 160, 192]"
            )
        return grid

    @property
    def reference(self) -> str:
        """What everything is compared with, by name; see `LevelSpace.even`."""
        return reference_name(self.drop_only)

    @property
    def reads_criterion(self) -> bool:
        """Whether the metric decides what goes, beside being what allocators read."""
        return compressor_of(self.compressor).reads_criterion

    @property
    def stored(self) -> tuple[int, ...] | None:
        """The levels that are stored, in 256ths; None where masks give all of them."""
        if not stores_weights(self.compressor):
            return None
        if not isinstance(self.grid, int):
            return self.grid
        return spread_levels(self.sparsity_range or (self.sparsity, self.sparsity), self.grid)

    @model_validator(mode="after")
    def _together(self) -> AllocationTarget:
        if self.drop_only and self.drop == "none":
            raise ValueError("drop_only needs something to drop: give --drop parts or --drop blocks")
        if self.drop != "none" and not self.drop_only and self.granularity != "matrix":
            raise ValueError("parts can be dropped beside levels of matrices only: leave the granularity at matrix")
        check_front(self.pareto, self.sparsity_range, self.sparsity, "allocation")
        if self.pareto == "latency" and self.drop == "none":
            raise ValueError(
                "zeros make nothing faster, so masks have no latency: add --drop parts or --drop blocks, or choose "
                "--pareto parameters or flops"
            )
        return self


class StageConfig(Section):
    """One round of selection in a generation."""

    windows: int = Field(ge=1, description="of text B, drawn anew in every generation unless the searcher keeps them")
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
    crossover: bool = Field(
        True,
        description="bring together what the best children of a parent changed, in a few children of the next "
        "generation; evolution only",
    )
    surrogate: bool = Field(
        False,
        description="draw four proposals for a child and measure those that a regression on earlier generations likes "
        "best, and a quarter without asking it; evolution only",
    )
    windows: int = Field(192, ge=1, description="of text B in all, which finalists are measured on")
    seeds: tuple[str, ...] | None = Field(
        None, description="allocators to start from; none takes all but slow ones and those that need gradients"
    )
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
        return self

    def check_stages(self) -> None:
        """Refuse stages that want more children or text than there are.

        Raises:
            ValueError: says what would be right.
        """
        first, last = self.stages[0], self.stages[-1]
        if first.survivors > self.offspring:
            raise ValueError(
                f"{first.survivors} of {self.offspring} offspring cannot go on: give --population {first.survivors} "
                "or more, or stages with fewer survivors"
            )
        if last.windows > self.windows:
            raise ValueError(f"the last stage wants {last.windows} windows, and there are {self.windows}")


def seed_stage(stages: int) -> int:
    """Which of so many stages has as much text as seeds are measured on: the last but one."""
    return max(stages - 2, 0)


class FrontConfig(Section):
    """How a front is searched; read where the target is one."""

    windows: int = Field(16, ge=1, description="of text B that candidates are measured on, the same in all generations")
    budgets: int = Field(3, ge=2, description="sparsities, spread over the range, that allocators are asked for")
    crossover: float = Field(0.5, ge=0, le=1, description="share of children that have two parents")
    members: int = Field(12, ge=2, description="of the front, at most, that are measured on held-out text")

    def check(self, searcher: GenerationsConfig) -> None:
        """Refuse generations that NSGA-II cannot breed, or more text than there is.

        Raises:
            ValueError: says what would be right.
        """
        if searcher.surrogate:
            raise ValueError("a surrogate chooses among switches at one budget: leave it out, or the front")
        if searcher.offspring % 4:
            raise ValueError(f"NSGA-II draws parents by fours: give --population {-(-searcher.offspring // 4) * 4}")
        if self.windows > searcher.windows:
            raise ValueError(f"candidates of a front want {self.windows} windows, there are {searcher.windows}")

    def spread(self, ends: Range) -> tuple[float, ...]:
        """The sparsities that seeds are asked for, from one end of the range to the other."""
        low, high = ends
        return tuple(round(low + (high - low) * at / (self.budgets - 1), 6) for at in range(self.budgets))


class AllocationSearchConfig(SearchConfig):
    """An allocation search, fully resolved."""

    kind: Literal["allocation"] = "allocation"
    target: AllocationTarget = AllocationTarget()
    searcher: GenerationsConfig = GenerationsConfig()
    front: FrontConfig = FrontConfig()
    objective: Literal["kl"] = Field("kl", description="what candidates are compared by")
    evaluations: int | None = Field(
        500,
        ge=1,
        description="candidates with a forward pass, at most; none leaves it to the minutes, and is the default then",
    )
    window: int = Field(64, ge=1, description="candidates that may wait for results; changes no history")

    @model_validator(mode="after")
    def _fitting(self) -> AllocationSearchConfig:
        searcher = self.searcher
        if searcher.surrogate and (searcher.name != "evolution" or self.target.pareto is not None):
            raise ValueError(
                "a surrogate chooses among level switches at one budget: leave it out, or the other searcher or front"
            )
        if self.target.pareto is None:
            searcher.check_stages()
            return self
        if searcher.name != "evolution":
            raise ValueError(
                f"searcher {searcher.name!r} breeds at one budget: a front is bred by NSGA-II, without one"
            )
        self.front.check(searcher)
        return self

    @property
    def aim(self) -> str:
        if self.target.sparsity_range is None:
            return super().aim
        return "{:g} to {:g}".format(*self.target.sparsity_range)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Sparsities that allocators are asked for: the target's, or those spread over the range of a front."""
        if self.target.sparsity_range is None:
            return (self.target.sparsity,)
        return self.front.spread(self.target.sparsity_range)

    @property
    def first_windows(self) -> int:
        """Windows of text B that every candidate is measured on."""
        return self.searcher.stages[0].windows if self.target.pareto is None else self.front.windows

    @property
    def seeds(self) -> tuple[str, ...]:
        """Allocators to start from, by name; uniform first, if it is the reference."""
        chosen = self.searcher.seeds
        names = tuple(name for name in ALLOCATORS if _starts_searches(name)) if chosen is None else chosen
        first = () if self.target.drop_only else ("uniform",)
        return (*first, *(name for name in sorted(names) if name != "uniform"))

    @property
    def terminals(self) -> tuple[str, ...]:
        """What is measured of each matrix for whoever breeds; nothing for most."""
        reads, chosen = breeder_of(self.searcher.name).reads, self.searcher.terminals
        return tuple(name for name in reads if chosen is None or name in chosen)

    def context(self) -> EvaluationContext:
        """What workers have to know."""
        criterion = load_metric(self.target.metric)
        needs = criterion.needs.union(
            *(configured(name).needs for name in self.seeds),
            reading(self.terminals).needs,
            compressor_of(self.target.compressor).needs,
        )
        return EvaluationContext(
            model=self.model.name,
            revision=self.model.revision,
            dtype=self.model.dtype,
            device=self.model.device,
            trust_remote_code=self.model.trust_remote_code,
            data=self.data.source,
            seed=self.seed,
            window=self.data.window,
            rungs=tuple(sorted({self.first_windows, self.searcher.windows})),
            heldout_windows=self.data.heldout_windows,
            calibration=self.data.calibration or self.data.source,
            calibration_sequences=self.data.calibration_sequences,
            calibration_window=self.data.calibration_window,
            statistics=tuple(sorted(needs)),
            objective=self.objective,
            top_k=self.top_k,
            sparsity=self.target.sparsity,
            group="row",
            threads=self.threads,
        )


def _starts_searches(name: str) -> bool:
    """Whether an allocator is a seed by default: forward passes alone answer it, and not hundreds of them."""
    allocator = ALLOCATORS[name]
    return not (allocator.uses & {"gradients", "losses by matrix"} or allocator.needs & GRADIENT_NAMES)
