"""Rank signatures: whether two metrics order the weights of a probe alike, and how far apart their masks are.

Metrics with equal signatures get equal masks but for rare exceptions; metrics with different signatures may still get
equal masks, which costs an evaluation and nothing else. Source: symbolic pruning metrics, section 3.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evoprune.metrics.errors import InvalidCandidate
from evoprune.metrics.expression import Expression
from evoprune.metrics.interpreter import evaluate
from evoprune.metrics.mask import MAX_TIED_ROWS, check_finite, global_masks, mask, own_rule
from evoprune.metrics.probe import Probe
from evoprune.metrics.records import MaskRule, removed_count


@dataclass(frozen=True, slots=True)
class Signature:
    """How a metric ranks a probe.

    Attributes:
        digest: hex; equal for metrics that rank alike. Empty if the metric could not be ranked.
        reason: None, or why the metric is invalid on the probe: STAT_MISSING, NONFINITE or TIES.
    """

    digest: str
    reason: str | None = None


def rank_signature(
    expression: Expression, probe: Probe, rule: MaskRule, own: Mapping[str, float] | None = None
) -> Signature:
    """The signature of a metric, best asked of its canonical form.

    Scores are float64 here, so that metrics that differ only by how float32 rounds near-equal scores share a signature.
    Ties are counted among the scores as float32 holds them.

    Args:
        expression: any expression.
        probe: what to rank.
        rule: the group that is ranked (each row, each matrix or all together), and the cut at which ties are looked
            for.
        own: sparsity by site name, in [0, 1], if each matrix has a cut of its own; see `own_rule`.
    """
    if not expression.statistics <= probe.terminals:
        return Signature("", "STAT_MISSING")
    scores = [evaluate(expression, inputs) for inputs in probe.wide]
    try:
        for score in scores:
            check_finite(score)
    except InvalidCandidate as error:
        return Signature("", error.reason)
    group = "row" if rule.pattern is not None else rule.group
    if group == "global":
        rankings = [_flat(scores)]
    else:
        rankings = scores if group == "row" else [_flat([score]) for score in scores]
    digest = hashlib.sha256(group.encode())
    for ranking in rankings:
        width = np.uint16 if ranking.shape[1] <= 1 << 16 else np.uint32
        digest.update(np.argsort(ranking.numpy(), axis=1, kind="stable").astype(width).tobytes())
    rules = [own_rule(rule, own or {}, name) for name in probe.names[:-1]]
    cut = [(score.float(), its) for score, its in zip(scores, rules, strict=False) if its is not None]
    tied = _tied([score for score, _ in cut], rule, [its.sparsity for _, its in cut]) if cut else 0.0
    return Signature(digest.hexdigest(), "TIES" if tied > MAX_TIED_ROWS else None)


def probe_scores(expression: Expression, probe: Probe) -> tuple[Tensor, ...]:
    """Scores of the real matrices of a probe: [rows, in] float32 each.

    Raises:
        InvalidCandidate: STAT_MISSING.
    """
    return tuple(evaluate(expression, inputs) for inputs in probe.real)


def pruned_sets(scores: Sequence[Tensor], rule: MaskRule) -> tuple[Tensor, ...]:
    """Which weights go, for the scores of each matrix: [rows, in] bool, True = removed.

    Raises:
        InvalidCandidate: NONFINITE.
    """
    if rule.group == "global" and rule.pattern is None:
        assert rule.sparsity is not None
        return tuple(~keep for keep in global_masks(scores, rule.sparsity))
    return tuple(~mask(score, rule) for score in scores)


def set_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """1 - the mean over rows of intersection over union of two results of `pruned_sets`; 0 = equal, 1 = disjoint."""
    overlaps = []
    for a, b in zip(first, second, strict=True):
        union = (a | b).sum(1).double()
        overlaps.append(torch.where(union > 0, (a & b).sum(1) / union.clamp(min=1), 1.0))
    return 1 - torch.cat(overlaps).mean().item()


def share_that_differs(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Fraction of the weights that only one of two results of `pruned_sets` removes."""
    differing = sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
    return differing / sum(a.numel() for a in first)


def behaviour_distance(first: Sequence[Tensor], second: Sequence[Tensor], rule: MaskRule) -> float:
    """How differently two metrics prune a probe, from their `probe_scores`: see `set_distance`."""
    return set_distance(pruned_sets(first, rule), pruned_sets(second, rule))


def _flat(scores: Sequence[Tensor]) -> Tensor:
    return torch.cat([score.reshape(1, -1) for score in scores], 1)


def _tied(scores: Sequence[Tensor], rule: MaskRule, sparsities: Sequence[float | None]) -> float:
    """Fraction of the rows that tie at the cut; where a group is more than a row, of the weights that equal the cut.

    Args:
        sparsities: of each matrix, whose rows are cut there; not read if the group is no row or there is a pattern.
    """
    if rule.pattern is not None:
        kept, width = rule.pattern
        cut = width - kept
        blocks = [np.sort(score.reshape(len(score), -1, width).numpy(), axis=2) for score in scores]
        rows = [(block[..., cut - 1] == block[..., cut]).any(1) for block in blocks]
        return float(np.concatenate(rows).mean())
    assert rule.sparsity is not None
    if rule.group == "row":
        rows = [_equal_to_cut(score, at).any(1) for score, at in zip(scores, sparsities, strict=True) if at is not None]
    else:
        groups = [_flat(scores)] if rule.group == "global" else [_flat([score]) for score in scores]
        rows = [_equal_to_cut(group, rule.sparsity).reshape(-1) for group in groups]
    return float(np.concatenate(rows).mean())


def _equal_to_cut(scores: Tensor, sparsity: float) -> np.ndarray:
    """[rows, in] bool, in sorted order: the scores equal to both the last one removed and the first one kept."""
    removed = removed_count(sparsity, scores.shape[1])
    if removed == 0:
        return np.zeros((len(scores), 1), dtype=bool)
    values = np.sort(scores.numpy(), axis=1)
    tied: np.ndarray = (values == values[:, removed - 1 : removed]) & (
        values[:, removed - 1 : removed] == values[:, removed : removed + 1]
    )
    return tied
