"""What can be known of an expression without evaluating it: what it varies with, and between which bounds it stays."""

from __future__ import annotations

import math
from functools import lru_cache

from evoprune.metrics.expression import CONSTANT, Expression
from evoprune.metrics.operators import BOUND
from evoprune.metrics.types import Type

_CACHE = 1 << 15


@lru_cache(_CACHE)
def varies(expression: Expression) -> tuple[bool, bool]:
    """Whether the value may vary with the row, and with the column.

    Finer than `Expression.type`: a normaliser of a vector has type Mat, yet varies only as the vector does.
    """
    if not expression.args:
        return expression.type.value
    row, column = False, False
    for arg in expression.args:
        arg_row, arg_column = varies(arg)
        row, column = row or arg_row, column or arg_column
    operator = expression.operator
    if operator.kind == "reduce_row":
        return row, False
    if operator.kind == "reduce_column":
        return False, column
    if operator.kind == "reduce_all":
        return False, False
    if operator.kind == "normaliser" and operator.scope == "row" and not column:
        # A constant row is normalised to zero.
        return False, False
    return row, column


@lru_cache(_CACHE)
def per_element(expression: Expression) -> bool:
    """Whether the value of an element depends on that element of some matrix, not only on its row and its column."""
    if not expression.args:
        return expression.type is Type.MAT
    if expression.operator.kind.startswith("reduce"):
        return False
    return any(per_element(arg) for arg in expression.args)


@lru_cache(_CACHE)
def bounds(expression: Expression) -> tuple[float, float]:
    """A closed interval that holds every value, guards and float32 rounding included; often only ±`BOUND`."""
    low = 0.0 if expression.nonnegative else -BOUND
    high = 0.0 if 1 not in expression.sign else BOUND
    if expression.head == CONSTANT:
        assert expression.value is not None
        return expression.value, expression.value
    if not expression.args:
        return low, {"depth": 1.0, "sparsity": 1.0, "n_in": 50.0, "n_out": 50.0}.get(expression.head, high)
    inner = [bounds(arg) for arg in expression.args]
    first_low, first_high = inner[0]
    match expression.head:
        case "tanh":
            return max(low, -1.0), min(high, 1.0)
        case "mms_t" | "mms_r":
            return 0.0, 1.0
        case "neg":
            return -first_high, -first_low
        case "min" | "max":
            pick = min if expression.head == "min" else max
            return pick(bound[0] for bound in inner), pick(bound[1] for bound in inner)
        case "rmax" | "cmax" | "tmax" | "tmin":
            return inner[0]
        case "exp":
            # A little room for the rounding of exp in float32.
            clipped = (min(max(first_low, -69.0), 69.0), min(max(first_high, -69.0), 69.0))
            return math.exp(clipped[0]) * (1 - 1e-6), math.exp(clipped[1]) * (1 + 1e-6)
    return low, high
