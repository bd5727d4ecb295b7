"""Every option of a joint search and its default."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from evoprune.fitness.context import EvaluationContext
from evoprune.search.config_allocation import DEFAULT_GRID, DEFAULT_SPARSITY, GenerationsConfig
from evoprune.search.config_metric import DEFAULT_STATISTICS, MetricSearchConfig, RacingConfig, SearcherConfig
from evoprune.search.config_sections import SearchConfig, Section, Sparsity
from evoprune.search.removal import COMPRESSOR


class JointTarget(Section):
    """How much of all prunable weights goes, and how it may be shared out."""

    sparsity: Sparsity = Field(DEFAULT_SPARSITY, description="fraction of all prunable weights to remove, in (0, 1)")
    granularity: Literal["matrix", "block", "kind"] = Field(
        "matrix", description="what has a level of its own: every matrix, every block, or every kind of matrix"
    )
    compressor: str = Field("mask", description=COMPRESSOR)
    grid: int | tuple[int, ...] = Field(
        DEFAULT_GRID, description="for a compressor that changes weights: the levels of the allocation searches"
    )


class MetricPart(Section):
    """How metrics are searched, as in a metric search."""

    racing: RacingConfig = RacingConfig()
    searcher: SearcherConfig = SearcherConfig()
    statistics: tuple[str, ...] = Field(DEFAULT_STATISTICS, description="statistics that metrics may read")


class AllocationPart(Section):
    """How allocations are searched, as in an allocation search."""

    searcher: GenerationsConfig = GenerationsConfig()


class JointSearchConfig(SearchConfig):
    """A joint search, fully resolved: metrics and allocations in turn, each at what the other found."""

    kind: Literal["joint"] = "joint"
    target: JointTarget = JointTarget()
    rounds: int = Field(2, ge=1, le=50, description="of a metric search, then an allocation search")
    metric_share: float = Field(
        0.4,
        gt=0,
        lt=1,
        description="of the budget for the metric searches, alike in all rounds; allocations get the rest",
    )
    metric: MetricPart = MetricPart()
    allocation: AllocationPart = AllocationPart()
    objective: Literal["kl"] = Field("kl", description="what candidates are compared by")
    evaluations: int | None = Field(
        1000,
        ge=1,
        description="candidates with a forward pass in all rounds, at most; none leaves it to the minutes, and is the "
        "default then",
    )

    @model_validator(mode="after")
    def _enough(self) -> JointSearchConfig:
        if self.evaluations is not None and min(self.shares) < 1:
            raise ValueError(
                f"{self.evaluations} evaluations leave a step without any: give more, fewer rounds, or another "
                "metric_share"
            )
        return self

    @property
    def weights(self) -> list[float]:
        """The share of the budget of each step; all together 1."""
        return [self.metric_share / self.rounds, (1 - self.metric_share) / self.rounds] * self.rounds

    @property
    def shares(self) -> list[int]:
        """The evaluations of each step, which add up to the budget.

        Raises:
            TypeError: there is no budget in evaluations.
        """
        if self.evaluations is None:
            raise TypeError("no budget in evaluations to share out")
        spent, ends = 0.0, [0]
        for weight in self.weights:
            spent += weight
            ends.append(round(self.evaluations * spent))
        return [end - begin for begin, end in pairwise(ends)]

    def metric_values(self, step: int, *, seed_from: str | None, allocation: Path | None) -> dict[str, Any]:
        """The configuration of a step that searches metrics, as plain values.

        Args:
            step: its number, from 0.
            seed_from: the metric to start from, or a run of such.
            allocation: file of the sparsities that candidates are masked at; None for uniform sparsity.
        """
        target = {
            **self.target.model_dump(mode="json", include={"sparsity", "compressor"}),
            "allocation": None if allocation is None else str(allocation),
        }
        return {
            **self._common(step),
            **self.metric.model_dump(mode="json"),
            "kind": "metric",
            "target": target,
            "window": self.window,
            "seed_from": seed_from,
        }

    def allocation_values(self, step: int, *, metric: str, seed_from: Path | None) -> dict[str, Any]:
        """The configuration of a step that searches allocations, as plain values.

        Args:
            step: its number, from 0.
            metric: the expression inside.
            seed_from: file of the allocation to start from.
        """
        return {
            **self._common(step),
            **self.allocation.model_dump(mode="json"),
            "kind": "allocation",
            "target": {**self.target.model_dump(mode="json"), "metric": metric},
            "seed_from": None if seed_from is None else str(seed_from),
        }

    def _common(self, step: int) -> dict[str, Any]:
        """What all steps have, and this one's part of the budget. One seed for all: they read the same texts."""
        shared = self.model_dump(
            mode="json", include={"model", "data", "objective", "top_k", "seed", "threads", "deadline", "numerics"}
        )
        return {
            **shared,
            "evaluations": None if self.evaluations is None else self.shares[step],
            "minutes": None if self.minutes is None else self.minutes * self.weights[step],
        }

    def context(self) -> EvaluationContext:
        """What workers have to know: what those of the first step do, so that both prepare the same."""
        return MetricSearchConfig.model_validate(self.metric_values(0, seed_from=None, allocation=None)).context()
