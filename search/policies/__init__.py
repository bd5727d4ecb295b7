"""Mask policies: distributions over masks that meet a budget. Plug-ins, one file each; no model, no torch.

A mask is [n] bool, True = keep, over n units: anything that is kept or removed as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.registry import Registry

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Table:
    """Strata of one size that keep equally many, as rows.

    Attributes:
        units: [strata, size] int, unit ids, ascending in each row.
        keep: how many of each row are kept, 0 < keep < size.
    """

    units: Ints
    keep: int


@dataclass(frozen=True, eq=False)
class Strata:
    """Exactly so many units of each stratum are kept.

    Attributes:
        labels: [n] int, the stratum of each unit, 0 .. strata - 1.
        keep: [strata] int, how many are kept, pinned ones included.
        pinned: [n] bool, units that are always kept; None if none is.

    Raises:
        InvalidInput: shapes or numbers do not fit.
    """

    labels: Ints
    keep: Ints
    pinned: Mask | None = None

    def __post_init__(self) -> None:
        _settle(self, "labels", "keep")
        if self.labels.min() < 0 or self.labels.max() >= len(self.keep):
            raise InvalidInput(f"a stratum's label is not in 0 .. {len(self.keep) - 1}")
        sizes = np.bincount(self.labels, minlength=len(self.keep))
        for stratum in np.flatnonzero((self.keep > sizes) | (self.keep < self._pins))[:1]:
            raise InvalidInput(
                f"stratum {stratum} of {sizes[stratum]} units, {self._pins[stratum]} of them pinned, cannot keep "
                f"{self.keep[stratum]}"
            )

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.labels)

    @cached_property
    def _pins(self) -> Ints:
        return _counts(self.labels, self.pinned, len(self.keep))

    @cached_property
    def always(self) -> Mask:
        """[n] bool: units that every mask keeps, being pinned or in a stratum that keeps all it has."""
        full = self.keep == np.bincount(self.labels, minlength=len(self.keep))
        return full[self.labels] if self.pinned is None else self.pinned | full[self.labels]

    @cached_property
    def open(self) -> Mask:
        """[n] bool: units that some masks keep and others do not."""
        empty = self.keep == self._pins
        return ~(self.always | empty[self.labels])

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """The open units, by size and count of their strata."""
        units = np.flatnonzero(self.open)
        units = units[np.argsort(self.labels[units], kind="stable")]
        sizes = np.bincount(self.labels[units], minlength=len(self.keep))
        keep = self.keep - self._pins
        found = []
        # Pairs as single numbers, of which the distinct ones are found faster.
        base = self.n + 1
        for size, count in (divmod(int(pair), base) for pair in np.unique(sizes * base + keep) if pair >= base):
            rows = (sizes == size) & (keep == count)
            found.append(Table(units[rows[self.labels[units]]].reshape(-1, size), count))
        return tuple(found)

    def best(self, values: Floats) -> Mask:
        """[n] bool: the mask that meets the budget exactly by highest value, of equal ones the lower id.

        Args:
            values: [n] float64.
        """
        mask = self.always.copy()
        for table in self.tables:
            order = np.argsort(-values[table.units], axis=1, kind="stable")[:, : table.keep]
            mask[np.take_along_axis(table.units, order, axis=1)] = True
        return mask

    def centred(self, values: Floats, weights: Floats | None = None) -> Floats:
        """[n] float64: logits of open units less the mean of those of their stratum, which changes no policy.

        Args:
            weights: [n], positive, of the mean; 1 each if None.
        """
        values = values.copy()
        for table in self.tables:
            rows = values[table.units]
            heavy = np.ones_like(rows) if weights is None else weights[table.units]
            values[table.units] = rows - ((rows * heavy).sum(axis=1) / heavy.sum(axis=1))[:, None]
        return values


@dataclass(frozen=True, eq=False)
class Knapsack:
    """The costs of what is kept add up to at most a budget.

    Attributes:
        costs: [n] int, at least 1.
        budget: in the same unit, pinned units included.
        pinned: [n] bool, units that are always kept; None if none is.

    Raises:
        InvalidInput: shapes or numbers do not fit.
    """

    costs: Ints
    budget: int
    pinned: Mask | None = None

    def __post_init__(self) -> None:
        _settle(self, "costs")
        object.__setattr__(self, "budget", int(self.budget))
        if self.costs.min() < 1:
            raise InvalidInput("a unit costs less than 1: a budget says nothing of it")
        pins = 0 if self.pinned is None else int(self.costs[self.pinned].sum())
        if pins > self.budget:
            raise InvalidInput(f"pinned units cost {pins}, more than the budget of {self.budget}")

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.costs)

    @cached_property
    def always(self) -> Mask:
        """[n] bool: units that every mask keeps, being pinned or as the budget is enough for all that fit."""
        pinned = np.zeros(self.n, bool) if self.pinned is None else self.pinned
        left = self.budget - int(self.costs[pinned].sum())
        fits = ~pinned & (self.costs <= left)
        return pinned | fits if int(self.costs[fits].sum()) <= left else pinned

    @cached_property
    def left(self) -> int:
        """What of the budget is for units that may go."""
        return self.budget - int(self.costs[self.always].sum())

    @cached_property
    def open(self) -> Mask:
        """[n] bool: units that some masks keep and others do not."""
        return ~self.always & (self.costs <= self.left)

    def best(self, values: Floats) -> Mask:
        """[n] bool: units by highest value, of equal ones the lower id, each kept if it still fits.

        Args:
            values: [n] float64.
        """
        units = np.flatnonzero(self.open)
        order = units[np.argsort(-values[units], kind="stable")]
        mask = self.always.copy()
        mask[order[fitting(self.costs[order][None], self.left)[0]]] = True
        return mask

    def centred(self, values: Floats, weights: Floats | None = None) -> Floats:
        """[n] float64: logits of open units less their mean, which changes no policy; arguments as for strata."""
        values = values.copy()
        if self.open.any():
            rows = values[self.open]
            heavy = np.ones_like(rows) if weights is None else weights[self.open]
            values[self.open] = rows - (rows * heavy).sum() / heavy.sum()
        return values


Budget = Strata | Knapsack


@dataclass(frozen=True, eq=False)
class Draws:
    """Masks of one step.

    Attributes:
        masks: [K, n] bool.
        order: [K, picks] int, the units in the order in which they were picked, stratum by stratum; -1 fills up rows
            with fewer picks. None if the policy has no order.
        noise: [K, n] float64 in [0, 1), the uniform numbers that the masks were made of; None unless asked for.
    """

    masks: Mask
    order: Ints | None = None
    noise: Floats | None = None

    def take(self, indices: Sequence[int] | Ints) -> Draws:
        """Some of the draws."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Draws(
            self.masks[chosen],
            None if self.order is None else self.order[chosen],
            None if self.noise is None else self.noise[chosen],
        )


class Policy(Protocol):
    """A distribution over masks with a budget: pure functions of logits, which are [n] float64 and finite.

    Adding one number to all logits changes nothing. Units that are not `budget.open` have score 0.

    Attributes:
        exact: every mask meets the budget; else only the expected mask does.
        plain: the score is the mask less its expectation, but for what a shift of all logits takes out of it, so that
            p (1 - p) is about the information of a logit; where the order of picks is scored, that is more.
    """

    exact: ClassVar[bool]
    plain: ClassVar[bool]

    @property
    def budget(self) -> Budget: ...

    @property
    def n(self) -> int: ...

    def draw(self, logits: Floats, uniforms: Floats) -> Draws:
        """The masks that numbers make: a sample if they are independent and uniform.

        Args:
            uniforms: [K, n] float64 in [0, 1).
        """

    def sample(self, logits: Floats, count: int, rng: np.random.Generator) -> Draws:
        """Independent masks; as `draw` makes them of ``rng.random((count, n))``."""

    def log_prob(self, logits: Floats, draws: Draws) -> Floats:
        """[K]: log-probability of each draw, in its order if it has one."""

    def score(self, logits: Floats, draws: Draws) -> Floats:
        """[K, n]: gradient of `log_prob` with respect to the logits."""

    def inclusion(self, logits: Floats) -> Floats:
        """[n]: probability that each unit is kept; the policy says where it is an approximation."""

    def mode(self, logits: Floats) -> Mask:
        """[n] bool: the budget's mask by highest logit, of equal ones the lower id."""


@dataclass(frozen=True)
class PolicyPlugin:
    """How to get a policy.

    Attributes:
        what: one line for people.
        make: called with a budget.
        budgets: the kinds of budget that it takes.
    """

    what: str
    make: Callable[[Any], Policy]
    budgets: tuple[type, ...]

    def build(self, budget: Budget) -> Policy:
        """The policy for one budget.

        Raises:
            InvalidInput: it takes no such budget, or one of its size.
        """
        if not isinstance(budget, self.budgets):
            takes = " or ".join({"Strata": "counts", "Knapsack": "costs"}[kind.__name__] for kind in self.budgets)
            raise InvalidInput(f"this policy ({self.what}) takes a budget of {takes} only")
        return self.make(budget)


POLICIES: Registry[PolicyPlugin] = Registry("policy", "evoprune.search.policies")

CHUNK = 4_000_000
"""Numbers that are worked on at a time where draws are many or long."""


def chunks(count: int, n: int) -> list[slice]:
    """Slices of `count` draws of `n` units, each of about `CHUNK` numbers."""
    step = max(1, CHUNK // max(1, n))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def joined(parts: Sequence[Draws]) -> Draws:
    """Draws after one another; orders are filled up with -1."""
    noises = [part.noise for part in parts if part.noise is not None]
    orders = [part.order for part in parts if part.order is not None]
    width = max((order.shape[1] for order in orders), default=0)
    padded = [np.pad(order, ((0, 0), (0, width - order.shape[1])), constant_values=-1) for order in orders]
    return Draws(
        np.concatenate([part.masks for part in parts]),
        np.concatenate(padded) if padded else None,
        np.concatenate(noises) if noises else None,
    )


def fitting(costs: Ints, budget: int) -> Mask:
    """[K, n] bool: what is taken if each row is gone through from the left and everything that still fits is taken.

    Args:
        costs: [K, n] int.
        budget: of each row.
    """
    taken = np.zeros(costs.shape, bool)
    waiting = costs <= budget
    left = np.full(len(costs), budget, dtype=np.int64)
    # A unit that does not fit never fits again, so a round ends with fewer different costs than it began with.
    while waiting.any():
        spent = np.cumsum(np.where(waiting, costs, 0), axis=1)
        new = waiting & np.logical_and.accumulate(~waiting | (spent <= left[:, None]), axis=1)
        taken |= new
        left -= np.where(new, costs, 0).sum(axis=1)
        waiting &= ~new & (costs <= left[:, None])
    return taken


def _settle(budget: Any, *names: str) -> None:
    """Make integer arrays of these fields and a bool array of `pinned`."""
    for name in names:
        object.__setattr__(budget, name, np.asarray(getattr(budget, name), dtype=np.int64))
    units = getattr(budget, names[0])
    if units.ndim != 1 or not len(units):
        raise InvalidInput("a budget needs at least one unit")
    if budget.pinned is not None:
        object.__setattr__(budget, "pinned", np.asarray(budget.pinned, dtype=bool))
        if budget.pinned.shape != units.shape:
            raise InvalidInput(f"pinned says something of {budget.pinned.size} units, but there are {len(units)}")


def _counts(labels: Ints, chosen: Mask | None, strata: int) -> Ints:
    """[strata] int: how many of each stratum are chosen."""
    if chosen is None:
        return np.zeros(strata, dtype=np.int64)
    return np.bincount(labels[chosen], minlength=strata).astype(np.int64)
