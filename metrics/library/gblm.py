"""GBLM-Pruner: gradients beside activations; `gblm-gradient` ranks like OBD and the empirical Fisher diagonal."""

from evoprune.metrics.criterion import CRITERIA, Metric

_SOURCE = "Das et al. 2023, arXiv:2311.04902; released code of GBLM-Pruner"

CRITERIA.add("gblm", Metric.from_text("add(mul(abs(W),X_l2),mul(100,mul(abs(W),G_l2)))", source=_SOURCE))
CRITERIA.add("gblm-gradient", Metric.from_text("mul(abs(W),G_l2)", source=_SOURCE))
CRITERIA.add("gblm-inverse", Metric.from_text("div(mul(abs(W),X_l2),add(mul(100,G_l2),0.00000001))", source=_SOURCE))
