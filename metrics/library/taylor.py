"""SNIP, or the first-order Taylor term, with signed and with absolute gradients."""

from evoprune.metrics.criterion import CRITERIA, Metric

CRITERIA.add("snip", Metric.from_text("abs(mul(W,G_mean))", source="Lee et al. 2019, arXiv:1810.02340"))
CRITERIA.add(
    "taylor", Metric.from_text("mul(abs(W),G_l1)", source="Molchanov et al. 2019, arXiv:1906.10771, per sample")
)
