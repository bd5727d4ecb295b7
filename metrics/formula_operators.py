"""The operators of allocation formulas: what those of the same name do to tensors, done to lists of Python floats.

A formula maps a few hundred numbers to a few hundred numbers, in double precision and without torch, and its export
carries these functions word for word: they use nothing but `math`, each other and the two constants. They are total,
as their tensor forms are: finite arguments within ±`BOUND` give finite results within ±`BOUND`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

BOUND = 1e30
TINY = 1e-30

Vector = list[float]


def bounded(value: float) -> float:
    return min(max(value, -BOUND), BOUND)


def add(x: Vector, y: Vector) -> Vector:
    return [bounded(a + b) for a, b in zip(x, y, strict=True)]


def sub(x: Vector, y: Vector) -> Vector:
    return [bounded(a - b) for a, b in zip(x, y, strict=True)]


def mul(x: Vector, y: Vector) -> Vector:
    return [bounded(a * b) for a, b in zip(x, y, strict=True)]


def div(x: Vector, y: Vector) -> Vector:
    return [bounded(a / (min(b, -1e-12) if b < 0 else max(b, 1e-12))) for a, b in zip(x, y, strict=True)]


def minimum(x: Vector, y: Vector) -> Vector:
    return [min(a, b) for a, b in zip(x, y, strict=True)]


def maximum(x: Vector, y: Vector) -> Vector:
    return [max(a, b) for a, b in zip(x, y, strict=True)]


def neg(x: Vector) -> Vector:
    return [-a for a in x]


def absolute(x: Vector) -> Vector:
    return [abs(a) for a in x]


def sqr(x: Vector) -> Vector:
    return [bounded(a * a) for a in x]


def sqrt(x: Vector) -> Vector:
    return [math.sqrt(abs(a)) for a in x]


def powc(x: Vector, exponent: float) -> Vector:
    # Through the logarithm, for a power itself overflows with an error.
    return [
        0.0 if a == 0 and exponent > 0 else math.exp(min(exponent * math.log(max(abs(a), TINY)), math.log(BOUND)))
        for a in x
    ]


def log(x: Vector) -> Vector:
    return [math.log(max(abs(a), TINY)) for a in x]


def log1p(x: Vector) -> Vector:
    return [math.log1p(abs(a)) for a in x]


def exp(x: Vector) -> Vector:
    return [math.exp(min(max(a, -69.0), 69.0)) for a in x]


def tanh(x: Vector) -> Vector:
    return [math.tanh(a) for a in x]


def mms_t(x: Vector) -> Vector:
    low, high = min(x), max(x)
    return [(a - low) / (high - low) if high > low else 0.0 for a in x]


def zsn_t(x: Vector) -> Vector:
    mean = math.fsum(x) / len(x)
    deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in x) / len(x))
    # A constant has no spread beyond the rounding of its mean.
    return [bounded((a - mean) / deviation) if max(x) > min(x) and deviation > 0 else 0.0 for a in x]


def tmean(x: Vector) -> Vector:
    return [math.fsum(x) / len(x)] * len(x)


def tstd(x: Vector) -> Vector:
    mean = math.fsum(x) / len(x)
    return [math.sqrt(math.fsum((a - mean) ** 2 for a in x) / len(x))] * len(x)


def tmin(x: Vector) -> Vector:
    return [min(x)] * len(x)


def tmax(x: Vector) -> Vector:
    return [max(x)] * len(x)


FUNCTIONS: Mapping[str, Callable[..., Vector]] = {
    "add": add,
    "sub": sub,
    "mul": mul,
    "div": div,
    "min": minimum,
    "max": maximum,
    "neg": neg,
    "abs": absolute,
    "sqr": sqr,
    "sqrt": sqrt,
    "powc": powc,
    "log": log,
    "log1p": log1p,
    "exp": exp,
    "tanh": tanh,
    "mms_t": mms_t,
    "zsn_t": zsn_t,
    "tmean": tmean,
    "tstd": tstd,
    "tmin": tmin,
    "tmax": tmax,
}
"""By name in the language: the operators that act on all matrices alike, or over all of them."""
