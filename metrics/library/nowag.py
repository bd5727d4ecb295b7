"""NoWag-P: columns normalised, then rows, times the squared input norm."""

from evoprune.metrics.criterion import CRITERIA, Metric

_COLUMNS = "div(W,cl2(W))"

CRITERIA.add(
    "nowag",
    Metric.from_text(f"mul(sqr(div({_COLUMNS},rl2({_COLUMNS}))),X_ss)", source="Liu et al. 2025, NoWag; released code"),
)
