"""A second opinion on a metric by sympy, for display only: what a computer algebra system makes of the formula.

Nodes are built one by one; no text is ever given to sympy. The guards of the language (no division by less than
1e-12, bounds at 1e30) are left out, so the result is the formula that a paper would print and not a definition to
compute with.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from evoprune.metrics.expression import CONSTANT, Expression
from evoprune.metrics.terminals import TERMINALS


def to_sympy(expression: Expression) -> Any:
    """The sympy expression: signed terminals are real, all others positive; normalisers and reductions stay opaque."""
    import sympy

    if expression.head == CONSTANT:
        return _rational(expression.value)
    if not expression.args:
        signed = -1 in TERMINALS[expression.head].sign
        return sympy.Symbol(expression.head, **({"real": True} if signed else {"positive": True}))
    args = [to_sympy(arg) for arg in expression.args]
    if expression.value is not None:
        return sympy.Pow(sympy.Abs(args[0]), _rational(expression.value))
    known: dict[str, Callable[..., Any]] = {
        "add": sympy.Add,
        "sub": lambda x, y: sympy.Add(x, sympy.Mul(-1, y)),
        "mul": sympy.Mul,
        "div": lambda x, y: sympy.Mul(x, sympy.Pow(y, -1)),
        "min": sympy.Min,
        "max": sympy.Max,
        "neg": lambda x: sympy.Mul(-1, x),
        "abs": sympy.Abs,
        "sqr": lambda x: sympy.Pow(x, 2),
        "sqrt": lambda x: sympy.sqrt(sympy.Abs(x)),
        "log": lambda x: sympy.log(sympy.Abs(x)),
        "log1p": lambda x: sympy.log(sympy.Add(1, sympy.Abs(x))),
        "exp": sympy.exp,
        "tanh": sympy.tanh,
    }
    if expression.head in known:
        return known[expression.head](*args)
    # Whether the value can be negative is all that sympy may assume of it.
    sign = {"nonnegative": True} if expression.nonnegative else {"real": True}
    return sympy.Function(expression.head, **sign)(*args)


def simplified(expression: Expression, timeout: float = 5.0) -> Any:
    """The shortest form that sympy's powsimp, expand_log and simplify find within `timeout` seconds."""
    import sympy

    plain = to_sympy(expression)
    forms = [plain]

    def work() -> None:
        forms.append(sympy.powsimp(plain, force=True))
        forms.append(sympy.powsimp(sympy.expand_log(plain, force=True), force=True))
        forms.append(sympy.simplify(plain))

    _within(timeout, work)
    return min(forms, key=lambda form: (sympy.count_ops(form), str(form)))


def sympy_latex(expression: Expression, timeout: float = 5.0) -> str:
    """LaTeX of `simplified`, with the terminals' own symbols."""
    import sympy

    form = simplified(expression, timeout)
    names = {symbol: TERMINALS[symbol.name].latex for symbol in form.free_symbols}
    return str(sympy.latex(form, symbol_names=names))


def _rational(value: float | None) -> Any:
    """An exact small fraction where the number is one, so that exponents can cancel."""
    import sympy

    assert value is not None
    near = Fraction(value).limit_denominator(16)
    if abs(float(near) - value) <= 1e-12 * abs(value):
        return sympy.Rational(near.numerator, near.denominator)
    return sympy.Float(value)


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Run `work` and give up after `seconds`.

    sympy has no time limit of its own, a signal works in the main thread only, and a process would take longer to
    start than most formulas to simplify; so `work` runs in a thread that is told to exit.
    """

    def guarded() -> None:
        # What sympy cannot do leaves the forms found so far.
        with contextlib.suppress(SystemExit, Exception):
            work()

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive() and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        thread.join(1.0)
