"""The metric that Pruner-Zero's search found."""

from evoprune.metrics.criterion import CRITERIA, Metric

CRITERIA.add(
    "pruner-zero",
    Metric.from_text("mul(sqr(W),mms_t(G_l2))", source="Dong et al. 2024, arXiv:2406.02924, released best tree"),
)
