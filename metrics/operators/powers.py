"""Absolute values, squares, roots and real powers of magnitudes."""

from __future__ import annotations

from torch import Tensor

from evoprune.metrics.operators import BOUND, TINY, Operator, define
from evoprune.metrics.types import NONNEGATIVE, POSITIVE, ZERO, Sign


def absolute(x: Tensor) -> Tensor:
    return x.abs()


def sqr(x: Tensor) -> Tensor:
    return (x * x).clamp_(max=BOUND)


def sqrt(x: Tensor) -> Tensor:
    return x.abs().sqrt_()


def powc(x: Tensor, exponent: float) -> Tensor:
    magnitude = x.abs()
    if exponent > 0:
        # Zero to a positive power is zero, not a power of the smallest magnitude.
        return magnitude.pow_(exponent).clamp_(max=BOUND)
    return magnitude.clamp_(min=TINY).pow_(exponent).clamp_(max=BOUND)


def _magnitude_sign(x: Sign) -> Sign:
    if x == ZERO:
        return ZERO
    return NONNEGATIVE if 0 in x else POSITIVE


define(
    Operator("abs", absolute, "elementwise", 1, _magnitude_sign, lambda x: f"|{x}|", increasing="nonnegative"),
)
define(Operator("sqr", sqr, "elementwise", 1, _magnitude_sign, lambda x: f"{{{x}}}^{{2}}", increasing="nonnegative"))
define(Operator("sqrt", sqrt, "elementwise", 1, _magnitude_sign, lambda x: f"\\sqrt{{{x}}}", increasing="nonnegative"))
define(
    Operator(
        "powc",
        powc,
        "power",
        1,
        lambda x: NONNEGATIVE,
        lambda x, exponent: f"{{{x}}}^{{{exponent}}}",
        weight=2,
        increasing="nonnegative",
    )
)
