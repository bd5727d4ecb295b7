"""FLAP: what varies matters, for what is always the same a bias can stand in."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.unit_criteria import UNIT_CRITERIA, Spread, UnitEvidence, UnitScores, statistic, weight
from evoprune.fitness.units import BlockUnits
from evoprune.metrics.shape import BlockShape


class Flap:
    """Variance of each input times the squared norm of its column, standardised in each matrix.

    As published, scores of an output matrix are squared before that, and a head has the mean of its columns; a KV
    group has the mean of its heads. The released code updates its running mean in place before the variance reads it,
    and assumes heads of 128 and 32 blocks; here the variance is the unbiased one, and sizes are the model's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"X_var", "X_mean"})
    spread: ClassVar[Spread] = "global"
    source: ClassVar[str] = "An et al. 2024, arXiv:2312.11983; released code"

    def scores(self, block: BlockUnits, evidence: UnitEvidence) -> UnitScores:
        def fluctuation(bound: SiteModule) -> Tensor:
            unbiased = evidence.tokens / max(evidence.tokens - 1, 1)
            return statistic(bound, evidence, "X_var")[0] * unbiased * weight(bound).square().sum(0)

        attention = block.attention
        columns = _standardised(fluctuation(attention.output).square())
        heads = columns.reshape(attention.heads, attention.head_dim).mean(1)
        groups = heads.reshape(attention.groups, -1).mean(1)
        return UnitScores(groups, heads, _standardised(fluctuation(block.mlp.output)))

    def additions(self, block: BlockUnits, shape: BlockShape, evidence: UnitEvidence) -> dict[str, Tensor | None]:
        return bias_additions(block, shape, evidence)


@torch.no_grad()
def bias_additions(block: BlockUnits, shape: BlockShape, evidence: UnitEvidence) -> dict[str, Tensor | None]:
    """What the columns that go give to the outputs in the mean, to be added to these.

    Args:
        block: of the dense model.
        shape: what stays of it.
        evidence: holds ``X_mean``.

    Returns:
        By the name of the output and down matrix: [out] float32, or None where it goes as a whole. Where the matrix has
        no bias, the model has no place for it.

    Source: An et al. 2024 (FLAP), section 3.3: b = sum over the columns j that go of mean(x_j) * W[:, j].
    """
    found: dict[str, Tensor | None] = {}
    for bound, kept in (
        (block.attention.output, block.attention.columns(shape.heads)),
        (block.mlp.output, list(shape.neurons)),
    ):
        means = statistic(bound, evidence, "X_mean")[0]
        means[kept] = 0
        found[bound.site.name] = weight(bound) @ means if kept else None
    return found


def _standardised(scores: Tensor) -> Tensor:
    """Zero mean and unit unbiased deviation; all 0 where they are equal."""
    deviation = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / deviation if deviation > 0 else torch.zeros_like(scores)


UNIT_CRITERIA.add("flap", Flap())
