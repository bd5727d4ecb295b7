"""Published allocators as allocation formulas, and near relatives: what a search of formulas starts from.

Signs are those of the papers. The rule from score to sparsity is that of `evoprune.metrics.formula_rule` for all of
them, so they are like the published allocators and not equal to them: those scale by the extremes, this by the
deviation.
"""

from __future__ import annotations

from dataclasses import dataclass

from evoprune.metrics.allocation_formula import AllocationFormula


@dataclass(frozen=True)
class Published:
    """A formula to start from, and where it is from."""

    formula: AllocationFormula
    source: str


def _published(text: str, spread: float, source: str) -> Published:
    return Published(AllocationFormula.from_text(text, spread), source)


FORMULAS = {
    "owl": _published("outliers_block", 0.15, "Yin et al. 2024, OWL, arXiv:2310.05175"),
    "owl-matrix": _published("outliers", 0.15, "the same, matrix by matrix"),
    "depth": _published("neg(position)", 0.2, "Huang et al. 2025, ATP, arXiv:2502.14770: linear in the depth"),
    "alpha-pruning": _published("neg(tail_block)", 0.2, "Lu et al. 2024, AlphaPruning, arXiv:2410.10912"),
    "block-influence": _published("influence", 0.15, "Men et al. 2024, ShortGPT, arXiv:2403.03853"),
    "shortened-llama": _published("ablation", 0.15, "Kim et al. 2024, Shortened LLaMA, arXiv:2402.02834"),
    "diversity": _published("diversity", 0.2, "Lee et al. 2025, TAMP, arXiv:2504.09897"),
    "dsa": _published("neg(logvar_block)", 0.15, "Li et al. 2024, DSA: variance of log scores"),
    "dsa-bounded": _published("neg(tanh(zsn_t(logvar_block)))", 0.15, "the same family, bounded as by its atan"),
    "error": _published("log(error)", 0.2, "errors at the uniform target, as dynamic programming weighs them"),
    "small": _published("neg(share)", 0.2, "Evci et al. 2020, ERK, arXiv:1911.11134: large matrices lose more"),
    "edges": _published("add(first,last)", 0.2, "EvoPress, arXiv:2410.14649: its first and last blocks stay denser"),
}
"""By name."""
