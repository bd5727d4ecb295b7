"""Opposing operation simplification, as in Pruner-Zero: remove adjacent operators that are each other's opposite.

This changes what an expression means: with this language's guards sqrt(sqr(x)) is abs(x), and log(exp(x)) saturates.
It is kept to compare with the published search; `evoprune.metrics.canonical` is what dedup relies on. The published
rule list names pairs such as exp and log, sqrt and sqr, add and sub. Source: Dong et al. 2024, arXiv:2406.02924,
algorithm 1.
"""

from __future__ import annotations

from evoprune.metrics.expression import Expression

_OPPOSITE = {"exp": "log", "log": "exp", "sqr": "sqrt", "sqrt": "sqr", "neg": "neg"}
_UNDOES = {"sub": "add", "div": "mul", "add": "sub", "mul": "div"}


def oppose(expression: Expression) -> Expression:
    """The expression without adjacent opposites, innermost first: ``sqrt(sqr(x))`` and ``div(mul(x,y),y)`` become x.

    Does not keep the meaning; see above.
    """
    if not expression.args:
        return expression
    args = tuple(oppose(arg) for arg in expression.args)
    inner = args[0]
    if _OPPOSITE.get(expression.head) == inner.head:
        return inner.args[0]
    if _UNDOES.get(expression.head) == inner.head and args[1] == inner.args[1]:
        return inner.args[0]
    return Expression(expression.head, args, expression.value)
