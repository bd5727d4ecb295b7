"""The mask of a criterion, and the weights on it that change the outputs of the layer least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal, problem_of
from evoprune.fitness.gram import DAMPINGS
from evoprune.fitness.masked_refit import ITERATIONS, refit
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Group


@dataclass(frozen=True)
class Refit:
    """Refit what stays by least squares on the outputs of the layer.

    Attributes:
        damping: what pulls the weights towards what they were, as a fraction of the mean square of the inputs.
        steps: of conjugate gradients, at most; far fewer do all but nothing worse, and searches repeat them for every
            candidate. Published: 10.
    """

    damping: float = DAMPINGS[0]
    steps: int = ITERATIONS

    needs: ClassVar[frozenset[str]] = frozenset({"H"})
    reads_criterion: ClassVar[bool] = True
    keeps_mask: ClassVar[bool] = True
    keeps_weights: ClassVar[bool] = False
    groups: ClassVar[frozenset[Group]] = frozenset()
    cost: ClassVar[Cost] = "linear"
    source: ClassVar[str] = "Meng et al. 2024 (ALPS), arXiv:2406.07831"

    def __post_init__(self) -> None:
        check_range("damping", self.damping, 0, 1)
        check_range("steps", self.steps, 1, 10_000)

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        hessian = problem_of(weight, statistics["H"], self.damping).hessian.float()
        for goal in goals:
            assert goal.mask is not None
            yield refit(weight, goal.mask, hessian, self.steps), goal.mask


COMPRESSORS.add("refit", Refit())
