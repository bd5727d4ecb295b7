"""Logarithms, the exponential and the hyperbolic tangent."""

from __future__ import annotations

from torch import Tensor

from evoprune.metrics.operators import TINY, Operator, define
from evoprune.metrics.types import ANY, NONNEGATIVE, POSITIVE, ZERO, Sign


def log(x: Tensor) -> Tensor:
    return x.abs().clamp_(min=TINY).log_()


def log1p(x: Tensor) -> Tensor:
    return x.abs().log1p_()


def exp(x: Tensor) -> Tensor:
    return x.clamp(-69.0, 69.0).exp_()


def tanh(x: Tensor) -> Tensor:
    return x.tanh()


def _log1p_sign(x: Sign) -> Sign:
    if x == ZERO:
        return ZERO
    return NONNEGATIVE if 0 in x else POSITIVE


define(Operator("log", log, "elementwise", 1, lambda x: ANY, lambda x: f"\\log {x}", 2, increasing="nonnegative"))
define(
    Operator("log1p", log1p, "elementwise", 1, _log1p_sign, lambda x: f"\\log(1 + {x})", 2, increasing="nonnegative")
)
define(Operator("exp", exp, "elementwise", 1, lambda x: POSITIVE, lambda x: f"\\exp({x})", 2, increasing="always"))
define(Operator("tanh", tanh, "elementwise", 1, lambda x: x, lambda x: f"\\tanh({x})", increasing="always"))
