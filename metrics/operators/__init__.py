"""Operators of the language. One file each, or one file for a few of a kind; the registry finds them.

Every operator is total: with finite arguments within ±`BOUND` it returns finite values within ±`BOUND`. Elementwise
work is float32, sums and means are float64 and rounded back, so that results do not depend on how torch splits a sum.
Where no bound binds, the result equals plain torch float32 bit for bit. Source: symbolic pruning metrics, section 2.3.

An operator's function is also what an exported metric carries, word for word, so it may use nothing but torch, its own
arguments and the two constants below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from evoprune.metrics.registry import Registry
from evoprune.metrics.types import Sign

BOUND = 1e30
TINY = 1e-30

Kind = Literal["elementwise", "power", "normaliser", "reduce_row", "reduce_column", "reduce_all"]


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator.

    Attributes:
        name: how it is written.
        function: tensors of broadcastable shapes to a tensor; a ``power`` takes its exponent, a float, as second
            argument.
        kind: ``elementwise`` and ``power`` keep the join of the argument types; a ``normaliser`` maps Mat to Mat;
            ``reduce_row`` gives one value a row (OutVec), ``reduce_column`` one a column (InVec), ``reduce_all`` one.
        arity: number of tensor arguments.
        sign: signs of the result, from the signs of the arguments.
        latex: the formula, from those of the arguments (and the exponent's text, for a power).
        weight: what it adds to the complexity of an expression.
        commutative: whether arguments may be sorted.
        increasing: where it is strictly increasing in its only argument, in real arithmetic: everywhere, on values
            >= 0, or not (also for binary operators).
        scope: what one result depends on beside its own element: nothing, its row, or the whole matrix.
    """

    name: str
    function: Callable[..., Tensor]
    kind: Kind
    arity: int
    sign: Callable[..., Sign]
    latex: Callable[..., str]
    weight: int = 1
    commutative: bool = False
    increasing: Literal["always", "nonnegative", "never"] = "never"
    scope: Literal["element", "row", "matrix"] = "element"


OPERATORS: Registry[Operator] = Registry("operator", "evoprune.metrics.operators")


def define(operator: Operator) -> None:
    """Register `operator` under its own name."""
    OPERATORS.add(operator.name, operator)
