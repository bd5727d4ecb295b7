"""Reading, printing and typing of expressions, and what the readers refuse."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from evoprune.metrics.errors import InvalidExpression, InvalidInput, UnknownName
from evoprune.metrics.expression import (
    MAX_HEIGHT,
    MAX_NODES,
    MAX_TEXT,
    Expression,
    call,
    constant,
    from_json,
    parse,
    terminal,
)
from evoprune.metrics.interpreter import evaluate
from evoprune.metrics.types import Type

HOSTILE_TEXT = [
    "",
    "   ",
    "#",
    "W;W",
    "W\nW",
    "mul(W,W)\x00",
    "W\ud800",
    "W.__class__",
    "__import__('os')",
    "abs(__class__)",
    "().__class__.__bases__[0]",
    "lambda: W",
    "(lambda: W)()",
    "(x := W)",
    "abs(x:=W)",
    "abs(*W)",
    "abs(**W)",
    "abs(x=W)",
    "abs(W)(W)",
    "W[0]",
    "[W]",
    "{W}",
    "(W,W)",
    "W if W else W",
    "W and W",
    "not W",
    "W + W",
    "-W",
    "+1",
    "--1",
    "9**9**9",
    "mul(W,9**9**9)",
    "powc(W,9**9**9)",
    "powc(W,1/0)",
    "powc(W,X_l2)",
    "powc(W,1/2/3)",
    "powc(W)",
    "1j",
    "True",
    "None",
    "...",
    "'W'",
    "f'{W}'",
    "await W",
    "yield W",
    "nan",
    "inf",
    "1e400",
    "-1e400",
    "1000001",
    "9" * 999,
    "const(1)",
    "foo(W)",
    "W(W)",
    "abs",
    "abs()",
    "abs(W,W)",
    "mul(W)",
    "mul(W,W,W)",
    "x" * 100_000,
    "-" * 900 + "1",
    "(" * 400 + "W" + ")" * 400,
    "abs(" * 150 + "W" + ")" * 150,
    "abs(" * (MAX_HEIGHT + 1) + "W" + ")" * (MAX_HEIGHT + 1),
]


def _nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = "W"
    for _ in range(depth):
        value = wrap(value)
    return value


HOSTILE_JSON: dict[str, Any] = {
    "none": None,
    "true": True,
    "bytes": b"W",
    "tuple": ("abs", "W"),
    "empty list": [],
    "empty name": "",
    "dunder": "__class__",
    "unknown operator": ["eval", "W"],
    "operator as leaf": "abs",
    "list as operator": [["abs"], "W"],
    "no arguments": ["abs"],
    "one too many": ["abs", "W", "W"],
    "far too many": ["mul", "W", "W", "W", "W", "W"],
    "nan": float("nan"),
    "infinite": ["mul", "W", float("inf")],
    "large constant": 1_000_001,
    "huge integer": 10**5000,
    "huge exponent": ["powc", "W", {"e": 10**5000}],
    "plain exponent": ["powc", "W", 0.5],
    "no exponent": ["powc", "W"],
    "two exponents": ["powc", {"e": 1}, {"e": 2}],
    "true exponent": ["powc", "W", {"e": True}],
    "text exponent": ["powc", "W", {"e": "__import__('os')"}],
    "list exponent": ["powc", "W", {"e": _nested(100_000, lambda inner: [inner])}],
    "other key": ["powc", "W", {"x": 1}],
    "exponent of mul": ["mul", "W", {"e": 2}],
    "dictionary": {"e": 1},
    "deep lists": _nested(100_000, lambda inner: [inner]),
    "deep calls": _nested(100_000, lambda inner: ["abs", inner]),
    "too high": _nested(MAX_HEIGHT + 1, lambda inner: ["abs", inner]),
    "too many nodes": _nested(8, lambda inner: ["mul", inner, inner]),
}


@pytest.mark.parametrize("text", HOSTILE_TEXT, ids=lambda text: ascii(text)[:30])
def test_hostile_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse(text)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        from_json(HOSTILE_JSON[name])


def test_messages_name_the_mistake() -> None:
    with pytest.raises(UnknownName, match="did you mean 'X_var'"):
        parse("mul(abs(W),X_vr)")
    with pytest.raises(InvalidExpression, match="mul takes 2 arguments, 1 given"):
        parse("mul(W)")
    with pytest.raises(InvalidExpression, match=f"at most {MAX_TEXT}"):
        parse("W" * (MAX_TEXT + 1))


def test_random_trees_survive_text_and_json(tree: Callable[..., Expression]) -> None:
    for index in range(500):
        expression = tree(random.Random(f"round trip {index}"), height=4)
        if len(expression.text) <= MAX_TEXT:
            assert parse(expression.text) == expression
        assert from_json(json.loads(json.dumps(expression.to_json()))) == expression


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        (" mul( abs(W) , X_l2 ) ", "mul(abs(W),X_l2)"),
        ("powc(X_l2,1/2)", "powc(X_l2,0.5)"),
        ("powc(X_l2,-2/4)", "powc(X_l2,-0.5)"),
        ("mul(100.0,W)", "mul(100,W)"),
        ("mul(-0.0,W)", "mul(0,W)"),
        ("mul(1e-3,W)", "mul(0.001,W)"),
    ],
)
def test_text_is_printed_in_one_way(text: str, printed: str) -> None:
    assert parse(text).text == printed


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mul(abs(W),X_l2)", Type.MAT),
        ("sqrt(X_ss)", Type.INVEC),
        ("powc(Y_l2,2)", Type.OUTVEC),
        ("add(X_l2,Y_l2)", Type.MAT),
        ("add(X_l2,n_in)", Type.INVEC),
        ("mul(depth,3)", Type.SCAL),
        ("rsum(X_l2)", Type.OUTVEC),
        ("csum(W)", Type.INVEC),
        ("tmean(X_l2)", Type.SCAL),
        ("mms_t(X_l2)", Type.MAT),
    ],
)
def test_types_are_the_least_that_fit(text: str, kind: Type) -> None:
    assert parse(text).type is kind


def test_subtypes() -> None:
    assert [kind for kind in Type if kind.fits(Type.MAT)] == list(Type)
    assert Type.SCAL.fits(Type.INVEC) and Type.SCAL.fits(Type.OUTVEC)
    assert not Type.INVEC.fits(Type.OUTVEC) and not Type.MAT.fits(Type.INVEC)
    assert Type.INVEC.join(Type.OUTVEC) is Type.MAT


def test_signs_hold_for_values(tree: Callable[..., Expression], inputs: Callable[..., dict[str, Tensor]]) -> None:
    given = inputs(5, 4, 6)
    for index in range(300):
        for node in tree(random.Random(f"sign {index}"), height=3).walk():
            signs = set(evaluate(node, given).sign().int().flatten().tolist())
            # A positive number may underflow to zero.
            assert signs <= node.sign | {0}, node.text


def test_measures() -> None:
    expression = parse("add(mul(abs(W),X_l2),mul(100,powc(G_l2,0.5)))")
    assert (expression.height, expression.size) == (3, 10)
    assert expression.terminals == {"W", "X_l2", "G_l2"} and expression.statistics == {"X_l2", "G_l2"}
    assert expression.costs == {"forward", "backward"}
    # Nine nodes of which powc weighs 2, one forward and one backward pass.
    assert expression.complexity == 10 + 1 + 3


def test_limits_are_inclusive() -> None:
    expression = terminal("W")
    for _ in range(MAX_HEIGHT):
        expression = call("abs", expression)
    assert parse(expression.text) == expression
    wide = _nested(6, lambda inner: ["mul", inner, inner])
    assert from_json(wide).size < MAX_NODES


def test_constants() -> None:
    assert constant(0.0) == constant(-0.0)
    with pytest.raises(InvalidExpression):
        constant(float("nan"))
    with pytest.raises(InvalidExpression):
        call("powc", terminal("W"))
