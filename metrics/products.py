"""Power products: every normal expression is a coefficient times powers of factors, and this file reads and writes it.

A factor is a normal expression t with an exponent a > 0 and stands for abs(t)^a, or for sign(t) * abs(t)^a if it is
signed. All of ``mul div neg abs sqr sqrt powc`` are products of factors, exactly so in real arithmetic, with two
exceptions that the guards of the language force: a divisor y stays whole, as the factor ``div(1,y)``, and a negative
power of t is a power of the factor ``powc(t,-1)``. Neither may cancel against t, because both stay finite where t is
zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from functools import lru_cache
from typing import NamedTuple

from evoprune.metrics.expression import CONSTANT, MAX_CONSTANT, Expression, call, constant, terminal

CACHE = 1 << 15

ONE = constant(1.0)
ZERO = constant(0.0)

# Beyond these an exponent or a coefficient is not merged with others: a bound of the language would soon bind.
_MAX_EXPONENT = 64.0
_MIN_COEFFICIENT = 1e-30

_SQUARES = {"X_ss": terminal("X_l2"), "Y_ss": terminal("Y_l2")}
_SQUARED = {root: terminal(square) for square, root in _SQUARES.items()}
_DENOMINATORS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)


Powers = dict[Expression, tuple[float, bool]]


class Product(NamedTuple):
    """A coefficient and its factors: base to (exponent > 0, signed). Never changed once made."""

    coefficient: float
    factors: Powers


@lru_cache(CACHE)
def snap(value: float) -> float:
    """`value` without the rounding noise of arithmetic: a small fraction if it is one, else 12 digits."""
    for denominator in _DENOMINATORS:
        whole = round(value * denominator)
        if whole and abs(value * denominator - whole) < 1e-11 * abs(whole):
            return whole / denominator
    return float(f"{value:.12g}")


def order(expression: Expression) -> tuple[bool, str]:
    """Sorts arguments: those that read the weights first, then by text."""
    return "W" not in expression.terminals, expression.text


def printable(coefficient: float) -> bool:
    """Whether a coefficient can stand in an expression as it is."""
    return coefficient == 0 or _MIN_COEFFICIENT <= abs(coefficient) <= MAX_CONSTANT


def writable(exponent: float) -> bool:
    """Whether an exponent of a factor is merged with others."""
    return 1 / _MAX_EXPONENT <= exponent <= _MAX_EXPONENT


def opaque(expression: Expression) -> Product:
    """The product whose only factor is `expression`."""
    return Product(1.0, {expression: (1.0, not expression.nonnegative)})


@lru_cache(CACHE)
def factorise(expression: Expression) -> Product:
    """The product that a normal expression is."""
    head, value = expression.head, expression.value
    if head == CONSTANT:
        assert value is not None
        return Product(value, {})
    if head in _SQUARES:
        return Product(1.0, {_SQUARES[head]: (2.0, False)})
    product: Product | None = None
    if head == "neg":
        product = multiply(Product(-1.0, {}), factorise(expression.args[0]))
    elif head == "mul":
        product = multiply(factorise(expression.args[0]), factorise(expression.args[1]))
    elif head == "div":
        product = _quotient(*expression.args)
    elif head in ("abs", "sqr", "sqrt"):
        product = raised(factorise(expression.args[0]), {"abs": 1.0, "sqr": 2.0, "sqrt": 0.5}[head])
    elif head == "powc":
        assert value is not None
        product = _power(expression.args[0], value)
    return opaque(expression) if product is None else product


def is_power_product(expression: Expression, names: Set[str]) -> bool:
    """Whether a normal expression is a product of powers of some of the named terminals, up to a coefficient."""
    return all(_root_of(base).head in names for base in factorise(expression).factors)


def _root_of(base: Expression) -> Expression:
    """What a factor is a power of: `t` of ``div(1,t)`` and of ``powc(t,-1)``."""
    if _is_reciprocal(base):
        return base.args[1]
    return base.args[0] if base.head == "powc" else base


def multiply(first: Product, second: Product) -> Product | None:
    """The product of two; None if its coefficient or an exponent cannot be written."""
    coefficient = snap(first.coefficient * second.coefficient)
    if not printable(coefficient):
        return None
    if coefficient == 0:
        return Product(0.0, {})
    factors = dict(first.factors)
    for base, (exponent, signed) in second.factors.items():
        _insert(factors, base, exponent, signed)
    return _checked(Product(coefficient, factors))


def raised(product: Product, exponent: float) -> Product | None:
    """The magnitude of a product to a positive power; None if it cannot be written."""
    coefficient = snap(abs(product.coefficient) ** exponent) if product.coefficient else 0.0
    if not printable(coefficient):
        return None
    factors: Powers = {}
    for base, (inner, _) in product.factors.items():
        _insert(factors, base, snap(inner * exponent), False)
    return _checked(Product(coefficient, factors))


def unsigned(expression: Expression) -> Expression:
    """The shortest expression with the magnitude of a normal one: what an even function needs to be given."""
    product = factorise(expression)
    factors: Powers = {}
    for base, (exponent, _) in product.factors.items():
        # A lone base prints without abs if its sign is kept.
        bare = exponent == 1 and not base.nonnegative and not _is_reciprocal(base)
        _insert(factors, base, exponent, bare)
    return build(Product(abs(product.coefficient), factors))


@lru_cache(CACHE)
def magnitude(expression: Expression) -> Expression:
    """abs of a normal expression, in normal form."""
    product = raised(factorise(expression), 1.0)
    return call("abs", expression) if product is None else build(product)


def build(product: Product) -> Expression:
    """The normal expression that a product prints as."""
    coefficient, factors = product
    if coefficient == 0 or not factors:
        return constant(coefficient)
    above: list[Expression] = []
    below: list[Expression] = []
    groups: dict[float, tuple[list[Expression], list[Expression]]] = {}
    for base, (exponent, signed) in factors.items():
        if signed:
            (below if _is_reciprocal(base) else above).append(base.args[1] if _is_reciprocal(base) else base)
            exponent = snap(exponent - 1)
            if exponent == 0:
                continue
        elif base in _SQUARED and exponent == 2:
            above.append(_SQUARED[base])
            continue
        elif exponent == 1 and base.nonnegative and not _is_inverse(base):
            (below if _is_reciprocal(base) else above).append(base.args[1] if _is_reciprocal(base) else base)
            continue
        if _is_inverse(base):
            above.append(call("powc", base.args[0], exponent=-exponent))
        else:
            group = groups.setdefault(exponent, ([], []))
            group[_is_reciprocal(base)].append(base.args[1] if _is_reciprocal(base) else base)
    for exponent, (over, under) in groups.items():
        above.append(_wrapped(_fraction(ONE, over, under), exponent))
    if coefficient == 1 or not above:
        return _fraction(constant(coefficient), above, below)
    fraction = _fraction(ONE, above, below)
    return call("neg", fraction) if coefficient == -1 else call("mul", constant(coefficient), fraction)


def balanced(head: str, items: Sequence[Expression]) -> Expression:
    """`head` applied to all of `items`, as a tree of least height."""
    if len(items) == 1:
        return items[0]
    half = len(items) // 2
    return call(head, balanced(head, items[:half]), balanced(head, items[half:]))


def scaled(weight: float, expression: Expression) -> Expression:
    """weight * expression in normal form, for a weight that is `printable` and an expression with coefficient 1."""
    product = multiply(Product(weight, {}), factorise(expression))
    return call("mul", constant(weight), expression) if product is None else build(product)


def common_factors(products: Sequence[Product], *, nonnegative: bool) -> Powers:
    """Factors that can be taken out of every one of `products`.

    Args:
        products: at least one.
        nonnegative: only factors that are never negative.
    """
    found: Powers = {}
    for base in products[0].factors:
        if not all(base in product.factors for product in products):
            continue
        powers = [product.factors[base] for product in products]
        least = min(exponent for exponent, _ in powers)
        signs = {signed for exponent, signed in powers if exponent == least}
        if len(signs) > 1:
            continue
        (signed,) = signs
        rests = [(snap(exponent - least), other != signed) for exponent, other in powers if exponent > least]
        # sign(t) * abs(t)^a cannot be written for a < 1.
        written = all(rest >= 1 or (rest >= 1 / _MAX_EXPONENT and not odd) for rest, odd in rests)
        if written and not (nonnegative and signed):
            found[base] = (least, signed)
    return found


def without(product: Product, common: Powers) -> Product:
    """What remains when the `common` factors are taken out."""
    rest = {}
    for base, (exponent, signed) in product.factors.items():
        taken, taken_signed = common.get(base, (0.0, False))
        if exponent > taken:
            rest[base] = (snap(exponent - taken), signed != taken_signed)
    return Product(product.coefficient, rest)


def split(product: Product, outside: Callable[[Expression, bool], bool]) -> tuple[Product, Product]:
    """The factors for which `outside(base, signed)` holds, with coefficient 1, and the rest with the coefficient."""
    out = {base: power for base, power in product.factors.items() if outside(base, power[1])}
    rest = {base: power for base, power in product.factors.items() if base not in out}
    return Product(1.0, out), Product(product.coefficient, rest)


def _is_reciprocal(base: Expression) -> bool:
    return base.head == "div" and base.args[0] == ONE


def _is_inverse(base: Expression) -> bool:
    return base.head == "powc" and base.value == -1


def _insert(factors: Powers, base: Expression, exponent: float, signed: bool) -> None:
    """Multiply `factors` by a power of `base`, in place."""
    if not signed and not base.nonnegative and _is_reciprocal(base):
        # abs(div(1,y)) is div(1,abs(y)) exactly, so that only one of them is ever a base.
        base = call("div", ONE, magnitude(base.args[1]))
    known = factors.pop(base, None)
    if known is None:
        factors[base] = (exponent, signed)
    elif _is_reciprocal(base) and signed and known[1]:
        _insert(factors, base, 2.0, False)
    else:
        factors[base] = (snap(exponent + known[0]), signed != known[1])


def _checked(product: Product) -> Product | None:
    return product if all(writable(exponent) for exponent, _ in product.factors.values()) else None


def _quotient(above: Expression, below: Expression) -> Product | None:
    if below.value is not None and below.head == CONSTANT and abs(below.value) >= 1e-12:
        return multiply(factorise(above), Product(1 / below.value, {}))
    reciprocal = opaque(call("div", ONE, below))
    return reciprocal if above == ONE else multiply(factorise(above), reciprocal)


def _power(base: Expression, exponent: float) -> Product | None:
    if exponent > 0:
        return raised(factorise(base), exponent)
    if exponent == 0:
        return Product(1.0, {})
    return _checked(Product(1.0, {call("powc", base, exponent=-1.0): (-exponent, False)}))


def _wrapped(base: Expression, exponent: float) -> Expression:
    head = {0.5: "sqrt", 1.0: "abs", 2.0: "sqr"}.get(exponent)
    return call(head, base) if head else call("powc", base, exponent=exponent)


def _fraction(lone: Expression, above: Iterable[Expression], below: Iterable[Expression]) -> Expression:
    """The product of `above` (`lone` if there are none) divided by each of `below`."""
    over = sorted(above, key=order)
    value = balanced("mul", over) if over else lone
    for divisor in sorted(below, key=order):
        value = call("div", value, divisor)
    return value
