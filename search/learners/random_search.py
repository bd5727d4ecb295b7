"""Random search: what a learner must be better than."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from evoprune.search.learners import LEARNERS, Answer, Diagnostics, Problem, Trial, reported
from evoprune.search.learners.answers import told
from evoprune.search.learners.monitor import Monitor, Spread
from evoprune.search.learners.vectors import VectorOptions, Vectors, floats
from evoprune.search.policies import Floats, Mask


@dataclass(frozen=True)
class RandomOptions(VectorOptions):
    """Random search; options as in `VectorOptions`."""

    name: ClassVar[str] = "random"
    what: ClassVar[str] = "random search over the same parameters, a control"
    gradients: ClassVar[bool] = False

    def make(self, problem: Problem) -> RandomLearner:
        return RandomLearner(problem, self)


class RandomLearner:
    """Vectors around the start, always the same distribution; the best so far is measured anew on each minibatch."""

    exact = True

    def __init__(self, problem: Problem, options: RandomOptions) -> None:
        self._problem, self._options = problem, options
        self._vectors = Vectors(problem, options)
        self._start = self._vectors.parameters.start()
        self._best = self._start
        self._spread, self._monitor = Spread(), Monitor()

    def ask(self, step: int) -> list[Trial]:
        trials = [Trial(self._vectors.mask(phi)) for phi in self._drawn(step)]
        return [*trials, Trial(self.mode(), "reference")]

    def tell(self, step: int, answers: Sequence[Answer]) -> Diagnostics:
        heard = told(answers, self._options.samples, self._options.ceiling)
        rho = self._spread.rho
        if heard.enough:
            first = int(np.argmin(heard.values))
            if heard.reference is None or heard.values[first] < heard.reference:
                self._best = self._drawn(step)[heard.used[first]]
            self._spread.update(heard.values, heard.windows)
        self._monitor.mask(step, self.mode())
        return reported(
            {
                **heard.diagnostics(),
                "rho": rho,
                "samples": float(self._options.samples),
                "jaccard": self._monitor.jaccard,
            }
        )

    def probabilities(self) -> Floats:
        """[n]: 1 or 0, as the best mask keeps them."""
        return self.mode().astype(np.float64)

    def mode(self) -> Mask:
        return self._vectors.mask(self._best)

    def state(self) -> dict[str, Any]:
        return {"best": self._best.tolist(), "spread": self._spread.state(), "monitor": self._monitor.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._best = floats(state["best"])
        self._spread.restore(state["spread"])
        self._monitor.restore(state["monitor"])

    def _drawn(self, step: int) -> Floats:
        return self._start + self._options.spread * self._vectors.noise(step, self._options.samples)


LEARNERS.add("random", RandomOptions())
