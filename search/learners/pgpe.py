"""Evolution strategy: pairs of opposite steps from the centre, whose differences say where to go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from evoprune.metrics.errors import InvalidInput
from evoprune.search.learners import LEARNERS, Answer, Diagnostics, Problem, Trial, cosine, reported
from evoprune.search.learners.answers import told
from evoprune.search.learners.monitor import Monitor, Scale, Spread, certainty
from evoprune.search.learners.vectors import VectorOptions, Vectors, floats
from evoprune.search.policies import Floats, Mask


@dataclass(frozen=True)
class PgpeOptions(VectorOptions):
    """Parameter-exploring policy gradient.

    Attributes:
        rate: of the first step, against the gradient over the root mean square of its differences.
        last: the last rate as a share of the first, along a cosine.
        clip: differences are clipped at so many of their root mean squares.
        parameters, samples, spread, cap, ceiling: as in `VectorOptions`.
    """

    rate: float = 0.6
    last: float = 0.1
    clip: float = 5.0

    name: ClassVar[str] = "pgpe"
    what: ClassVar[str] = "evolution strategy with antithetic pairs of parameters"
    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples % 2:
            raise InvalidInput(f"the learner pgpe has pairs of samples: {self.samples} is odd")
        for what in ("rate", "clip"):
            if not getattr(self, what) > 0:
                raise InvalidInput(f"{what} {getattr(self, what):g} is not above 0")

    def make(self, problem: Problem) -> PgpeLearner:
        return PgpeLearner(problem, self)


class PgpeLearner:
    """Gradient sum over P pairs of (F(phi + s e) - F(phi - s e)) e / (2 P s) of the smoothed loss, e standard normal.

    Source: Sehnke et al. 2010; antithetic as in Salimans et al. 2017, arXiv:1703.03864.
    """

    exact = True

    def __init__(self, problem: Problem, options: PgpeOptions) -> None:
        self._problem, self._options = problem, options
        self._vectors = Vectors(problem, options)
        self._phi = self._vectors.parameters.start()
        self._scale, self._spread, self._monitor = Scale(), Spread(), Monitor()

    def ask(self, step: int) -> list[Trial]:
        moves = self._moves(step)
        return [Trial(self._vectors.mask(self._phi + sign * move)) for move in moves for sign in (1, -1)]

    def tell(self, step: int, answers: Sequence[Answer]) -> Diagnostics:
        options = self._options
        heard = told(answers, options.samples, options.ceiling, block=2)
        rate = options.rate * cosine(step, self._problem.steps, options.last)
        rho, clipped = self._spread.rho, None
        if heard.enough:
            noise = self._moves(step)[heard.used[::2] // 2] / options.spread
            pairs = heard.values.reshape(-1, 2)
            differences = (pairs[:, 0] - pairs[:, 1]) / (2 * options.spread)
            scale = self._scale.of(differences)
            bounded = np.clip(differences, -options.clip * scale, options.clip * scale)
            clipped = float((bounded != differences).mean())
            each = (bounded / scale)[:, None] * noise
            halves = np.stack([each[::2].mean(axis=0), each[1::2].mean(axis=0)]) if len(each) > 1 else None
            self._phi = self._vectors.parameters.settled(self._phi - rate * each.mean(axis=0))
            self._monitor.halves(halves)
            self._scale.update(bounded)
            self._spread.update(heard.values, heard.windows)
        self._monitor.mask(step, self.mode())
        return reported(
            {
                **heard.diagnostics(),
                **certainty(self.probabilities(), self._problem.budget.open),
                "rho": rho,
                "clipped": clipped,
                "rate": rate,
                "samples": float(options.samples),
                "cosine": self._monitor.cosine,
                "jaccard": self._monitor.jaccard,
            }
        )

    def probabilities(self) -> Floats:
        """[n]: how often units are kept around the centre, by a fixed sample of vectors."""
        return self._vectors.frequencies([self._phi + self._options.spread * e for e in self._vectors.looks()])

    def mode(self) -> Mask:
        return self._vectors.mask(self._phi)

    def state(self) -> dict[str, Any]:
        return {
            "phi": self._phi.tolist(),
            "scale": self._scale.state(),
            "spread": self._spread.state(),
            "monitor": self._monitor.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._phi = floats(state["phi"])
        self._scale.restore(state["scale"])
        self._spread.restore(state["spread"])
        self._monitor.restore(state["monitor"])

    def _moves(self, step: int) -> Floats:
        """[pairs, size]: steps away from the centre."""
        return self._options.spread * self._vectors.noise(step, self._options.samples // 2)


LEARNERS.add("pgpe", PgpeOptions())
