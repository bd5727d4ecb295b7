"""Wanda++: Wanda plus the gradient of each block's own output norm."""

from evoprune.metrics.criterion import CRITERIA, Metric

CRITERIA.add(
    "wanda++",
    Metric.from_text(
        "add(mul(abs(W),X_l2),mul(100,mul(abs(W),G_reg)))",
        source="Yang et al. 2025, arXiv:2503.04992, regional gradient score",
    ),
)
