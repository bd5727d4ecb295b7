"""Random trees and random inputs for the tests of the language; a generator of its own, independent of the search's."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from evoprune.metrics.expression import Expression, call, constant, terminal
from evoprune.metrics.operators import OPERATORS
from evoprune.metrics.terminals import TERMINALS
from evoprune.metrics.types import Type

FREQUENT = ["mul", "mul", "add", "div", "powc", "abs", "sqrt"]
EXPONENTS = (0.25, 1 / 3, 0.5, 2 / 3, 1.0, 1.5, 2.0, 3.0)


def random_tree(draw: random.Random, slot: Type = Type.MAT, height: int = 4) -> Expression:
    """A random expression that fits `slot`, of at most the given height; every operator and terminal can occur."""
    if height == 0 or draw.random() < 0.15:
        if draw.random() < 0.1:
            return constant(round(draw.choice((-1, 1)) * 10 ** draw.uniform(-2, 2), 3))
        if slot is Type.MAT and draw.random() < 0.5:
            return terminal("W")
        return terminal(draw.choice(_leaves(slot)))
    head = draw.choice(_heads(slot) if draw.random() < 0.5 else FREQUENT)
    operator = OPERATORS[head]
    inner = slot if operator.kind in ("elementwise", "power") else Type.MAT
    args = [random_tree(draw, inner, height - 1) for _ in range(operator.arity)]
    exponent = None
    if operator.kind == "power":
        exponent = draw.choice((-1, 1, 1, 1)) * draw.choice((*EXPONENTS, round(draw.uniform(0.1, 3), 3)))
    return call(head, *args, exponent=exponent)


@cache
def _leaves(slot: Type) -> list[str]:
    return sorted(name for name, leaf in TERMINALS.items() if leaf.type.fits(slot))


@cache
def _heads(slot: Type) -> list[str]:
    results = {"reduce_row": Type.OUTVEC, "reduce_column": Type.INVEC, "reduce_all": Type.SCAL, "normaliser": Type.MAT}
    # Elementwise operators give what they are given.
    return [head for head in OPERATORS if results.get(OPERATORS[head].kind, slot).fits(slot)]


def random_inputs(seed: int, out_features: int = 16, in_features: int = 48) -> dict[str, Tensor]:
    """Every terminal for one matrix, of the sizes that real layers have; float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    spread = (normal(1, in_features)).exp()
    inputs = {
        "W": 0.05 * normal(*shape) * (0.5 * normal(1, in_features)).exp(),
        "X_l2": 30 * spread,
        "X_l1": 0.4 * spread * (0.2 * normal(1, in_features)).exp(),
        "X_mean": 0.1 * spread * normal(1, in_features),
        "X_var": (0.5 * spread * (0.1 * normal(1, in_features)).exp()).square(),
        "X_max": 5 * spread * (0.3 * normal(1, in_features)).exp(),
        "X_v": 9 * spread * (0.3 * normal(1, in_features)).exp(),
        "X_l": 7 * spread * (0.3 * normal(1, in_features)).exp(),
        "X_gate_l2": 11 * spread * (0.3 * normal(1, in_features)).exp(),
        "Y_l2": 20 * normal(out_features, 1).exp(),
        "G_l2": 1e-3 * (2 * normal(*shape)).exp(),
        "G_l1": 4e-3 * (2 * normal(*shape)).exp(),
        "G_mean": 1e-4 * normal(*shape),
        "G_reg": 1e-2 * normal(*shape).exp(),
        "Hinv": 1e-2 / spread.square() * (0.3 * normal(1, in_features)).exp(),
        "Hchol2": 1e-2 / spread.square() * (0.4 * normal(1, in_features)).exp(),
        "depth": torch.rand(1, 1, generator=generator),
        "n_in": torch.full((1, 1), float(in_features)).log(),
        "n_out": torch.full((1, 1), float(out_features)).log(),
        "sparsity": torch.full((1, 1), 0.5),
    }
    inputs["X_ss"], inputs["Y_ss"] = inputs["X_l2"].square(), inputs["Y_l2"].square()
    return inputs


@pytest.fixture
def tree() -> Callable[..., Expression]:
    """`random_tree`."""
    return random_tree


@pytest.fixture
def inputs() -> Callable[..., dict[str, Tensor]]:
    """`random_inputs`."""
    return random_inputs
