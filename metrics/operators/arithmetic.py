"""Sums, products, quotients and the lattice operations."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from evoprune.metrics.operators import BOUND, Operator, define
from evoprune.metrics.types import ANY, Sign


def add(x: Tensor, y: Tensor) -> Tensor:
    return (x + y).clamp_(-BOUND, BOUND)


def sub(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).clamp_(-BOUND, BOUND)


def mul(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).clamp_(-BOUND, BOUND)


def div(x: Tensor, y: Tensor) -> Tensor:
    divisor = y.abs().clamp_(min=1e-12)
    return (x / torch.where(y < 0, -divisor, divisor)).clamp_(-BOUND, BOUND)


def minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(x, y)


def maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


def neg(x: Tensor) -> Tensor:
    return -x


def _sum_sign(x: Sign, y: Sign) -> Sign:
    signs: set[int] = set()
    for a, b in product(x, y):
        signs |= ANY if a * b < 0 else {a or b}
    return frozenset(signs)


def _negated(x: Sign) -> Sign:
    return frozenset(-s for s in x)


def _product_sign(x: Sign, y: Sign) -> Sign:
    return frozenset(a * b for a, b in product(x, y))


def _quotient_sign(x: Sign, y: Sign) -> Sign:
    # A zero divisor counts as positive.
    return frozenset(a * (b or 1) for a, b in product(x, y))


define(Operator("add", add, "elementwise", 2, _sum_sign, lambda x, y: f"{x} + {y}", commutative=True))
define(Operator("sub", sub, "elementwise", 2, lambda x, y: _sum_sign(x, _negated(y)), lambda x, y: f"{x} - {y}"))
define(Operator("mul", mul, "elementwise", 2, _product_sign, lambda x, y: f"{x} \\cdot {y}", commutative=True))
define(Operator("div", div, "elementwise", 2, _quotient_sign, lambda x, y: f"\\frac{{{x}}}{{{y}}}", weight=2))
define(
    Operator(
        "min",
        minimum,
        "elementwise",
        2,
        lambda x, y: frozenset(min(a, b) for a, b in product(x, y)),
        lambda x, y: f"\\min({x}, {y})",
        commutative=True,
    )
)
define(
    Operator(
        "max",
        maximum,
        "elementwise",
        2,
        lambda x, y: frozenset(max(a, b) for a, b in product(x, y)),
        lambda x, y: f"\\max({x}, {y})",
        commutative=True,
    )
)
define(Operator("neg", neg, "elementwise", 1, _negated, lambda x: f"-{x}"))
