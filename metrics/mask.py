"""Scores to masks: the one mask rule that search, export and pruning share.

Weights are ordered by (score, column index) and the first ones go: ties lose the lower column first. No full sort is
needed: with v the k-th smallest score of a row, all below v go, and of those equal to v the leftmost that fill up k.
Source: symbolic pruning metrics, sections 3.1 and 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.records import MaskRule, removed_count

# More rows than this tied at the cut mean that the metric does not decide (symbolic pruning metrics, section 3.1).
MAX_TIED_ROWS = 0.05

# Up to this many weights in a group, counting smaller neighbours beats sorting.
_COUNTED_GROUP = 16


def mask(scores: Tensor, rule: MaskRule, *, max_tied: float | None = None) -> Tensor:
    """Which weights stay.

    Args:
        scores: [out, in] float32, low = removed first.
        rule: how many go. With group ``row`` each row loses floor(sparsity * in), with ``layer`` the matrix loses
            floor(sparsity * out * in); with a pattern N:M every M consecutive columns of a row keep N.
        max_tied: largest allowed fraction of rows whose last removed and first kept scores are equal (group
            ``layer``: of weights whose score equals both); None allows all.

    Returns:
        [out, in] bool, True = keep.

    Raises:
        InvalidCandidate: NONFINITE, a score is NaN or infinite; TIES, more than `max_tied` tie.
        InvalidInput: the width is no multiple of M, or the group is ``global`` (see `global_masks`).
    """
    check_finite(scores)
    if rule.pattern is not None:
        keep, tied = _keep_pattern(scores, *rule.pattern)
    elif rule.group == "global":
        raise InvalidInput("group 'global' compares across matrices: use global_masks with the scores of all of them")
    else:
        assert rule.sparsity is not None
        rows = scores if rule.group == "row" else scores.reshape(1, -1)
        keep, tied = _keep_largest(rows, removed_count(rule.sparsity, rows.shape[1]))
        keep = keep.view(scores.shape)
        if tied and rule.group == "layer":
            # In a single group only the number of weights at the cut tells chance from a metric that cannot decide.
            tied = (scores == scores[keep].min()).double().mean().item()
    if max_tied is not None and tied > max_tied:
        raise InvalidCandidate("TIES", f"{tied:.0%} tie at the cut")
    return keep


def own_rule(rule: MaskRule, own: Mapping[str, float], site: str) -> MaskRule | None:
    """The rule of one matrix, by its own sparsity where matrices have such; None if nothing of it stays.

    Args:
        rule: of all matrices, if none has a sparsity of its own.
        own: sparsity by site name, in [0, 1]; empty, or complete.
        site: name of the matrix.
    """
    if not own:
        return rule
    return None if own[site] == 1 else MaskRule(own[site])


def mask_of_count(scores: Tensor, removed: int) -> Tensor:
    """The mask that removes so many weights of a matrix, compared across all of it.

    Args:
        scores: [out, in] float32, low = removed first; ties lose the lower index first.
        removed: from 0 to out * in.

    Returns:
        [out, in] bool, True = keep.

    Raises:
        InvalidCandidate: NONFINITE, a score is NaN or infinite.
    """
    check_finite(scores)
    return _keep_largest(scores.reshape(1, -1), removed)[0].view(scores.shape)


def mask_of_counts(scores: Tensor, removed: Tensor) -> Tensor:
    """The mask that removes so many weights of each row.

    Args:
        scores: [out, in] float32, low = removed first; ties lose the lower column first.
        removed: [out] int64, from 0 to in each.

    Returns:
        [out, in] bool, True = keep.

    Raises:
        InvalidCandidate: NONFINITE, a score is NaN or infinite.
    """
    check_finite(scores)
    if bool((removed == removed[0]).all()):
        return _keep_largest(scores, int(removed[0]))[0]
    places = torch.arange(scores.shape[1], device=scores.device)
    kept = places >= removed[:, None]
    return torch.empty_like(kept).scatter_(1, scores.argsort(dim=1, stable=True), kept)


def global_masks(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of several matrices that together lose floor(sparsity * all their weights), compared across all of them.

    Args:
        scores: [out, in] float32 each, low = removed first; ties lose the earlier matrix, then the lower index first.

    Raises:
        InvalidCandidate: NONFINITE, a score is NaN or infinite.
    """
    flat = torch.cat([score.reshape(-1) for score in scores])
    check_finite(flat)
    keep, _ = _keep_largest(flat.view(1, -1), removed_count(sparsity, flat.numel()))
    parts = keep.view(-1).split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def check_finite(scores: Tensor) -> None:
    """Refuse scores that hold a NaN or an infinity.

    Raises:
        InvalidCandidate: NONFINITE.
    """
    # One pass: a float64 sum of float32 numbers overflows only if one of them already has.
    if not torch.isfinite(scores.sum(dtype=torch.float64)):
        raise InvalidCandidate("NONFINITE", "a score is NaN or infinite")


def check_pattern(pattern: tuple[int, int], in_features: int, where: str) -> None:
    """Refuse an N:M pattern on a width that M does not divide.

    Raises:
        InvalidInput: naming `where` and the nearest patterns' requirement.
    """
    if in_features % pattern[1]:
        raise InvalidInput(
            f"pattern {pattern[0]}:{pattern[1]} needs a width that {pattern[1]} divides, "
            f"but {where} has {in_features} inputs"
        )


def threshold_le_mask(scores: Tensor, sparsity: float) -> Tensor:
    """The published magnitude code's mask: everything up to the int(n * sparsity)-th sorted score goes, one too many.

    Args:
        scores: [out, in] float32.

    Source: Wanda's reference implementation of magnitude pruning; kept to compare with its numbers.
    """
    flat = scores.reshape(-1)
    cut = flat.sort().values[int(flat.numel() * sparsity)]
    return scores > cut


def _kth_smallest(rows: Tensor, k: int) -> Tensor:
    """[rows, 1]: the k-th smallest value of each row, k from 1."""
    if rows.device.type == "cpu":
        # numpy's vectorised selection is several times faster than torch's.
        selected = np.partition(rows.numpy(), k - 1, axis=1)[:, k - 1 : k]
        return torch.from_numpy(np.ascontiguousarray(selected))
    return torch.kthvalue(rows, k, dim=1, keepdim=True).values


def _keep_largest(rows: Tensor, removed: int) -> tuple[Tensor, float]:
    """Keep mask of each row, and the fraction of rows that tie at the cut."""
    if removed == 0:
        return torch.ones_like(rows, dtype=torch.bool), 0.0
    cut = _kth_smallest(rows, removed)
    keep = rows > cut
    surplus = (rows.shape[1] - removed) - keep.sum(1)
    if not surplus.any():
        return keep, 0.0
    tied = surplus.nonzero().squeeze(1)
    equal = rows[tied] == cut[tied]
    # Of the equal ones the rightmost stay.
    from_right = equal.flip(1).cumsum(1).flip(1)
    keep[tied] |= equal & (from_right <= surplus[tied, None])
    return keep, len(tied) / len(rows)


def _keep_pattern(scores: Tensor, kept: int, width: int) -> tuple[Tensor, float]:
    """Keep mask for N:M, and the fraction of rows with a group that ties at the cut."""
    check_pattern((kept, width), scores.shape[1], "the matrix")
    groups = scores.reshape(scores.shape[0], -1, width)
    removed = width - kept
    if width > _COUNTED_GROUP:
        order = groups.argsort(dim=2, stable=True)
        keep = torch.ones_like(groups, dtype=torch.bool).scatter_(2, order[..., :removed], False)
        ranked = groups.gather(2, order)
        tied = ranked[..., removed - 1] == ranked[..., removed]
    else:
        columns = groups.unbind(2)
        below = [torch.zeros_like(columns[0], dtype=torch.int8) for _ in columns]
        for left in range(width):
            for right in range(left + 1, width):
                # A tie counts the left one as the smaller.
                left_first = columns[left] <= columns[right]
                below[right] += left_first
                below[left] += ~left_first
        ranks = torch.stack(below, 2)
        keep = ranks >= removed
        largest_removed = groups.masked_fill(keep, -torch.inf).amax(2)
        tied = largest_removed == groups.masked_fill(~keep, torch.inf).amin(2)
    return keep.view(scores.shape), tied.any(1).float().mean().item()
