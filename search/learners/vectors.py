"""What learners share that search for parameters by the losses of the masks that these give, without drawing masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice, check_range
from evoprune.search.learners import Options, Problem, generator
from evoprune.search.policies import Floats, Mask
from evoprune.search.policies.parameters import CAP, Free, Grouped, Parameters

PARAMETERS = ("auto", "free", "grouped")

# So many logits are few.
_FEW = 200
# Vectors whose masks say how probable units are.
_LOOKS = 64


@dataclass(frozen=True)
class VectorOptions(Options):
    """Options of such learners.

    Attributes:
        parameters: logits of units (free) or two numbers for each group (grouped); auto is free for up to 200 units.
        samples: masks of a step.
        spread: standard deviation of vectors around their centre.
        cap: logits stay within this of 0.
        ceiling: takes the place of a loss that is not finite; auto leaves such masks out.
    """

    parameters: str = "auto"
    samples: int = 8
    spread: float = 1.0
    cap: float = CAP
    ceiling: float | None = None

    def __post_init__(self) -> None:
        check_choice("parameters", self.parameters, PARAMETERS)
        check_range("samples", self.samples, 2, 10_000)
        for what in ("spread", "cap"):
            if not getattr(self, what) > 0:
                raise InvalidInput(f"{what} {getattr(self, what):g} is not above 0")

    def parameters_of(self, problem: Problem) -> Parameters:
        """What is searched for."""
        free = problem.budget.n <= _FEW if self.parameters == "auto" else self.parameters == "free"
        if free:
            return Free(problem.budget, problem.start, self.cap)
        return Grouped(problem.budget, problem.groups, problem.prior, problem.start, self.cap)


class Vectors:
    """Masks of vectors: the budget's best by the logits that they give."""

    def __init__(self, problem: Problem, options: VectorOptions) -> None:
        self.problem = problem
        self.parameters = options.parameters_of(problem)

    def mask(self, phi: Floats) -> Mask:
        """[n] bool."""
        return self.problem.budget.best(self.parameters.logits(phi))

    def noise(self, step: int, count: int) -> Floats:
        """[count, size]: independent standard normal numbers of a step."""
        return generator(self.problem.seed, "policy-vectors", step).standard_normal((count, self.parameters.size))

    def frequencies(self, vectors: Sequence[Floats]) -> Floats:
        """[n]: how often each unit is kept in the masks of these."""
        found = np.zeros(self.problem.budget.n)
        for phi in vectors:
            found += self.mask(phi)
        return found / len(vectors)

    def looks(self) -> Floats:
        """[looks, size]: normal numbers that are always the same, fewer where there are many units."""
        count = _LOOKS if self.problem.budget.n <= 20_000 else _LOOKS // 8
        return generator(0, "policy-looks", 0).standard_normal((count, self.parameters.size))


def floats(values: Any) -> Floats:
    """An array from a list of a saved state."""
    return np.array(values, dtype=np.float64)
