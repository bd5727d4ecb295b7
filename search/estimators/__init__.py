"""Estimators: the gradient of the expected loss from the losses of a step's masks. Plug-ins, one file each.

The gradient is the mean over the draws of an advantage times a direction. What is subtracted from a loss never depends
on the draw itself, so that the mean is unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.registry import Registry
from evoprune.search.policies import Draws, Floats, Policy, chunks


@dataclass(frozen=True, eq=False)
class Losses:
    """What the masks of one step were worth, all on the same minibatch.

    Attributes:
        values: [K] float64, finite.
        reference: loss of the reference mask, the policy's mode, on the same minibatch; None if it was not measured.
        rho: variance of the minibatch over that of the masks, from earlier steps; None while unknown.
    """

    values: Floats
    reference: float | None = None
    rho: float | None = None


@dataclass(frozen=True, eq=False)
class Gradient:
    """An estimate of the gradient of the expected loss.

    Attributes:
        whole: [n] with respect to the logits.
        halves: [2, n] of the even and of the odd draws (or pairs) alone; None if there is only one.
    """

    whole: Floats
    halves: Floats | None


class Estimator(Protocol):
    """Draws masks and makes a gradient of their losses.

    Attributes:
        reference: it needs the loss of the policy's mode on the same minibatch.
        block: draws come in blocks of so many, which only make sense together: 2 if they are antithetic pairs.
        least: draws that it needs.
    """

    reference: ClassVar[bool]
    block: ClassVar[int]
    least: ClassVar[int]

    def draw(self, policy: Policy, logits: Floats, count: int, rng: np.random.Generator) -> Draws:
        """The masks of a step; `count` is a multiple of `block`."""

    def advantages(self, losses: Losses) -> Floats:
        """[K]: what each draw counts; depends on earlier steps through the state, which it leaves as it is."""

    def gradient(self, policy: Policy, logits: Floats, draws: Draws, advantages: Floats) -> Gradient:
        """The gradient of these advantages, which may have been scaled or clipped."""

    def update(self, losses: Losses) -> None:
        """Take in the losses of a step, after its advantages were asked for."""

    def baseline(self, losses: Losses) -> float:
        """What is subtracted from the losses of a step, on average."""

    def state(self) -> Any:
        """Everything that `restore` needs, as JSON values."""

    def restore(self, state: Any) -> None:
        """Continue from `state`."""


@runtime_checkable
class Independent(Protocol):
    """A policy that keeps units independently of each other."""

    def effective(self, logits: Floats) -> Floats:
        """[n]: the log-odds of each unit, at which the budget holds on average."""

    def pullback(self, logits: Floats, gradient: Floats) -> Floats:
        """[..., n]: gradients with respect to the logits from those with respect to the log-odds."""


@dataclass(frozen=True)
class EstimatorPlugin:
    """How to get an estimator.

    Attributes:
        what: one line for people.
        make: called with nothing.
        independent: it is for policies that keep units independently of each other.
    """

    what: str
    make: Callable[[], Estimator]
    independent: bool = False

    def build(self, policy: Policy) -> Estimator:
        """An estimator for a policy.

        Raises:
            InvalidInput: it does not work with this policy.
        """
        if self.independent and not isinstance(policy, Independent):
            raise InvalidInput(f"this estimator ({self.what}) needs the policy bernoulli")
        return self.make()


ESTIMATORS: Registry[EstimatorPlugin] = Registry("estimator", "evoprune.search.estimators")


class ScoreFunction:
    """What estimators share that multiply advantages by scores: independent draws, no state.

    Source: Williams 1992 (REINFORCE).
    """

    reference: ClassVar[bool] = False
    block: ClassVar[int] = 1
    least: ClassVar[int] = 2

    def draw(self, policy: Policy, logits: Floats, count: int, rng: np.random.Generator) -> Draws:
        return policy.sample(logits, count, rng)

    def gradient(self, policy: Policy, logits: Floats, draws: Draws, advantages: Floats) -> Gradient:
        sums = np.zeros((2, policy.n))
        parity = np.arange(len(advantages)) // self.block % 2
        for part in chunks(len(advantages), policy.n):
            weighted = advantages[part, None] * policy.score(logits, draws.take(np.arange(len(advantages))[part]))
            for half in (0, 1):
                sums[half] += weighted[parity[part] == half].sum(axis=0)
        return halved(sums, np.bincount(parity, minlength=2))

    def update(self, losses: Losses) -> None:
        """There is nothing to remember."""

    def state(self) -> Any:
        return None

    def restore(self, state: Any) -> None:
        """There was nothing to remember."""


def halved(sums: Floats, counts: Any) -> Gradient:
    """A gradient from the sums over even and odd draws, [2, n], and how many they are."""
    whole = sums.sum(axis=0) / counts.sum()
    return Gradient(whole, sums / counts[:, None] if counts.min() else None)


def leave_one_out(values: Floats) -> Floats:
    """[K]: each loss less the mean of the others."""
    found: Floats = (values - values.mean()) * (len(values) / (len(values) - 1))
    return found
