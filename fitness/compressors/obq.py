"""OBQ: what the mask of a criterion leaves is rounded to few values, one weight at a time, and the others adapt.

Source: Frantar and Alistarh 2022 (OBC, arXiv:2208.11580), section 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal, problem_of
from evoprune.fitness.gram import DAMPINGS
from evoprune.fitness.quantisation import check_bits
from evoprune.fitness.row_surgery import quantised
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Group


@dataclass(frozen=True)
class OBQ:
    """Refit what stays, then round it to a grid by row, one weight at a time, the others adapt (OBQ).

    Attributes:
        bits: of a weight, from 2 to 8; 16 leaves what the refit gives whole.
        symmetric: the grid reaches as far below zero as above.
        damping: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
    """

    bits: int = 4
    symmetric: bool = False
    damping: float = DAMPINGS[0]

    needs: ClassVar[frozenset[str]] = frozenset({"H"})
    reads_criterion: ClassVar[bool] = True
    keeps_mask: ClassVar[bool] = True
    keeps_weights: ClassVar[bool] = False
    groups: ClassVar[frozenset[Group]] = frozenset()
    cost: ClassVar[Cost] = "cubic by row"
    source: ClassVar[str] = "Frantar and Alistarh 2022 (OBC), arXiv:2208.11580"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_range("damping", self.damping, 0, 1)

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        problem = problem_of(weight, statistics["H"], self.damping)
        for goal in goals:
            assert goal.mask is not None
            yield quantised(problem, goal.mask, self.bits, self.symmetric), goal.mask


COMPRESSORS.add("obq", OBQ())
