"""Sums, minima and maxima of normal expressions: flattened, sorted, with what their terms have in common taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from evoprune.metrics.analysis import bounds
from evoprune.metrics.expression import Expression, call
from evoprune.metrics.products import (
    ONE,
    ZERO,
    Product,
    balanced,
    build,
    common_factors,
    factorise,
    multiply,
    order,
    printable,
    scaled,
    snap,
    without,
)

# A weight this small beside the weights that it is the sum of is their rounding, hence zero.
_CANCELLED = 1e-10


def add_up(weighted: Iterable[tuple[float, Expression]]) -> Expression | None:
    """The normal form of a weighted sum of normal expressions; None if a weight cannot be written.

    Factors that all terms share are taken out, and then a weight, so that the smallest weight of a term is 1 and the
    first term is positive. ``x-y`` and ``y-x`` thus differ by a sign only.
    """
    found = _terms(weighted)
    if not all(printable(weight) for weight in found.values()):
        return None
    if len(found) < 2:
        return next((scaled(weight, term) for term, weight in found.items()), ZERO)
    ordered = sorted((term for term in found if term != ONE), key=order)
    if ONE not in found:
        products = [factorise(term) for term in ordered]
        common = common_factors(products, nonnegative=False)
        if common:
            rests = [build(without(product, common)) for product in products]
            inner = add_up((found[term], rest) for term, rest in zip(ordered, rests, strict=True))
            whole = None if inner is None else multiply(Product(1.0, common), factorise(inner))
            if whole is not None:
                return build(whole)
    sign = 1.0 if found[ordered[0]] > 0 else -1.0
    unit = sign * min(abs(found[term]) for term in ordered)
    weights = {term: snap(weight / unit) for term, weight in found.items()}
    if not all(printable(weight) for weight in weights.values()):
        unit = sign
        weights = {term: snap(weight / unit) for term, weight in found.items()}
    if ONE in weights:
        ordered.append(ONE)
    total = balanced("add", [scaled(weights[term], term) for term in ordered if weights[term] > 0])
    negative = [scaled(-weights[term], term) for term in ordered if weights[term] < 0]
    if negative:
        total = call("sub", total, balanced("add", negative))
    return scaled(unit, total)


def without_terms(expression: Expression, dropped: Callable[[Expression], bool]) -> Expression:
    """A normal sum less those terms for which `dropped` holds; anything else is a sum of one term."""
    found = _terms([(1.0, expression)])
    kept = [(weight, term) for term, weight in found.items() if not dropped(term)]
    if len(kept) == len(found):
        return expression
    total = add_up(kept)
    return expression if total is None else total


def lattice(head: str, args: Iterable[Expression]) -> Expression:
    """The minimum or maximum of normal expressions, without those that never decide, common factors >= 0 taken out."""
    flat: dict[Expression, None] = {}
    pending = list(args)
    while pending:
        arg = pending.pop()
        if arg.head == head:
            pending.extend(arg.args)
        else:
            flat[arg] = None
    kept = sorted(
        (arg for arg in flat if not any(_beats(head, other, arg) for other in flat if other != arg)), key=order
    )
    if len(kept) == 1:
        return kept[0]
    products = [factorise(arg) for arg in kept]
    unit = min(abs(product.coefficient) for product in products if product.factors)
    common = common_factors(products, nonnegative=True)
    weights = [snap(product.coefficient / unit) for product in products]
    if (common or unit != 1) and all(printable(weight) for weight in weights):
        rests = [without(product, common).factors for product in products]
        inner = lattice(head, [build(Product(weight, rest)) for weight, rest in zip(weights, rests, strict=True)])
        whole = multiply(Product(unit, common), factorise(inner))
        if whole is not None:
            return build(whole)
    return balanced(head, kept)


def _terms(weighted: Iterable[tuple[float, Expression]]) -> dict[Expression, float]:
    """Terms and their weights; a constant is a multiple of `ONE`."""
    collected: dict[Expression, tuple[float, float]] = {}
    for weight, expression in weighted:
        _collect(weight, expression, collected)
    return {term: snap(weight) for term, (weight, size) in collected.items() if abs(weight) > _CANCELLED * size}


def _collect(weight: float, expression: Expression, collected: dict[Expression, tuple[float, float]]) -> None:
    """Add weight * expression to `collected`: term to (its weight, the sum of absolute weights that went into it)."""
    if expression.head in ("add", "sub"):
        _collect(weight, expression.args[0], collected)
        _collect(weight if expression.head == "add" else -weight, expression.args[1], collected)
        return
    coefficient, factors = factorise(expression)
    if len(factors) == 1:
        ((base, (exponent, signed)),) = factors.items()
        if base.head in ("add", "sub") and exponent == 1 and (signed or base.nonnegative):
            _collect(weight * coefficient, base, collected)
            return
    term = expression if coefficient == 1 else build(Product(1.0, factors))
    known, size = collected.get(term, (0.0, 0.0))
    collected[term] = (known + weight * coefficient, size + abs(weight * coefficient))


def _beats(head: str, winner: Expression, loser: Expression) -> bool:
    """Whether `loser` can be left out of a minimum or maximum that `winner` is in."""
    if head == "min":
        return bounds(winner)[1] <= bounds(loser)[0]
    return bounds(winner)[0] >= bounds(loser)[1]
