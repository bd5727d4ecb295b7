"""Gumbel, straight through: masks are drawn, and gradients come back through a relaxed mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.parameters import check_range
from evoprune.search.learners import LEARNERS, Answer, Diagnostics, Options, Problem, Trial, cosine, generator, reported
from evoprune.search.learners.answers import finite, told
from evoprune.search.learners.monitor import Monitor, Scale, Spread, certainty
from evoprune.search.learners.vectors import floats
from evoprune.search.policies import POLICIES, Floats, Mask, Strata
from evoprune.search.policies.bernoulli import Bernoulli
from evoprune.search.policies.parameters import CAP, Free
from evoprune.search.policies.pl import race_times


@dataclass(frozen=True)
class GumbelOptions(Options):
    """Gradients through relaxed masks.

    Attributes:
        hard: losses and gradients are wanted of the drawn masks themselves (straight through), else of the relaxed
            ones.
        samples: masks of a step.
        rate: of the first step, against the gradient over its root mean square.
        last: the last rate as a share of the first, along a cosine.
        temperature: of the first relaxed masks.
        coldest: of the last, linearly.
        cap: logits stay within this of 0.
    """

    hard: bool = True
    samples: int = 4
    rate: float = 0.3
    last: float = 0.1
    temperature: float = 1.0
    coldest: float = 0.3
    cap: float = CAP

    name: ClassVar[str] = "gumbel"
    what: ClassVar[str] = "back-propagation through relaxed masks, straight through"
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("samples", self.samples, 2, 10_000)
        for what in ("rate", "temperature", "coldest", "cap"):
            if not getattr(self, what) > 0:
                raise InvalidInput(f"{what} {getattr(self, what):g} is not above 0")

    def make(self, problem: Problem) -> GumbelLearner:
        return GumbelLearner(problem, self)


class GumbelLearner:
    """A mask is the budget's best by logit + Gumbel noise; relaxed, s((logit + noise) / temperature + shift).

    s is the logistic function, and the shift makes a relaxed mask meet the budget. Biased.

    Source: Jang et al. 2017, arXiv:1611.01144; the relaxed top-k by a shift as in Zhou et al. 2021 (ProbMask).
    """

    exact = True

    def __init__(self, problem: Problem, options: GumbelOptions) -> None:
        self._problem, self._options = problem, options
        self._free = Free(problem.budget, problem.start, options.cap)
        self._phi = self._free.start()
        self._policy = POLICIES["pl" if isinstance(problem.budget, Strata) else "pl-knapsack"].build(problem.budget)
        self._relaxation = Bernoulli(problem.budget)
        self._scale, self._spread, self._monitor = Scale(), Spread(), Monitor()

    def ask(self, step: int) -> list[Trial]:
        trials = []
        for keys in self._keys(step):
            mask = self._problem.budget.best(keys)
            values = mask.astype(np.float64)
            if not self._options.hard:
                values = self._relaxation.inclusion(keys / self._temperature(step))
            trials.append(Trial(mask, values=values))
        return trials

    def tell(self, step: int, answers: Sequence[Answer]) -> Diagnostics:
        options = self._options
        if any(finite(answer.loss) is not None and answer.gradient is None for answer in answers):
            raise EvopruneError("the learner gumbel was told a loss without its gradient")
        good = [answer.gradient is not None and bool(np.isfinite(answer.gradient).all()) for answer in answers]
        usable = [answer if whole else replace(answer, loss=None) for answer, whole in zip(answers, good, strict=True)]
        heard = told(usable, options.samples, None)
        rate = options.rate * cosine(step, self._problem.steps, options.last)
        rho = self._spread.rho
        if heard.enough:
            temperature = self._temperature(step)
            each = []
            for index, keys in enumerate(self._keys(step)):
                if index not in heard.used:
                    continue
                scaled = keys / temperature
                relaxed = self._relaxation.inclusion(scaled)
                odds = np.asarray(answers[index].gradient, dtype=np.float64) * relaxed * (1 - relaxed)
                each.append(self._relaxation.pullback(scaled, odds * self._problem.budget.open) / temperature)
            gradients = np.stack(each)
            whole = gradients.mean(axis=0)
            self._phi = self._free.settled(self._phi - rate * whole / self._scale.of(whole))
            self._monitor.halves(np.stack([gradients[half::2].mean(axis=0) for half in (0, 1)]))
            self._scale.update(whole)
            self._spread.update(heard.values, heard.windows)
        self._monitor.mask(step, self.mode())
        return reported(
            {
                **heard.diagnostics(),
                **certainty(self.probabilities(), self._problem.budget.open),
                "rho": rho,
                "rate": rate,
                "samples": float(options.samples),
                "cosine": self._monitor.cosine,
                "jaccard": self._monitor.jaccard,
            }
        )

    def probabilities(self) -> Floats:
        return self._policy.inclusion(self._phi)

    def mode(self) -> Mask:
        return self._problem.budget.best(self._phi)

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

    def _keys(self, step: int) -> Floats:
        """[samples, n]: logits with noise."""
        rng = generator(self._problem.seed, "policy-masks", step)
        return -race_times(self._phi, rng.random((self._options.samples, len(self._phi))))

    def _temperature(self, step: int) -> float:
        options = self._options
        return options.temperature + (options.coldest - options.temperature) * min(1.0, step / self._problem.steps)


LEARNERS.add("gumbel", GumbelOptions())
