"""Wanda: weight magnitude times input norm."""

from evoprune.metrics.criterion import CRITERIA, Metric

CRITERIA.add("wanda", Metric.from_text("mul(abs(W),X_l2)", source="Sun et al. 2024, arXiv:2306.11695, section 3"))
