"""The policy gradient: masks are drawn, and logits move by losses times scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice, check_range
from evoprune.search.estimators import ESTIMATORS, Losses
from evoprune.search.learners import LEARNERS, Answer, Diagnostics, Options, Problem, Trial, cosine, generator, reported
from evoprune.search.learners.answers import told
from evoprune.search.learners.monitor import Monitor, Scale, Spread, certainty
from evoprune.search.policies import POLICIES, Draws, Floats, Mask, Strata
from evoprune.search.policies.parameters import CAP, Free, Grouped, Parameters, refined

PARAMETERS = ("auto", "free", "grouped", "grouped-then-free")
PRECONDITIONS = ("auto", "none", "half", "natural")

# Added to the variance of a unit: a unit that is nearly decided would jump (mask-policy search, natural step).
_DAMPING = 0.01
# Nats that a step may change the policy by, for each unit. The chapter's 0.001 kept a policy over 32 units from moving:
# after 1,200 losses it had found 11 or 12 of 12 planted units, and with a cap of 1 after 800.
_NATS = 0.03
# Of natural steps, which go as far in every direction: with 0.03 nats 2 of 16 models kept one of 12 planted heads.
_NATURAL_NATS = 0.01
_FIRST, _MOST, _FEWEST = 8, 64, 4
# Of half gradients over a span of steps: below this more masks a step are worth while, above that fewer do.
_AGREE_LITTLE, _AGREE_MUCH = 0.2, 0.6


@dataclass(frozen=True)
class ScoreFunctionOptions(Options):
    """A policy gradient.

    Attributes:
        policy: one of `POLICIES`; auto is pl for counts, pl-knapsack for costs.
        parameters: what is learned: logits of units (free), two numbers for each group (grouped), or first these, then
            those; auto goes by how many units there are for each loss that will be known.
        grouped_share: of the steps, before the logits are freed.
        estimator: one of `ESTIMATORS`.
        samples: masks of a step; 0 or auto lets their number follow how far half gradients agree.
        rate: of the first step.
        last: the last rate as a share of the first, along a cosine.
        precondition: none, half (over the root of each parameter's information), natural (over the information); auto
            is half for groups; for units natural if the policy is cp or bernoulli, whose logits have the information
            p (1 - p), and none for others, whose order of picks tells more than that.
        kl: the first step changes the policy by at most this, in nats, later ones by less as the rate falls; auto is
            0.03 for each unit, 0.01 where steps are natural, at most 1.
        clip: advantages are clipped at so many of their standard deviations.
        cap: logits stay within this of 0.
        ceiling: takes the place of a loss that is not finite; auto leaves such masks out.
    """

    policy: str = "auto"
    parameters: str = "auto"
    grouped_share: float = 0.3
    estimator: str = "loo"
    samples: int = 8
    rate: float = 1.0
    last: float = 0.1
    precondition: str = "auto"
    kl: float | None = None
    clip: float = 5.0
    cap: float = CAP
    ceiling: float | None = None

    name: ClassVar[str] = "score-function"
    what: ClassVar[str] = "policy gradient"
    gradients: ClassVar[bool] = False
    adapts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("parameters", self.parameters, PARAMETERS)
        check_choice("precondition", self.precondition, PRECONDITIONS)
        # Names that do not exist are refused before there is a problem to build them for.
        _ = None if self.policy == "auto" else POLICIES[self.policy]
        _ = ESTIMATORS[self.estimator]
        check_range("grouped_share", self.grouped_share, 0, 1)
        check_range("samples", self.samples, 0, 10_000)
        check_range("last", self.last, 0, 1)
        for what in ("rate", "clip", "cap", "kl"):
            if (value := getattr(self, what)) is not None and not value > 0:
                raise InvalidInput(f"{what} {value:g} is not above 0")

    def make(self, problem: Problem) -> ScoreFunctionLearner:
        return ScoreFunctionLearner(problem, self)


class ScoreFunctionLearner:
    """Moves logits against the estimated gradient of the expected loss.

    With advantages a_k of the K masks and s their root mean square in earlier steps, the gradient is the mean over k of
    clip(a_k / s, -clip, clip) times the score of mask k; a step is -rate P g, P the preconditioner, scaled down where
    it would move the policy too far; then logits are centred and capped.

    Source: Williams 1992 (REINFORCE); trust region as in Schulman et al. 2015, arXiv:1502.05477, to second order.
    """

    def __init__(self, problem: Problem, options: ScoreFunctionOptions) -> None:
        budget = problem.budget
        name = options.policy
        if name == "auto":
            name = "pl" if isinstance(budget, Strata) else "pl-knapsack"
        self.policy = POLICIES[name].build(budget)
        self.estimator = ESTIMATORS[options.estimator].build(self.policy)
        self._problem, self._options = problem, options
        self._samples = options.samples or _FIRST
        if self._samples < self.estimator.least or self._samples % self.estimator.block:
            block = f", a multiple of {self.estimator.block}" if self.estimator.block > 1 else ""
            raise InvalidInput(
                f"the estimator {options.estimator} needs at least {self.estimator.least} samples a step{block}; "
                f"{self._samples} are asked for"
            )
        self._plan = options.parameters
        if self._plan == "auto":
            self._plan = planned(budget.n, problem.steps * self._samples)
        self._grouped = Grouped(budget, problem.groups, problem.prior, problem.start, options.cap)
        self._parameters: Parameters = self._grouped
        if self._plan == "free":
            self._parameters = Free(budget, problem.start, options.cap)
        self._phi = self._parameters.start()
        self._scale, self._spread, self._monitor = Scale(), Spread(), Monitor()
        self._drawn: tuple[int, Draws] | None = None
        self._inclusion: tuple[Floats, Floats] | None = None

    @property
    def exact(self) -> bool:
        return self.policy.exact

    @property
    def logits(self) -> Floats:
        """[n] as they are now."""
        return self._parameters.logits(self._phi)

    def ask(self, step: int) -> list[Trial]:
        trials = [Trial(mask) for mask in self._draws(step).masks]
        return [*trials, Trial(self.mode(), "reference")] if self.estimator.reference else trials

    def tell(self, step: int, answers: Sequence[Answer]) -> Diagnostics:
        estimator, options = self.estimator, self._options
        draws, logits = self._draws(step), self.logits
        self._drawn = None
        heard = told(answers, len(draws.masks), options.ceiling, estimator.block, estimator.least)
        rate = options.rate * cosine(step, self._problem.steps, options.last)
        found = {
            **heard.diagnostics(),
            "rho": self._spread.rho,
            "rate": rate,
            "samples": float(len(draws.masks)),
        }
        losses = Losses(heard.values, heard.reference, self._spread.rho)
        if heard.enough and (heard.reference is not None or not estimator.reference):
            found["baseline"] = estimator.baseline(losses)
            advantages = estimator.advantages(losses)
            scale = self._scale.of(advantages)
            clipped = np.clip(advantages, -options.clip * scale, options.clip * scale)
            found["clipped"] = float((clipped != advantages).mean())
            gradient = estimator.gradient(self.policy, logits, draws.take(heard.used), clipped / scale)
            halves = gradient.halves
            ended = self._monitor.halves(None if halves is None else self._parameters.pullback(self._phi, halves))
            found["kl"] = self._move(gradient.whole, rate)
            self._scale.update(clipped)
            estimator.update(losses)
            self._spread.update(heard.values, heard.windows)
            if ended and not options.samples:
                self._resample()
        if self._plan == "grouped-then-free" and self._parameters is self._grouped and self._frees(step + 1):
            self._free()
        self._monitor.mask(step, self.mode())
        found.update(certainty(self.probabilities(), self._problem.budget.open))
        return reported({**found, "cosine": self._monitor.cosine, "jaccard": self._monitor.jaccard})

    def probabilities(self) -> Floats:
        # A step ends with those that the next begins with.
        if self._inclusion is None or not np.array_equal(self._inclusion[0], self._phi):
            self._inclusion = self._phi, self.policy.inclusion(self.logits)
        return self._inclusion[1].copy()

    def mode(self) -> Mask:
        return self.policy.mode(self.logits)

    def state(self) -> dict[str, Any]:
        return {
            "phi": self._phi.tolist(),
            "free": self._parameters is not self._grouped,
            "samples": self._samples,
            "scale": self._scale.state(),
            "spread": self._spread.state(),
            "monitor": self._monitor.state(),
            "estimator": self.estimator.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._phi = np.array(state["phi"], dtype=np.float64)
        budget, cap = self._problem.budget, self._options.cap
        self._parameters = Free(budget, self._phi, cap) if state["free"] else self._grouped
        self._samples = state["samples"]
        self._scale.restore(state["scale"])
        self._spread.restore(state["spread"])
        self._monitor.restore(state["monitor"])
        self.estimator.restore(state["estimator"])
        self._drawn = self._inclusion = None

    def _draws(self, step: int) -> Draws:
        if self._drawn is None or self._drawn[0] != step:
            rng = generator(self._problem.seed, "policy-masks", step)
            self._drawn = step, self.estimator.draw(self.policy, self.logits, self._samples, rng)
        return self._drawn[1]

    def _move(self, gradient: Floats, rate: float) -> float:
        """Step against a gradient with respect to the logits; returns how far the policy went, in nats.

        The information of the logits is taken as diagonal, v = p (1 - p) (Hájek's approximation), which neglects what a
        shift of all of them does, and that is nothing.
        """
        problem, options = self._problem, self._options
        inclusion = self.probabilities()
        variance = inclusion * (1 - inclusion)
        direction = self._parameters.pullback(self._phi, gradient)
        power = self._power()
        if power > 0:
            direction = self._parameters.solve(self._phi, direction, variance + _DAMPING, power)
        change = -rate * direction
        pushed = problem.budget.centred(self._parameters.push(self._phi, change), variance + 1e-12)
        kl = float((variance * pushed**2).sum()) / 2
        # Divergence goes with the square of the rate: where it is what holds a step, steps fall as rates do.
        nats = _NATURAL_NATS if power == 1 else _NATS
        most = (min(1.0, nats * problem.budget.n) if options.kl is None else options.kl) * (rate / options.rate) ** 2
        if kl > most:
            change, kl = change * np.sqrt(most / kl), most
        self._phi = self._parameters.settled(self._phi + change)
        return kl

    def _power(self) -> float:
        """Of the inverse information that a gradient is multiplied by."""
        powers = {"none": 0.0, "half": 0.5, "natural": 1.0}
        if self._options.precondition != "auto":
            return powers[self._options.precondition]
        if self._parameters is self._grouped:
            return powers["half"]
        return powers["natural" if self.policy.plain else "none"]

    def _frees(self, step: int) -> bool:
        return step >= self._options.grouped_share * self._problem.steps

    def _free(self) -> None:
        self._parameters = refined(self._problem.budget, self._parameters, self._phi, self._options.cap)
        self._phi = self._parameters.start()
        self._inclusion = None

    def _resample(self) -> None:
        """Follow the agreement of half gradients with the number of masks of a step."""
        agreement = self._monitor.cosine
        if agreement is not None and agreement < _AGREE_LITTLE:
            self._samples = min(_MOST, 2 * self._samples)
        elif agreement is not None and agreement > _AGREE_MUCH:
            self._samples = max(_FEWEST, self._samples // 2)


def planned(n: int, evaluations: int) -> str:
    """What to learn with so many losses: the estimated gradient of n logits has cosine 1 / sqrt(1 + n / E) with the
    true one, so units are worth learning from about 0.97 on, and after their groups from about 0.45 on."""
    if 16 * n <= evaluations:
        return "free"
    return "grouped-then-free" if n <= 4 * evaluations else "grouped"


LEARNERS.add("score-function", ScoreFunctionOptions())
