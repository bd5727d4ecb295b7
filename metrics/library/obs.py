"""Optimal-brain-surgeon scores from the inverse Hessian of the layer's inputs."""

from evoprune.metrics.criterion import CRITERIA, Metric

CRITERIA.add("obs", Metric.from_text("div(sqr(W),Hinv)", source="Hassibi and Stork 1992, diagonal"))
CRITERIA.add(
    "sparsegpt-score",
    Metric.from_text("div(sqr(W),Hchol2)", source="Frantar and Alistarh 2023, arXiv:2301.00774, section 3, static"),
)
