"""What is refused at birth, and why."""

from __future__ import annotations

import pytest

from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.expression import parse
from evoprune.metrics.filters import Limits, breaks_priors, reject_reason
from evoprune.metrics.reasons import REASONS
from evoprune.metrics.terminals import TERMINALS

ALL = frozenset(TERMINALS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mul(abs(W),X_l2)", None),
        ("neg(mul(abs(W),X_l2))", None),
        ("mul(X_l2,G_mean)", None),
        ("5", "NO_J"),
        ("mul(Y_l2,rsum(abs(W)))", "NO_J"),
        ("powc(W,0)", "NO_J"),
        ("mms_r(Y_l2)", "NO_J"),
        ("sub(W,W)", "NO_J"),
        ("X_l2", "NO_ELEM"),
        ("mul(X_l2,rsum(abs(W)))", "NO_ELEM"),
        ("mul(X_l2,csum(abs(W)))", "NO_ELEM"),
        ("max(X_l2,Y_l2)", "NO_ELEM"),
        ("add(X_l2,sub(W,W))", "NO_ELEM"),
        ("add(X_l2,mul(0,W))", "NO_ELEM"),
        ("abs(" * 9 + "W" + ")" * 9, "LIMIT"),
        ("add(mul(W,X_l2),add(mul(W,X_l1),add(mul(W,X_max),add(mul(W,X_ss),add(mul(W,X_var),mul(W,G_l2))))))", "LIMIT"),
    ],
)
def test_reasons(text: str, reason: str | None) -> None:
    found = reject_reason(parse(text), allowed_terminals=ALL, limits=Limits(height=8, size=22))
    assert found == reason
    assert found is None or found in REASONS


def test_column_metrics_can_be_allowed() -> None:
    assert reject_reason(parse("X_l2"), allowed_terminals=ALL, allow_column_metrics=True) is None
    assert reject_reason(parse("Y_l2"), allowed_terminals=ALL, allow_column_metrics=True) == "NO_J"


def test_only_allowed_terminals() -> None:
    forward = frozenset({"W", "X_l2"})
    assert reject_reason(parse("mul(W,G_l2)"), allowed_terminals=forward) == "STAT_MISSING"
    assert reject_reason(parse("mul(W,X_ss)"), allowed_terminals=forward) == "STAT_MISSING"
    # What the canonical form does without is not needed.
    assert reject_reason(parse("mul(W,Y_l2)"), allowed_terminals=forward) is None
    assert reject_reason(parse("mul(W,Y_l2)"), allowed_terminals=forward, group="layer") == "STAT_MISSING"


@pytest.mark.parametrize(
    ("text", "breaks"),
    [
        ("exp(tanh(W))", False),
        ("exp(mul(W,exp(X_l2)))", True),
        ("mul(exp(W),exp(X_l2))", False),
        ("mms_t(mul(W,zsn_r(G_l2)))", True),
        ("mul(mms_t(W),zsn_t(G_l2))", False),
        ("log(mms_t(W))", True),
        ("log1p(zsn_r(W))", True),
        ("log(mul(mms_t(W),2))", False),
    ],
)
def test_structure_priors(text: str, breaks: bool) -> None:
    expression = parse(text)
    assert breaks_priors(expression) == breaks
    assert reject_reason(expression, allowed_terminals=ALL) is None
    assert (reject_reason(expression, allowed_terminals=ALL, limits=Limits(priors=True)) == "LIMIT") == breaks


def test_every_published_metric_passes() -> None:
    for name in CRITERIA:
        criterion = CRITERIA[name]
        if isinstance(criterion, Metric):
            assert reject_reason(criterion.expression, allowed_terminals=ALL, limits=Limits(priors=True)) is None
