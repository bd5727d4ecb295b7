"""MoE-Pruner: inputs weighted by the router's gate; equal to Wanda in dense models."""

from evoprune.metrics.criterion import CRITERIA, Metric

CRITERIA.add("moe-pruner", Metric.from_text("mul(abs(W),X_gate_l2)", source="Xie et al. 2024, arXiv:2410.12013"))
