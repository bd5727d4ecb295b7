"""The algorithm of Gao et al. 2025 as released: probabilities move, and are projected onto the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice, check_range
from evoprune.search.learners import LEARNERS, Answer, Diagnostics, Options, Problem, Trial, cosine, generator, reported
from evoprune.search.learners.answers import told
from evoprune.search.learners.monitor import Monitor, Spread, certainty
from evoprune.search.policies import Floats, Ints, Knapsack, Mask, Strata, fitting
from evoprune.search.policies.projection import project
from evoprune.search.policies.shift import LOGISTIC, shifts, sigmoid
from evoprune.search.policies.start import MAPPINGS, start_probabilities

FORMULAS = ("released", "paper")
_EPSILON = 1e-7


@dataclass(frozen=True)
class ReleasedOptions(Options):
    """The released algorithm.

    Attributes:
        formula: of the gradient: released divides by the root of p (1 - p), paper by p (1 - p).
        start: the mapping that the first probabilities are made by, as published, from the problem's prior; problem
            takes the problem's logits instead.
        samples: masks of a step.
        window: of the running mean of losses, in steps.
        rate: of the first step, falling to 0 along a cosine.
        penalty: on the entropy, which pushes probabilities to 0 and 1.
        ceiling: takes the place of a loss that is not finite; auto leaves such masks out.
    """

    formula: str = "released"
    start: str = "sigmap"
    samples: int = 2
    window: int = 5
    rate: float = 2e-3
    penalty: float = 0.0
    ceiling: float | None = None

    name: ClassVar[str] = "released"
    what: ClassVar[str] = "probabilities and projection, as Gao et al. 2025 released it"
    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("formula", self.formula, FORMULAS)
        check_choice("start", self.start, ("problem", *MAPPINGS))
        check_range("samples", self.samples, 2, 10_000)
        check_range("window", self.window, 1, 1_000_000)
        if not self.rate > 0:
            raise InvalidInput(f"rate {self.rate:g} is not above 0")

    def make(self, problem: Problem) -> ReleasedLearner:
        return ReleasedLearner(problem, self)


class ReleasedLearner:
    """Samples may be over or under the budget; the mode meets it exactly, unlike the released threshold.

    Counts are projected stratum by stratum. Under a budget of costs, units of equal cost are a kind; each keeps the
    same share, and kinds are projected one by one, so that nothing is traded between them.

    Source: arXiv 2406.10576, ``pgpruning.py``.

    Raises:
        InvalidInput: under a budget of costs, a unit's cost is its own.
    """

    exact = False

    def __init__(self, problem: Problem, options: ReleasedOptions) -> None:
        self._problem, self._options = problem, options
        budget = problem.budget
        self._sets = _sets(budget)
        shares = budget.always.astype(np.float64)
        for units, total in self._sets:
            shares[units] = total / len(units)
        if options.start == "problem":
            self._p = _nearest_odds(problem.start, shares, self._sets)
        else:
            self._p = start_probabilities(
                options.start, problem.prior, problem.groups, shares, seed=problem.seed, published=True
            )
        self._p[~budget.open] = shares[~budget.open]
        self._mean: float | None = None
        self._spread, self._monitor = Spread(), Monitor()

    def ask(self, step: int) -> list[Trial]:
        return [Trial(mask) for mask in self._masks(step)]

    def tell(self, step: int, answers: Sequence[Answer]) -> Diagnostics:
        options = self._options
        heard = told(answers, options.samples, options.ceiling)
        rate = options.rate * cosine(step, self._problem.steps, 0.0)
        rho = self._spread.rho
        if heard.enough:
            masks = self._masks(step)[heard.used]
            gradient, self._mean = released_gradient(self._p, masks, heard.values, self._mean, options)
            moved = self._p - rate * gradient
            for units, total in self._sets:
                self._p[units] = project(moved[units], total)
            self._spread.update(heard.values, heard.windows)
        self._monitor.mask(step, self.mode())
        return reported(
            {
                **heard.diagnostics(),
                **certainty(self._p, self._problem.budget.open),
                "rho": rho,
                "baseline": self._mean,
                "rate": rate,
                "samples": float(options.samples),
                "jaccard": self._monitor.jaccard,
            }
        )

    def probabilities(self) -> Floats:
        return self._p.copy()

    def mode(self) -> Mask:
        budget = self._problem.budget
        if isinstance(budget, Strata):
            return budget.best(self._p)
        mask = budget.always.copy()
        for units, total in self._sets:
            mask[units[np.argsort(-self._p[units], kind="stable")[: int(total)]]] = True
        # What the kinds leave of the budget, being rounded down, goes to what fits.
        rest = np.flatnonzero(budget.open & ~mask)
        order = rest[np.argsort(-self._p[rest], kind="stable")]
        left = budget.budget - int(budget.costs[mask].sum())
        mask[order[fitting(budget.costs[order][None], left)[0]]] = True
        return mask

    def state(self) -> dict[str, Any]:
        return {
            "p": self._p.tolist(),
            "mean": self._mean,
            "spread": self._spread.state(),
            "monitor": self._monitor.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._p = np.array(state["p"], dtype=np.float64)
        self._mean = state["mean"]
        self._spread.restore(state["spread"])
        self._monitor.restore(state["monitor"])

    def _masks(self, step: int) -> Mask:
        rng = generator(self._problem.seed, "policy-masks", step)
        found: Mask = rng.random((self._options.samples, len(self._p))) < self._p
        return found


def released_gradient(
    p: Floats, masks: Mask, losses: Floats, mean: float | None, options: ReleasedOptions
) -> tuple[Floats, float]:
    """The step's gradient with respect to the probabilities, [n], and the running mean with the step's losses in it.

    With d the new mean: sum over k of (L_k - d)(m_k - p) / (K - 1) over the root of (p + e)(1 - p + e), e = 1e-7; the
    formula of the paper divides by K and leaves out the root.

    Args:
        p: [n] float64.
        masks: [K, n] bool.
        losses: [K] float64.
        mean: running mean before the step; None at the first, which begins with the step's own.
    """
    share = 1 / options.window
    now = float(losses.mean())
    mean = now if mean is None else (1 - share) * mean + share * now
    inside = (p + _EPSILON) * (1 - p + _EPSILON)
    scores = (masks - p) / (np.sqrt(inside) if options.formula == "released" else inside)
    count = len(losses) - 1 if options.formula == "released" else len(losses)
    gradient = ((losses - mean)[:, None] * scores).sum(axis=0) / count
    if options.penalty:
        gradient = gradient + options.penalty * (np.log1p(-p + _EPSILON) - np.log(p + _EPSILON))
    return gradient, mean


def _sets(budget: Strata | Knapsack) -> list[tuple[Ints, float]]:
    """Open units that are projected together, and what their probabilities may add up to."""
    if isinstance(budget, Strata):
        return [(units, float(table.keep)) for table in budget.tables for units in table.units]
    units = np.flatnonzero(budget.open)
    costs = budget.costs[units]
    found = []
    for cost in np.unique(costs):
        kind = units[costs == cost]
        if len(kind) == 1 and len(units) > 1:
            raise InvalidInput(
                f"the learner released keeps a share of the units of each cost, but only one costs {cost}: take the "
                "learner score-function, or counts"
            )
        found.append((kind, min(1.0, budget.left / int(costs.sum())) * len(kind)))
    return found


def _nearest_odds(logits: Floats, shares: Floats, sets: Sequence[tuple[Ints, float]]) -> Floats:
    """[n]: probabilities with these log-odds, but for a shift that gives them the right sum."""
    found = shares.copy()
    for units, total in sets:
        if total < len(units):
            found[units] = sigmoid(logits[units] + shifts(logits[units][None], total, LOGISTIC)[0])
    return found


LEARNERS.add("released", ReleasedOptions())
