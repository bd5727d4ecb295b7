"""CMA-ES: a normal distribution of parameters, whose covariance is learned too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from deap.cma import Strategy

from evoprune.metrics.errors import InvalidInput
from evoprune.search.learners import LEARNERS, Answer, Diagnostics, Problem, Trial, reported
from evoprune.search.learners.answers import told
from evoprune.search.learners.monitor import Monitor, Spread, certainty
from evoprune.search.learners.vectors import VectorOptions, Vectors, floats
from evoprune.search.policies import Floats, Mask

_MOST = 200


@dataclass(frozen=True)
class CmaOptions(VectorOptions):
    """CMA-ES; options as in `VectorOptions`, spread being that of the first step."""

    samples: int = 16

    name: ClassVar[str] = "cma"
    what: ClassVar[str] = "CMA-ES, for up to 200 parameters"
    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 4:
            raise InvalidInput(f"the learner cma needs at least 4 samples; {self.samples} are asked for")

    def make(self, problem: Problem) -> CmaLearner:
        return CmaLearner(problem, self)


class CmaLearner:
    """One generation a step. Vectors whose mask has no finite loss are last.

    Source: Hansen and Ostermeier 2001, as DEAP has it, with random numbers of our own.

    Raises:
        InvalidInput: there are more than 200 parameters.
    """

    exact = True

    def __init__(self, problem: Problem, options: CmaOptions) -> None:
        self._problem, self._options = problem, options
        self._vectors = Vectors(problem, options)
        if (size := self._vectors.parameters.size) > _MOST:
            raise InvalidInput(
                f"the learner cma takes up to {_MOST} parameters, and these are {size}: take pgpe, or fewer groups"
            )
        self._strategy = self._made(self._vectors.parameters.start(), options.spread)
        self._spread, self._monitor = Spread(), Monitor()

    def ask(self, step: int) -> list[Trial]:
        return [Trial(self._vectors.mask(phi)) for phi in self._children(step)]

    def tell(self, step: int, answers: Sequence[Answer]) -> Diagnostics:
        options = self._options
        heard = told(answers, options.samples, options.ceiling)
        rho = self._spread.rho
        if heard.enough:
            losses = np.full(options.samples, np.inf)
            losses[heard.used] = heard.values
            children = self._children(step)
            self._strategy.update([_ranked(child, loss) for child, loss in zip(children, losses, strict=True)])
            self._spread.update(heard.values, heard.windows)
        self._monitor.mask(step, self.mode())
        return reported(
            {
                **heard.diagnostics(),
                **certainty(self.probabilities(), self._problem.budget.open),
                "rho": rho,
                "rate": float(self._strategy.sigma),
                "samples": float(options.samples),
                "jaccard": self._monitor.jaccard,
            }
        )

    def probabilities(self) -> Floats:
        """[n]: how often units are kept under the distribution, by a fixed sample of vectors."""
        return self._vectors.frequencies(list(self._spread_out(self._vectors.looks())))

    def mode(self) -> Mask:
        return self._vectors.mask(self._strategy.centroid)

    def state(self) -> dict[str, Any]:
        strategy = self._strategy
        arrays = {name: getattr(strategy, name).tolist() for name in ("centroid", "pc", "ps", "C")}
        return {
            **arrays,
            "sigma": float(strategy.sigma),
            "updates": strategy.update_count,
            "spread": self._spread.state(),
            "monitor": self._monitor.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._strategy = self._made(floats(state["centroid"]), state["sigma"], cmatrix=floats(state["C"]))
        self._strategy.pc, self._strategy.ps = floats(state["pc"]), floats(state["ps"])
        self._strategy.update_count = state["updates"]
        self._spread.restore(state["spread"])
        self._monitor.restore(state["monitor"])

    def _made(self, centroid: Floats, sigma: float, **more: Any) -> Strategy:
        return Strategy(centroid, sigma, lambda_=self._options.samples, **more)

    def _children(self, step: int) -> Floats:
        return self._spread_out(self._vectors.noise(step, self._options.samples))

    def _spread_out(self, noise: Floats) -> Floats:
        found: Floats = self._strategy.centroid + self._strategy.sigma * np.dot(noise, self._strategy.BD.T)
        return found


class _Child(np.ndarray):
    """A vector as DEAP wants it."""

    fitness: float


def _ranked(phi: Floats, loss: float) -> _Child:
    child = phi.view(_Child)
    child.fitness = -loss
    return child


LEARNERS.add("cma", CmaOptions())
