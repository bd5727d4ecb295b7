"""Evaluate an expression on the statistics of one site, each distinct subexpression once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from evoprune.metrics.errors import InvalidCandidate
from evoprune.metrics.expression import CONSTANT, Expression
from evoprune.metrics.operators import BOUND
from evoprune.metrics.records import Site
from evoprune.metrics.terminals import FREE_TERMINALS

_EXPANDED = ("normaliser", "reduce_row", "reduce_column", "reduce_all")


def evaluate(expression: Expression, inputs: Mapping[str, Tensor]) -> Tensor:
    """The value of `expression`, as a score of every weight.

    Args:
        expression: any expression of the language.
        inputs: float32 tensors by terminal name: Mat [out, in], InVec [1, in], OutVec [out, 1], Scal [1, 1]. ``W``
            gives the shape and is always needed. They are only read.

    Returns:
        [out, in] float32, finite whenever the inputs are; possibly an expanded view.

    Raises:
        InvalidCandidate: STAT_MISSING, a terminal is not among `inputs`.
    """
    shape = inputs["W"].shape
    uses: dict[Expression, int] = {}
    order: list[Expression] = []
    _schedule(expression, uses, order)
    values: dict[Expression, Tensor] = {}
    for node in order:
        if node.args:
            arguments = [values[arg] for arg in node.args]
            if node.operator.kind in _EXPANDED:
                # A reduction of a vector is that of the matrix it broadcasts to.
                arguments = [argument.expand(shape) for argument in arguments]
            if node.value is not None:
                values[node] = node.operator.function(*arguments, node.value)
            else:
                values[node] = node.operator.function(*arguments)
            for arg in node.args:
                uses[arg] -= 1
                if uses[arg] == 0:
                    del values[arg]
        elif node.head == CONSTANT:
            values[node] = torch.full((1, 1), node.value or 0.0, dtype=torch.float32, device=inputs["W"].device)
        elif node.head in inputs:
            values[node] = inputs[node.head].clamp(-BOUND, BOUND)
        else:
            raise InvalidCandidate("STAT_MISSING", f"statistic {node.head} was not collected")
    return values[expression].expand(shape)


def _schedule(node: Expression, uses: dict[Expression, int], order: list[Expression]) -> None:
    """Distinct nodes in evaluation order, and how often each is an argument (the root: once more)."""
    if node in uses:
        uses[node] += 1
        return
    uses[node] = 1
    for arg in node.args:
        _schedule(arg, uses, order)
    order.append(node)


def free_inputs(site: Site, weight: Tensor, sparsity: float) -> dict[str, Tensor]:
    """The terminals that need no data: the weight itself and the four scalars.

    Args:
        site: where the matrix stands.
        weight: [out, in], any float dtype; cast to float32.
        sparsity: target fraction to remove.
    """
    scalars = {
        "depth": site.depth,
        "n_in": math.log(site.in_features),
        "n_out": math.log(site.out_features),
        "sparsity": sparsity,
    }
    assert {"W", *scalars} == FREE_TERMINALS
    device = weight.device
    return {
        "W": weight.float(),
        **{name: torch.full((1, 1), value, dtype=torch.float32, device=device) for name, value in scalars.items()},
    }
