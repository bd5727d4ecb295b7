"""AWP: a matrix goes down the gradient of its output error and is brought back to the pattern, or the grid, each time.

With inputs scaled to the same size, by D² = diag(H), a step from V is P(V + η (W - V) H D⁻²): P keeps the largest
weights of each row, or of every M columns, in these units. With η no more than 1 / λ_max(D⁻¹ H D⁻¹) no step raises the
error. The start is the mask of a criterion, whose count in each row stays.

Rounded weights differ from it in one thing. A step is far shorter than the distance of two values of the grid, so that
P would bring each weight back to where it was; so steps add up, and only what they are measured at is rounded.
Source: Liu et al. 2025 (AWP, arXiv:2506.10205).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal, problem_of
from evoprune.fitness.gram import DAMPINGS
from evoprune.fitness.quantisation import Grid, check_bits, rounds
from evoprune.metrics.mask import mask, mask_of_counts
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Group, MaskRule

# Of the error of the matrix without weights: a step that gains less is the last.
_ENOUGH = 1e-7

# Steps whose roundings are measured are half as long, or what they add up to swings about.
_SHORTER = 0.5


@dataclass(frozen=True)
class AWP:
    """Start from the mask, descend and project, many times (AWP).

    Attributes:
        bits: of a weight that stays, from 2 to 8; None and 16 leave them whole.
        width: so many consecutive columns of a row have a grid of their own.
        steps: at most so many with all that shall go gone.
        ramp: steps before these, from the dense matrix on, in which ever more goes; 0 begins at the mask.
        rounded_steps: so many on the grid, after all others.
        damping: what is added to the diagonal of the Gram matrix, as a fraction of its mean.
    """

    bits: int | None = None
    width: int = 128
    steps: int = 200
    ramp: int = 0
    rounded_steps: int = 100
    damping: float = DAMPINGS[0]

    needs: ClassVar[frozenset[str]] = frozenset({"H"})
    reads_criterion: ClassVar[bool] = True
    keeps_mask: ClassVar[bool] = False
    keeps_weights: ClassVar[bool] = False
    groups: ClassVar[frozenset[Group]] = frozenset()
    cost: ClassVar[Cost] = "linear"
    source: ClassVar[str] = "Liu et al. 2025 (AWP), arXiv:2506.10205"

    def __post_init__(self) -> None:
        if self.bits is not None:
            check_bits(self.bits)
        for name, least, most in (
            ("width", 1, 1 << 20),
            ("steps", 1, 10_000),
            ("ramp", 0, 10_000),
            ("rounded_steps", 0, 10_000),
        ):
            check_range(name, getattr(self, name), least, most)
        check_range("damping", self.damping, 0, 1)

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        descent = _Descent(weight, statistics["H"], self.damping)
        for goal in goals:
            found = descent.pruned(goal, self.steps, self.ramp)
            if rounds(self.bits):
                grid = Grid.of(found.new, self.bits, width=self.width)
                found = descent.rounded(found, goal, grid, self.rounded_steps)
                yield found.new, found.keep
            else:
                # What belongs to inputs that are always zero took part as zero.
                yield torch.where(descent.dead & found.keep, weight, found.new), found.keep


class _Best:
    """Of all matrices that were offered, the rows of the least error, in ``new`` and ``keep``."""

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        self.new, self.keep = like.new_zeros(shape), like.new_zeros(shape, dtype=torch.bool)
        self.errors = like.new_full(shape[:1], torch.inf)

    def offer(self, new: Tensor, keep: Tensor, errors: Tensor) -> float:
        """Take over the rows that are better than those before; the sum of what that gains."""
        better = errors < self.errors
        gain = (self.errors - errors)[better].sum().item()
        self.errors = torch.where(better, errors, self.errors)
        self.new[better], self.keep[better] = new[better], keep[better]
        return gain


class _Descent:
    """One matrix, and the way down its output error, in its own coordinates.

    Attributes:
        dead: [in] bool, inputs that are always zero, whose weights take part as zero.
    """

    def __init__(self, weight: Tensor, gram: Tensor, damping: float) -> None:
        problem = problem_of(weight, gram, damping)
        diagonal = problem.hessian.diagonal()
        sizes = diagonal.sqrt()
        largest = torch.linalg.eigvalsh(problem.hessian / sizes / sizes[:, None])[-1]
        self.dead = gram.diagonal() == 0
        self._weight, self._hessian, self._sizes = problem.weight.float(), problem.hessian.float(), sizes.float()
        self._rates = (1 / largest / diagonal).float()
        self._whole = (self._weight * (self._weight @ self._hessian)).sum().item()

    def pruned(self, goal: Goal, steps: int, ramp: int) -> _Best:
        """The best matrix on the way from the goal's mask, or down a ramp from the dense matrix."""
        assert goal.mask is not None
        best, new, keep = _Best(self._weight.shape, self._weight), self._weight, goal.mask
        for step in range(ramp):
            new, _ = self._kept(new + self._slope(new)[0] * self._rates, goal, (step + 1) / (ramp + 1))
        if ramp:
            new, keep = self._kept(new, goal)
        else:
            new = new.masked_fill(~keep, 0)
        for _ in range(steps + 1):
            slope, errors = self._slope(new)
            if best.offer(new, keep, errors) <= _ENOUGH * self._whole:
                break
            new, keep = self._kept(torch.addcmul(new, slope, self._rates), goal)
        return best

    def rounded(self, start: _Best, goal: Goal, grid: Grid, steps: int) -> _Best:
        """The best matrix on the grid, on the way from one that is not."""
        best, at, keep = _Best(self._weight.shape, self._weight), start.new, start.keep
        for _ in range(steps + 1):
            new = grid.nearest(at).masked_fill_(~keep, 0)
            slope, errors = self._slope(new)
            best.offer(new, keep, errors)
            at = torch.addcmul(at, slope, self._rates, value=_SHORTER)
            keep = self._kept(at, goal)[1]
        return best

    def _slope(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """(W - V) H, [out, in], and the error of each row, [out]."""
        lost = self._weight - new
        slope = lost @ self._hessian
        return slope, (lost * slope).sum(1)

    def _kept(self, values: Tensor, goal: Goal, share: float = 1) -> tuple[Tensor, Tensor]:
        """P: values without a share of what shall go, of each row as much as of the mask's; and what stays."""
        assert goal.mask is not None
        scores = values.abs() * self._sizes
        if goal.pattern is None:
            keep = mask_of_counts(scores, ((~goal.mask).sum(1) * share).long())
        else:
            n, m = goal.pattern
            left = m - int((m - n) * share)
            keep = mask(scores, MaskRule(None, (left, m))) if left < m else torch.ones_like(goal.mask)
        return values.masked_fill(~keep, 0), keep


COMPRESSORS.add("awp", AWP())
