"""Objectives: how good the pruned model in memory is, as one number per window, lower is better. One file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor

from evoprune.fitness.teacher import WindowLosses
from evoprune.metrics.criterion import Tags
from evoprune.metrics.registry import Registry

Role = Literal["quality", "cost", "predicted", "diagnostic"]


class Measured(Protocol):
    """What an objective may look at: the resident model with a candidate's masks applied."""

    def losses(self, first: int, last: int) -> WindowLosses:
        """Losses on windows `first` to `last` of text B."""

    def reconstruction_errors(self) -> Mapping[str, float]:
        """Relative output error of every site, by name, with the full Gram matrix of its inputs."""


class Objective(Protocol):
    """A quality or cost of the model in memory.

    Attributes:
        role: quality and cost may decide a winner; predicted and diagnostic may not.
        needs: statistics it reads.
        unit: of its value.
    """

    role: Role
    needs: frozenset[str]
    unit: str
    tags: Tags

    def measure(self, measured: Measured, first: int, last: int) -> Tensor:
        """[k] float64 values whose mean is the fitness: one a window from `first` to `last`, or one a site."""


OBJECTIVES: Registry[Objective] = Registry("objective", "evoprune.fitness.objectives")
