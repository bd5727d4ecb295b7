"""Relative importance, alone and times the activation (RIA)."""

from evoprune.metrics.criterion import CRITERIA, Metric

_RELATIVE = "add(div(abs(W),csum(abs(W))),div(abs(W),rsum(abs(W))))"
_SOURCE = "Zhang et al. 2024, Plug-and-Play: relative importance and activations; released code"

CRITERIA.add("ri", Metric.from_text(_RELATIVE, "layer", _SOURCE))
CRITERIA.add("ria", Metric.from_text(f"mul({_RELATIVE},powc(X_l2,1/2))", "layer", _SOURCE))
