"""The canonical form of a metric: one expression for many that rank the weights of a group alike.

`normal_form` rewrites what has the same value; this file strips what changes the value but not the ranking. In
float32 a stripped function may have tied scores that now differ, so evaluate and export the canonical form, not the
form that was born. Source: symbolic pruning metrics, sections 3.2 and 3.3.
"""

from __future__ import annotations

from functools import lru_cache

from evoprune.metrics.analysis import varies
from evoprune.metrics.errors import InvalidExpression
from evoprune.metrics.expression import CONSTANT, MAX_TEXT, Expression, terminal, within_limits
from evoprune.metrics.files import content_hash
from evoprune.metrics.normal_form import EVEN, normal
from evoprune.metrics.products import (
    ZERO,
    Powers,
    Product,
    build,
    factorise,
    magnitude,
    order,
    scaled,
    snap,
    split,
    writable,
)
from evoprune.metrics.records import Group
from evoprune.metrics.sums import without_terms

# Names the meaning of terminals and operators; a key of another dialect never equals one of this.
DIALECT = "core/1"

_CACHE = 1 << 14

_WEIGHT = terminal("W")

# Operators that act alike on every element of a group, by what one result depends on.
_SCOPES: dict[Group, frozenset[str]] = {
    "row": frozenset({"element", "row", "matrix"}),
    "layer": frozenset({"element", "matrix"}),
    "global": frozenset({"element"}),
}


@lru_cache(_CACHE)
def canonicalise(expression: Expression, group: Group) -> Expression:
    """The canonical form of `expression` as a score whose weights are compared within `group` (N:M: ``row``).

    It ranks the weights as `expression` does, in real arithmetic and as long as no value reaches a bound of the
    language. Factors that may be zero for a whole row or matrix, such as ``Y_l2`` or ``depth``, are taken to be
    positive: where one is zero, `expression` would tie everything. A score that is constant within its group becomes
    0.
    """
    seen: list[Expression] = []
    current = expression
    while current not in seen:
        seen.append(current)
        current = _ranked(normal(current), group)
    # Usually a fixpoint; should rules ever chase each other, any member of the cycle leads to the same one.
    result = min(seen[seen.index(current) :], key=order)
    try:
        within_limits(result)
    except InvalidExpression:
        return expression
    return result if len(result.text) <= MAX_TEXT else expression


def metric_key(expression: Expression, group: Group) -> str:
    """A hash that metrics with the same canonical form share, in hex."""
    return content_hash({"dialect": DIALECT, "expression": canonicalise(expression, group).text, "group": group})


def _ranked(expression: Expression, group: Group) -> Expression:
    """A normal expression without the outermost of what is strictly increasing and the same for all of its group."""

    def fixed(part: Expression) -> bool:
        row, column = varies(part)
        if group == "global":
            return part.head == CONSTANT
        return not column and (group == "row" or not row)

    if fixed(expression):
        return ZERO
    product = factorise(expression)
    sign = 1.0 if product.coefficient > 0 else -1.0
    _, rest = split(product, lambda base, signed: fixed(base) and not signed)
    powers = _rescaled(rest.factors)
    if len(powers) == 1:
        ((base, (exponent, signed)),) = powers.items()
        if exponent == 1 and (signed or base.nonnegative):
            inner = _inside(base, group)
            return scaled(sign, without_terms(base, fixed) if inner is None else inner)
    return build(Product(sign, powers))


def _rescaled(factors: Powers) -> Powers:
    """All exponents times one positive number, which keeps the order of the products.

    The exponent of the weights becomes 1, or 2 where that is shorter to write; without weights, that of the first
    factor does.
    """
    odd = [exponent for exponent, signed in factors.values() if signed]
    # A signed factor can be written with an exponent of at least 1 only.
    unit = min(odd) if odd else factors.get(_WEIGHT, factors[min(factors, key=order)])[0]
    unscaled = _times(factors, 1 / unit)
    if unscaled is None:
        return factors
    squared = None if odd else _times(factors, 2 / unit)
    if squared is not None and build(Product(1.0, squared)).size < build(Product(1.0, unscaled)).size:
        return squared
    return unscaled


def _times(factors: Powers, scale: float) -> Powers | None:
    powers = {base: (snap(exponent * scale), signed) for base, (exponent, signed) in factors.items()}
    return powers if all(writable(exponent) for exponent, _ in powers.values()) else None


def _inside(base: Expression, group: Group) -> Expression | None:
    """The argument of a function that is strictly increasing in it, or in its magnitude, for all of the group alike."""
    if not base.args or base.operator.scope not in _SCOPES[group] or (base.value is not None and base.value < 0):
        return None
    increasing = base.operator.increasing
    if increasing == "always" or (increasing == "nonnegative" and base.args[0].nonnegative):
        return base.args[0]
    return magnitude(base.args[0]) if increasing == "nonnegative" and base.head in EVEN else None
