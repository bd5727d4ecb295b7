"""sympy's view of a metric."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from evoprune.metrics import display
from evoprune.metrics.expression import Expression, parse

sympy = pytest.importorskip("sympy")


def test_real_and_positive_symbols() -> None:
    assert display.to_sympy(parse("sqrt(sqr(W))")) == sympy.Abs(sympy.Symbol("W", real=True))
    assert display.to_sympy(parse("sqrt(sqr(X_l2))")) == sympy.Symbol("X_l2", positive=True)
    assert display.to_sympy(parse("powc(powc(W,1/3),3)")) == sympy.Abs(sympy.Symbol("W", real=True))


@pytest.mark.parametrize(
    ("text", "shorter"),
    [
        ("sqrt(mul(sqr(W),X_ss))", "sqrt(X_ss)*Abs(W)"),
        ("mul(sqr(W),mms_t(G_l2))", "W**2*mms_t(G_l2)"),
        ("sub(mul(W,X_l2),mul(X_l2,W))", "0"),
    ],
)
def test_simplified(text: str, shorter: str) -> None:
    assert str(display.simplified(parse(text))) == shorter


def test_latex_uses_the_terminals_own_symbols() -> None:
    assert display.sympy_latex(parse("mul(abs(W),X_l2)")) == r"\lVert X\rVert_2 \left|{W}\right|"


def test_values_agree(tree: Callable[..., Expression]) -> None:
    """Without vectors and guards, sympy computes what the language computes."""
    values = {"W": -0.3, "X_l2": 2.0, "G_l2": 0.1}
    for text, expected in {
        "div(sub(W,X_l2),add(G_l2,3))": (-0.3 - 2) / 3.1,
        "max(min(W,G_l2),neg(log1p(W)))": max(-0.3, -0.26236426446749106),
        "mul(exp(W),tanh(log(W)))": 0.740818220681718 * -0.834862385321101,
    }.items():
        form = display.to_sympy(parse(text))
        numbers = {symbol: values[symbol.name] for symbol in form.free_symbols}
        assert float(form.subs(numbers)) == pytest.approx(expected)
    for index in range(50):
        display.to_sympy(tree(random.Random(f"display {index}"), height=3))


def test_simplification_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: object) -> None:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(sympy, "simplify", never)
    before = threading.active_count()
    started = time.monotonic()
    assert str(display.simplified(parse("mul(W,X_l2)"), timeout=0.3)) == "W*X_l2"
    assert time.monotonic() - started < 3
    assert threading.active_count() == before
