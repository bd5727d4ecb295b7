"""Birth filters: what is refused before a metric is ranked or evaluated.

Source: symbolic pruning metrics, sections 2.2, 3.5, 3.6 and proposal P11.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from evoprune.metrics.analysis import per_element, varies
from evoprune.metrics.canonical import canonicalise
from evoprune.metrics.expression import Expression
from evoprune.metrics.records import Group


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a metric may be, and which shapes it may not have.

    Attributes:
        height: edges from the root to the deepest leaf.
        size: nodes, exponents included.
        priors: also refuse structures that rarely help: an exp inside an exp, a normaliser inside a normaliser, the
            log of a normaliser.
    """

    height: int = 8
    size: int = 25
    priors: bool = False


DEFAULT_LIMITS = Limits()


def reject_reason(
    expression: Expression,
    *,
    allowed_terminals: Set[str],
    group: Group = "row",
    limits: Limits = DEFAULT_LIMITS,
    allow_column_metrics: bool = False,
) -> str | None:
    """Why a newborn metric is refused, as a code of `evoprune.metrics.reasons`, or None.

    Args:
        expression: as it was born; its canonical form must pass too.
        allowed_terminals: free ones included.
        group: what its scores will be compared within.
        limits: LIMIT if exceeded, or if a prior forbids the structure.
        allow_column_metrics: keep metrics that read no single weight or gradient and so remove the same columns of
            every row, which is NO_ELEM otherwise.

    STAT_MISSING means a terminal that is not allowed; NO_J a score that does not vary along a row.
    """
    if expression.height > limits.height or expression.size > limits.size:
        return "LIMIT"
    if limits.priors and breaks_priors(expression):
        return "LIMIT"
    canonical = canonicalise(expression, group)
    if not canonical.terminals <= allowed_terminals:
        return "STAT_MISSING"
    if not varies(canonical)[1]:
        return "NO_J"
    if not allow_column_metrics and not per_element(canonical):
        return "NO_ELEM"
    return None


def breaks_priors(expression: Expression, *, in_exp: bool = False, in_normaliser: bool = False) -> bool:
    """Whether an exp stands inside an exp, a normaliser inside a normaliser, or a normaliser directly below a log."""
    if not expression.args:
        return False
    head, normaliser = expression.head, expression.operator.kind == "normaliser"
    if (head == "exp" and in_exp) or (normaliser and in_normaliser):
        return True
    if head in ("log", "log1p") and expression.args[0].args and expression.args[0].operator.kind == "normaliser":
        return True
    in_exp, in_normaliser = in_exp or head == "exp", in_normaliser or normaliser
    return any(breaks_priors(arg, in_exp=in_exp, in_normaliser=in_normaliser) for arg in expression.args)
