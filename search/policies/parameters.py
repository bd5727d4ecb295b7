"""What is learned: the logits themselves, or two numbers for each group of units."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from evoprune.search.policies import Budget, Floats, Ints

CAP = 6.0
"""Logits stay within this of 0, so that no unit is ever out of reach (mask-policy search, default)."""


class Parameters(Protocol):
    """A map from parameters phi, [size], to logits theta, [n]."""

    size: int

    def start(self) -> Floats:
        """[size]: where learning begins."""

    def logits(self, phi: Floats) -> Floats:
        """[n], within the cap."""

    def pullback(self, phi: Floats, gradient: Floats) -> Floats:
        """[..., size]: gradients with respect to phi from those with respect to theta, [..., n]."""

    def push(self, phi: Floats, change: Floats) -> Floats:
        """[n]: the first-order change of theta that a change of phi makes."""

    def settled(self, phi: Floats) -> Floats:
        """[size]: phi with logits centred, which no policy notices, and within the cap."""

    def solve(self, phi: Floats, gradient: Floats, curvature: Floats, power: float) -> Floats:
        """[size]: F^-power gradient, where F is the Fisher information of phi if that of theta is diagonal.

        Args:
            gradient: [size].
            curvature: [n], the diagonal, positive.
            power: 1 for the natural step; 0.5 divides by the root of the diagonal of F.
        """


class Free:
    """phi is theta."""

    def __init__(self, budget: Budget, start: Floats, cap: float = CAP) -> None:
        self.size = budget.n
        self._budget = budget
        self._start = start
        self._cap = cap

    def start(self) -> Floats:
        return self.settled(self._start)

    def logits(self, phi: Floats) -> Floats:
        return phi

    def pullback(self, phi: Floats, gradient: Floats) -> Floats:
        return gradient

    def push(self, phi: Floats, change: Floats) -> Floats:
        return change

    def settled(self, phi: Floats) -> Floats:
        found: Floats = np.clip(self._budget.centred(phi), -self._cap, self._cap)
        return found

    def solve(self, phi: Floats, gradient: Floats, curvature: Floats, power: float) -> Floats:
        found: Floats = gradient / curvature**power
        return found


class Grouped:
    """theta_i = alpha_g z_i + beta_g: phi is [alpha of each group, beta of each group].

    Args:
        groups: [n] int, the group of each unit.
        prior: [n] float64, z, a score that is comparable inside a group.
        start: [n] initial logits, which phi starts as close to as it can (least squares inside each group).
    """

    def __init__(self, budget: Budget, groups: Ints, prior: Floats, start: Floats, cap: float = CAP) -> None:
        self._groups = np.unique(groups, return_inverse=True)[1].reshape(-1)
        self._count = int(self._groups.max()) + 1
        self.size = 2 * self._count
        self._prior = prior
        self._open = budget.open
        self._start = start
        self._cap = cap

    def start(self) -> Floats:
        counts = self._sums(np.ones(len(self._prior)))
        z, theta = self._sums(self._prior) / counts, self._sums(self._start) / counts
        off = self._prior - z[self._groups]
        spread = self._sums(off * off)
        alpha = np.divide(self._sums(off * self._start), spread, out=np.zeros(self._count), where=spread > 0)
        return self.settled(np.concatenate([alpha, theta - alpha * z]))

    def logits(self, phi: Floats) -> Floats:
        found: Floats = np.clip(self._linear(phi), -self._cap, self._cap)
        return found

    def pullback(self, phi: Floats, gradient: Floats) -> Floats:
        inside = gradient * self._inside(phi)
        rows = inside.reshape(-1, inside.shape[-1])
        found = np.stack([np.concatenate([self._sums(row * self._prior), self._sums(row)]) for row in rows])
        return found.reshape(*gradient.shape[:-1], self.size)

    def push(self, phi: Floats, change: Floats) -> Floats:
        return self._linear(change) * self._inside(phi)

    def settled(self, phi: Floats) -> Floats:
        phi = phi.copy()
        if self._open.any():
            phi[self._count :] -= self._linear(phi)[self._open].mean()
        return phi

    def solve(self, phi: Floats, gradient: Floats, curvature: Floats, power: float) -> Floats:
        weights = curvature * self._inside(phi) * self._open
        a, b, d = (self._sums(weights * factor) for factor in (self._prior**2, self._prior, 1.0))
        # A group that has nothing open has no gradient either.
        ridge = 1e-6 * (a + d) + 1e-12
        a, d = a + ridge, d + ridge
        if power != 1:
            found: Floats = gradient / np.concatenate([a, d]) ** power
            return found
        alpha, beta = gradient[: self._count], gradient[self._count :]
        return np.concatenate([d * alpha - b * beta, a * beta - b * alpha]) / np.tile(a * d - b * b, 2)

    def _linear(self, phi: Floats) -> Floats:
        return phi[: self._count][self._groups] * self._prior + phi[self._count :][self._groups]

    def _inside(self, phi: Floats) -> Floats:
        """[n]: 1.0 where the cap does not hold a logit."""
        found: Floats = (np.abs(self._linear(phi)) <= self._cap).astype(np.float64)
        return found

    def _sums(self, values: Floats) -> Floats:
        found: Floats = np.bincount(self._groups, weights=values, minlength=self._count).astype(np.float64)
        return found


def refined(budget: Budget, grouped: Parameters, phi: Floats, cap: float = CAP) -> Free:
    """Free parameters that start at the logits where grouped ones are."""
    return Free(budget, grouped.logits(phi), cap)
