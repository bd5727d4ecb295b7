"""ALPS: which weights stay is found by splitting, a least-squares problem on one side and a count on the other.

With inputs scaled to the same size, C = D⁻¹ (H + λI) D⁻¹ for D² = diag(H + λI), and Ŵ = W D, the alternating direction
method of multipliers takes turns: B = (Ŵ C - V + ρ A) (C + ρI)⁻¹ is the best dense matrix near A, A = P(B + V / ρ)
keeps as many of its weights as shall stay, the largest, and V ← V + ρ (B - A) adds up what the two do not agree on.
While A changes which weights it keeps, ρ grows. What it keeps at last is refitted. So is what it kept first, P(Ŵ), for
nothing says that the end is better: where it is not, the beginning stays.
Source: Meng et al. 2024 (ALPS, arXiv:2406.07831), algorithm 1, with the schedule of ρ of its reference code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal, problem_of
from evoprune.fitness.gram import DAMPINGS
from evoprune.fitness.masked_refit import refit
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Group

ITERATIONS = 300

_FIRST, _LAST = 0.1, 1e6
# Iterations between two looks at what has changed; and by how much ρ grows if more than such a part of the kept weights
# has.
_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@dataclass(frozen=True)
class ADMM:
    """Choose what stays by alternating with least squares, then refit it (ALPS).

    Attributes:
        damping: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
    """

    damping: float = DAMPINGS[0]

    needs: ClassVar[frozenset[str]] = frozenset({"H"})
    reads_criterion: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = False
    keeps_weights: ClassVar[bool] = False
    groups: ClassVar[frozenset[Group]] = frozenset({"row", "layer"})
    cost: ClassVar[Cost] = "cubic"
    source: ClassVar[str] = "Meng et al. 2024 (ALPS), arXiv:2406.07831"

    def __post_init__(self) -> None:
        check_range("damping", self.damping, 0, 1)

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        problem = problem_of(weight, statistics["H"], self.damping)
        sizes = problem.hessian.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(problem.hessian / sizes / sizes[:, None])
        splitting = _Splitting((problem.weight * sizes).float(), values.float(), vectors.float())
        hessian, dead = problem.hessian.float(), statistics["H"].diagonal() == 0
        for goal in goals:
            (new, keep), (other, beginning) = (
                (refit(weight, kept, hessian), kept) for kept in splitting.last_and_first(goal)
            )
            if keep is not beginning:
                gain = _errors((weight - other).masked_fill(dead, 0), hessian)
                gain -= _errors((weight - new).masked_fill(dead, 0), hessian)
                # Rows can be told apart where each has to lose as many.
                together = goal.pattern is None and goal.group == "layer"
                worse = ((gain.sum() if together else gain) < 0).expand_as(gain)[:, None]
                new, keep = torch.where(worse, other, new), torch.where(worse, beginning, keep)
            yield new, keep


def _errors(lost: Tensor, hessian: Tensor) -> Tensor:
    """[out]: the output error of each row."""
    return (lost * (lost @ hessian)).sum(1)


class _Splitting:
    """One matrix, in scaled coordinates: Ŵ, and the eigenvalues and eigenvectors of C."""

    def __init__(self, weight: Tensor, values: Tensor, vectors: Tensor) -> None:
        self._weight, self._values, self._vectors = weight, values, vectors
        self._target = (weight @ vectors * values) @ vectors.T

    def last_and_first(self, goal: Goal) -> tuple[Tensor, Tensor]:
        """What A keeps in the end and what it began with, both [out, in] bool; one object if it never moved."""
        keep = first = goal.largest(self._weight.abs())
        if not bool(self._weight[~first].any()) or not bool(first.any()):
            return first, first  # nothing is lost, or there is nothing to choose
        rho, grown, kept = _FIRST, False, int(first.sum())
        sparse, dual = self._weight.masked_fill(~first, 0), torch.zeros_like(self._weight)
        seen = first
        for iteration in range(1, ITERATIONS + 1):
            dense = ((self._target - dual + rho * sparse) @ self._vectors / (self._values + rho)) @ self._vectors.T
            sparse = dense + dual / rho
            keep = goal.largest(sparse.abs())
            sparse = sparse.masked_fill(~keep, 0)
            dual += rho * (dense - sparse)
            if iteration % _EVERY:
                continue
            changed = int((keep != seen).sum()) / kept
            seen = keep
            factor = next((factor for least, factor in _GROWTH if changed > least), None)
            if factor is None and grown:
                break
            if grown or (factor is not None and factor > _GROWTH[-1][1]):
                assert factor is not None
                rho, grown = min(rho * factor, _LAST), True
            else:
                # Too large for anything to move: from the beginning, more gently.
                rho, seen = rho / 5, first
                sparse, dual = self._weight.masked_fill(~first, 0), torch.zeros_like(self._weight)
        return keep, first


COMPRESSORS.add("admm", ADMM())
