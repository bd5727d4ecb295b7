"""Operators against numpy in float64, and at the edges where their guards act."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from evoprune.metrics.operators import BOUND, OPERATORS, TINY

Formula = Callable[..., "np.ndarray"]

ELEMENTWISE: dict[str, Formula] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "min": np.minimum,
    "max": np.maximum,
    "neg": lambda x: -x,
    "abs": np.abs,
    "sqr": np.square,
    "sqrt": lambda x: np.sqrt(np.abs(x)),
    "log": lambda x: np.log(np.abs(x)),
    "log1p": lambda x: np.log1p(np.abs(x)),
    "exp": np.exp,
    "tanh": np.tanh,
}
MATRIX: dict[str, Formula] = {
    "mms_t": lambda x: (x - x.min()) / (x.max() - x.min()),
    "mms_r": lambda x: (x - x.min(1, keepdims=True)) / (x.max(1, keepdims=True) - x.min(1, keepdims=True)),
    "zsn_t": lambda x: (x - x.mean()) / x.std(),
    "zsn_r": lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True),
    "rsum": lambda x: x.sum(1, keepdims=True),
    "rmean": lambda x: x.mean(1, keepdims=True),
    "rmax": lambda x: x.max(1, keepdims=True),
    "rl2": lambda x: np.sqrt((x**2).sum(1, keepdims=True)),
    "csum": lambda x: x.sum(0, keepdims=True),
    "cmean": lambda x: x.mean(0, keepdims=True),
    "cmax": lambda x: x.max(0, keepdims=True),
    "cl2": lambda x: np.sqrt((x**2).sum(0, keepdims=True)),
    "tmean": lambda x: x.mean(keepdims=True),
    "tstd": lambda x: x.std(keepdims=True),
    "tmin": lambda x: x.min(keepdims=True),
    "tmax": lambda x: x.max(keepdims=True),
    "tl2": lambda x: np.sqrt((x**2).sum(keepdims=True)),
}


def _apply(name: str, *args: Tensor) -> Tensor:
    return OPERATORS[name].function(*args)


def _matrix(seed: int) -> Tensor:
    return torch.randn(7, 11, generator=torch.Generator().manual_seed(seed))


def test_the_tables_above_are_complete() -> None:
    assert {*ELEMENTWISE, *MATRIX, "powc"} == set(OPERATORS)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *MATRIX])
def test_values(name: str) -> None:
    args = [_matrix(seed) for seed in range(OPERATORS[name].arity)]
    formula = ELEMENTWISE.get(name) or MATRIX[name]
    expected = formula(*(arg.double().numpy() for arg in args))
    result = _apply(name, *args)
    assert result.dtype is torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("exponent", [0.25, 1 / 3, 1.0, 2.5, -0.5, -1.0, -3.0])
def test_powers(exponent: float) -> None:
    x = _matrix(0)
    expected = np.abs(x.double().numpy()) ** exponent
    np.testing.assert_allclose(OPERATORS["powc"].function(x, exponent).numpy(), expected, rtol=1e-5)


def test_guards() -> None:
    zero, one, huge = torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1), BOUND)
    power = OPERATORS["powc"].function
    bound = torch.tensor(BOUND).item()
    assert _apply("div", one, zero).item() == pytest.approx(1e12)
    assert _apply("div", one, -1e-20 * one).item() == pytest.approx(-1e12)
    assert _apply("div", huge, zero).item() == bound
    assert _apply("mul", huge, -huge).item() == -bound
    assert _apply("sqr", huge).item() == bound
    assert _apply("add", huge, huge).item() == bound
    assert _apply("log", zero).item() == pytest.approx(np.log(TINY))
    assert _apply("log1p", zero).item() == 0
    assert _apply("exp", 100 * one).item() == pytest.approx(np.exp(69.0), rel=1e-5)
    assert power(zero, 0.5).item() == 0 and power(zero, 0.0).item() == 1
    assert power(zero, -1.0).item() == bound and power(zero, -3.0).item() == bound


@pytest.mark.parametrize("name", ["mms_t", "mms_r", "zsn_t", "zsn_r"])
def test_constants_normalise_to_zero(name: str) -> None:
    x = _matrix(0)
    x[2] = 0.1
    assert torch.equal(_apply(name, torch.full((3, 4), 0.1)), torch.zeros(3, 4))
    result = _apply(name, x)
    assert torch.isfinite(result).all()
    if OPERATORS[name].scope == "row":
        assert torch.equal(result[2], torch.zeros(11))


@pytest.mark.parametrize("name", list(OPERATORS))
def test_what_an_operator_says_of_itself(name: str) -> None:
    operator = OPERATORS[name]
    args = [_matrix(seed) for seed in range(operator.arity)]
    exponents = [0.7] if operator.kind == "power" else []
    if operator.commutative:
        assert torch.equal(_apply(name, *args), _apply(name, *reversed(args)))
    if operator.increasing != "never":
        row = torch.linspace(-3 if operator.increasing == "always" else 0, 3, 50).view(1, -1)
        assert (operator.function(row, *exponents).diff() > 0).all()
    latex = operator.latex(*["x"] * operator.arity, *["0.7"] * len(exponents))
    assert "x" in latex and latex.count("{") == latex.count("}")
    if operator.scope == "element":
        part = [arg[:3, :4] for arg in args]
        # Not bit for bit: what torch vectorises depends on where an element stands.
        torch.testing.assert_close(operator.function(*part, *exponents), operator.function(*args, *exponents)[:3, :4])
    before = [arg.clone() for arg in args]
    operator.function(*args, *exponents)
    wide = [arg.double() for arg in args]
    operator.function(*wide, *exponents)
    assert all(torch.equal(arg, kept) for arg, kept in zip(args, before, strict=True))
    assert all(torch.equal(arg.float(), kept) for arg, kept in zip(wide, before, strict=True))
