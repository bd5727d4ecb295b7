"""SymWanda: input and output norms together."""

from evoprune.metrics.criterion import CRITERIA, Metric

CRITERIA.add(
    "symwanda", Metric.from_text("mul(abs(W),sqrt(add(X_ss,Y_ss)))", source="arXiv:2501.18980, symmetric score")
)
