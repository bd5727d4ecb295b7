"""Allocations: how much each matrix of a model loses, and their exact repair to a budget. Needs no torch.

A row of a matrix loses floor(sparsity * in) weights, so the unit of everything here is one column per row: a step of
a matrix is `out_features` weights. Source of the budget's semantics: allocation chapter, sections 5.2 and 5.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evoprune.metrics.column_steps import nearest_moves
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site, removed_count

# Sparsities are written with this many decimals, or with more where a matrix is too wide for them.
_DECIMALS = 6
# Remainders that differ by less are equal: they come from sums of floats.
_NOISE_DECIMALS = 9


@dataclass(frozen=True, slots=True)
class SiteSparsity:
    """What one matrix loses.

    Attributes:
        name: module path in memory.
        shape: (out, in).
        sparsity: fraction removed, in [0, 1]: a row loses floor(sparsity * in) weights. At 1 the bias goes too, and
            with all matrices of an attention or an MLP that part of the block is gone.
        bits: of each weight that stays; None where the allocation has no bits.

    Raises:
        InvalidInput: the sparsity is outside [0, 1].
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    bits: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:  # a NaN is refused too
            raise InvalidInput(
                f"sparsity {self.sparsity} of {self.name} is outside [0, 1]: give the fraction of its weights to remove"
            )

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def removed(self) -> int:
        """Weights removed."""
        return self.shape[0] * removed_count(self.sparsity, self.shape[1])

    @property
    def stored_bits(self) -> int:
        """Bits of all weights that stay; 0 without bits."""
        return (self.bits or 0) * (self.weights - self.removed)


@dataclass(frozen=True, slots=True)
class BitBudget:
    """How many bits a model may have.

    Attributes:
        mean: of a weight that stays, as it was asked for.
        total: of all matrices together, the whole number that this came to.
    """

    mean: float
    total: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """One sparsity for each matrix of a model, or bits too; holds nothing that varies between machines.

    Attributes:
        model: class name of the model, such as ``LlamaForCausalLM``; with the names of the matrices it says what the
            allocation is of.
        sparsity: the budget, as the fraction of all prunable weights that goes, in [0, 1).
        sites: one entry per matrix, in model order.
        allocator: name of what made it.
        parameters: of the allocator; JSON values.
        fingerprint: of the weights that it was found on; None if that is not known.
        bits: the budget of bits; None if weights are not rounded. With it every matrix has bits.
    """

    model: str
    sparsity: float
    sites: tuple[SiteSparsity, ...]
    allocator: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    bits: BitBudget | None = None

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(site.weights for site in self.sites)

    @property
    def removed(self) -> int:
        """Weights removed."""
        return sum(site.removed for site in self.sites)

    @property
    def stored_bits(self) -> int:
        """Bits of all weights that stay; 0 without bits."""
        return sum(site.stored_bits for site in self.sites)

    def by_name(self) -> dict[str, float]:
        """Sparsity by module path."""
        return {site.name: site.sparsity for site in self.sites}

    def bits_by_name(self) -> dict[str, int]:
        """Bits by module path; empty without bits."""
        return {site.name: site.bits for site in self.sites if site.bits is not None}

    def check(self, model: str, sites: Iterable[Site]) -> None:
        """Refuse a model that this allocation is not of.

        Args:
            model: class name of the model.
            sites: its matrices.

        Raises:
            InvalidInput: names the first matrix that differs.
        """
        check_matrices(self.model, {site.name: site.shape for site in self.sites}, model, sites)

    def doubt(self, fingerprint: str) -> str | None:
        """A line that says so if this allocation was found on other weights; None if not, or if that is not known.

        No error: what was found on a model may well serve what was trained further from it.

        Args:
            fingerprint: of the weights at hand.
        """
        if self.fingerprint in (None, fingerprint):
            return None
        return (
            f"the allocation was found on other weights of the same shapes (fingerprint {str(self.fingerprint)[:12]}, "
            f"here {fingerprint[:12]}): compare it with uniform sparsity"
        )

    def check_budget(self) -> None:
        """Refuse sparsities that do not add up to the budget, as in a file that was edited by hand.

        A hundredth of a per cent is let pass, or one step of the smallest matrix if that is more; of bits nothing.

        Raises:
            InvalidInput: names both numbers; or some matrices have bits, and others none.
        """
        for site in self.sites:
            if (site.bits is None) != (self.bits is None):
                has = (
                    "bits without a budget of them" if self.bits is None else "no bits, and the allocation has a budget"
                )
                raise InvalidInput(f"{site.name} has {has}: give bits to every matrix and a budget, or to none")
        if self.bits is not None and self.stored_bits > self.bits.total:
            raise InvalidInput(
                f"the allocation's budget is {self.bits.total:,} bits, but its matrices have {self.stored_bits:,}: "
                "change one or the other"
            )
        budget = removed_count(self.sparsity, self.weights)
        if abs(self.removed - budget) > slack_of(self.sites):
            raise InvalidInput(
                f"the allocation's budget is a sparsity of {self.sparsity:g}, but its matrices lose "
                f"{self.removed / max(self.weights, 1):.6f} of all weights: change one or the other"
            )

    def summary(self) -> dict[str, Any]:
        """What made it and its budget: JSON values."""
        bits = {} if self.bits is None else {"bits": {"mean": self.bits.mean, "budget": self.bits.total}}
        return {"allocator": self.allocator, "parameters": dict(self.parameters), "sparsity": self.sparsity, **bits}


def slack_of(sites: Sequence[SiteSparsity]) -> int:
    """Weights by which matrices may miss a budget that they claim; see `Allocation.check_budget`."""
    return max(min((site.shape[0] for site in sites), default=0), sum(site.weights for site in sites) // 10_000)


def check_matrices(
    given_model: str, given: Mapping[str, tuple[int, int] | None], model: str, sites: Iterable[Site]
) -> None:
    """Refuse an allocation of another model.

    Args:
        given_model: class name of the model that the allocation is of.
        given: shape by module path, as the allocation has them; None where it does not say.
        model: class name of the model at hand.
        sites: its matrices.

    Raises:
        InvalidInput: names the first matrix that differs.
    """
    wanted = {site.name: (site.out_features, site.in_features) for site in sites}
    difference = ""
    if missing := [name for name in wanted if name not in given]:
        difference = f"it gives {missing[0]} no sparsity"
    elif surplus := [name for name in given if name not in wanted]:
        difference = f"there is no {surplus[0][:120]} here"
    elif unlike := [name for name, shape in wanted.items() if given[name] not in (None, shape)]:
        difference = f"{unlike[0]} is {list(wanted[unlike[0]])} here and {list(given[unlike[0]] or ())} there"
    elif given_model != model:
        difference = "their matrices are alike, their classes are not"
    if difference:
        raise InvalidInput(f"the allocation is of another model, {given_model[:80]} and not this {model}: {difference}")


def allocation_of(
    requested: Sequence[float],
    sites: Sequence[Site],
    target: float,
    *,
    model: str,
    allocator: str,
    parameters: Mapping[str, Any] | None = None,
) -> Allocation:
    """The allocation nearest to what was requested that meets the budget exactly; see `repair`.

    Args:
        requested: one sparsity per site; any finite numbers.
        sites: the matrices, in model order.
        target: the budget, as the fraction of all their weights that goes, in [0, 1).
        model: class name of the model.
        allocator: who asks.
        parameters: of the allocator; JSON values.

    Raises:
        InvalidInput: a number is not finite, or the budget cannot be reached.
    """
    sparsities = repair(requested, sites, target)
    return Allocation(
        model=model,
        sparsity=target,
        sites=tuple(
            SiteSparsity(site.name, (site.out_features, site.in_features), sparsity)
            for site, sparsity in zip(sites, sparsities, strict=True)
        ),
        allocator=allocator,
        parameters=dict(parameters or {}),
    )


def repair(requested: Sequence[float], sites: Sequence[Site], target: float) -> tuple[float, ...]:
    """Sparsities near the requested ones that together remove exactly the budget, floor(target * all weights).

    What is wanted is first moved by one common shift, within the bounds of each matrix (0, and one weight kept per
    row), until it adds up: the nearest point in the weighted sense. Whole columns are then given by largest
    remainder, earlier matrices first among equals, and the last few moved so that the sum comes as near to the budget
    as the steps of the matrices allow. What meets its budget already stays as it is.

    Args:
        requested: one sparsity per site; numbers outside [0, 1) are moved to the nearest bound.
        sites: the matrices, in model order.
        target: fraction of all weights that goes, in [0, 1).

    Returns:
        One sparsity per site such that `removed_count` of it is the intended number of columns. The total differs from
        the budget by at most half the common divisor of all steps, hence by less than one step of the smallest matrix;
        by more only where the smaller matrices together have too few columns to make up for one of a larger.

    Raises:
        InvalidInput: a number is not finite, the target is outside [0, 1), or more than can go while every row keeps
            a weight.

    Source: allocation chapter, section 5.3; largest remainders after Hamilton's method of apportionment.
    """
    if len(requested) != len(sites):
        raise InvalidInput(f"{len(requested)} sparsities for {len(sites)} matrices: give one each")
    if not 0 <= target < 1:
        raise InvalidInput(f"sparsity {target} is outside [0, 1): give the fraction of weights to remove")
    for site, sparsity in zip(sites, requested, strict=True):
        if not math.isfinite(sparsity):
            raise InvalidInput(f"the sparsity of {site.name} is {sparsity}: give a number in [0, 1)")
    steps = [site.out_features for site in sites]
    tops = [site.in_features - 1 for site in sites]
    weights = sum(site.weights for site in sites)
    budget = removed_count(target, weights)
    most = sum(step * top for step, top in zip(steps, tops, strict=True))
    if budget > most + min((step for step, top in zip(steps, tops, strict=True) if top), default=0):
        raise InvalidInput(
            f"sparsity {target:g} cannot be reached: it removes {budget:,} of {weights:,} weights, and {most:,} can go "
            f"while every row keeps one; give at most {math.floor(most / weights * 1e4) / 1e4:g}"
        )
    columns, wanted = _as_requested(requested, sites, tops)
    residue = budget - sum(count * step for count, step in zip(columns, steps, strict=True))
    if abs(residue) > min(steps, default=0):
        wanted = [
            share * site.in_features for share, site in zip(_shifted(requested, sites, budget), sites, strict=True)
        ]
        columns, residue = _rounded(wanted, steps, tops, budget)
    _finish(columns, wanted, steps, tops, residue)
    return tuple(exact_sparsity(count, site.in_features) for count, site in zip(columns, sites, strict=True))


def exact_sparsity(removed: int, width: int) -> float:
    """The shortest decimal sparsity, of six digits or more, at which a row of `width` loses exactly `removed` weights.

    The quotient itself would not do: the decimal that a computer writes for 1/3 is below it, and its floor one less.
    """
    digits = _DECIMALS
    while True:
        scale = 10**digits
        decimal = -(-removed * scale // width)
        if decimal * width // scale == removed:
            return decimal / scale
        digits += 1


def _as_requested(
    requested: Sequence[float], sites: Sequence[Site], tops: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Columns that go if each request is taken at its word, and the same before rounding."""
    columns, wanted = [], []
    for sparsity, site, top in zip(requested, sites, tops, strict=True):
        within = min(max(sparsity, 0.0), 1.0)
        columns.append(min(removed_count(within, site.in_features), top))
        wanted.append(min(within * site.in_features, float(top)))
    return columns, wanted


def _shifted(requested: Sequence[float], sites: Sequence[Site], budget: int) -> list[float]:
    """Requests plus one common number, each clipped to [0, (in - 1) / in], that together remove `budget` weights.

    The number is found by walking over the points where a matrix reaches or leaves a bound; between them the sum is
    linear in it.
    """
    events: list[tuple[float, int]] = []
    for sparsity, site in zip(requested, sites, strict=True):
        top = (site.in_features - 1) / site.in_features
        events += [(-sparsity, site.weights), (top - sparsity, -site.weights)]
    events.sort()
    shift, total, slope = events[0][0] if events else 0.0, 0.0, 0
    for position, change in events:
        reached = total + slope * (position - shift)
        if slope and reached >= budget:
            shift += (budget - total) / slope
            break
        shift, total, slope = position, reached, slope + change
    return [
        min(max(sparsity + shift, 0.0), (site.in_features - 1) / site.in_features)
        for sparsity, site in zip(requested, sites, strict=True)
    ]


def _rounded(wanted: Sequence[float], steps: Sequence[int], tops: Sequence[int], budget: int) -> tuple[list[int], int]:
    """Whole columns by largest remainder, and the weights that are then still to be removed."""
    whole = [round(count, _NOISE_DECIMALS) for count in wanted]
    columns = [min(int(count), top) for count, top in zip(whole, tops, strict=True)]
    residue = budget - sum(count * step for count, step in zip(columns, steps, strict=True))
    for index in sorted(range(len(steps)), key=lambda index: columns[index] - whole[index]):
        if columns[index] < tops[index] and 2 * residue >= steps[index]:
            columns[index] += 1
            residue -= steps[index]
    return columns, residue


def _finish(
    columns: list[int], wanted: Sequence[float], steps: Sequence[int], tops: Sequence[int], residue: int
) -> None:
    """Move whole columns, as few weights as will do, until the residue is as small as it can be."""
    members: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        members.setdefault(step, []).append(index)
    rooms = {
        step: (sum(columns[index] for index in group), sum(tops[index] - columns[index] for index in group))
        for step, group in members.items()
    }
    for step, moves in nearest_moves(residue, rooms).items():
        sign = 1 if moves > 0 else -1
        for _ in range(abs(moves)):
            # Where the request is missed most in this direction; the first of equals gains, the last loses.
            index = min(
                (index for index in members[step] if 0 <= columns[index] + sign <= tops[index]),
                key=lambda index: (sign * round(columns[index] - wanted[index], _NOISE_DECIMALS), sign * index),
            )
            columns[index] += sign
