"""Magnitude times the standard deviation of the input, as in STADE; its bias compensation is not part of the score."""

from evoprune.metrics.criterion import CRITERIA, Metric

CRITERIA.add("stade", Metric.from_text("mul(abs(W),sqrt(X_var))", source="STADE, arXiv:2503.22451, score only"))
