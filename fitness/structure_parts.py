"""What the structure database knows of one attention or one MLP: which units go first, and the factor of its output.

The output of an attention is cut by KV groups, by query heads of all groups alike, or both; that of an MLP by neurons.
Source: layerwise sparsity allocation, section 5.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from evoprune.fitness.refit import Factor, zero_error
from evoprune.fitness.removal_order import Problem, balanced_order, column_order, group_order
from evoprune.fitness.units import AttentionUnits, MlpUnits
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.shape import BlockShape

Part = AttentionUnits | MlpUnits

Stored = dict[str, Tensor]
"""What is kept of a part, on the CPU: ``order``, ``lower`` and ``target`` of its `Factor`, the last two in float32;
``errors`` in float64; ``damping``; of an attention ``groups`` and ``heads``, int64, what stays longest first."""

EIGHTHS = 8
"""Widths of a part that a mixture is of, the whole one among them."""


def problem_of(part: Part, gram: Tensor, missing: Tensor | None = None) -> Problem:
    """The output matrix of a part on its inputs; arguments and errors as of `attention_tensors`."""
    try:
        return Problem.of(part.output.weight(), gram, missing=missing)
    except EvopruneError as error:
        name = part.output.site.name
        raise InvalidInput(f"cannot refit {name} on some of its columns: {error}: calibrate on more text") from None


def attention_tensors(units: AttentionUnits, gram: Tensor, missing: Tensor | None = None) -> Stored:
    """What is kept of an attention.

    Args:
        units: of the attention, bound to its dense weights.
        gram: [in, in] float32, of the inputs of its output matrix.
        missing: [out, in] float32, what it should put out beside what it does; see `Problem.of`.

    Returns:
        Among others ``groups`` [groups], ``heads`` [groups, heads of each], counted through, and ``errors``
        [groups + 1, heads of each + 1]: by how many groups and how many heads in each stay.

    Raises:
        InvalidInput: `gram` is not positive definite, even damped.
    """
    problem = problem_of(units, gram, missing)
    each, size = units.heads // units.groups, units.head_dim
    groups = group_order(problem, each * size).flip(0)
    if each == 1:
        heads = torch.arange(units.groups, device=groups.device)[:, None]
    else:
        heads = balanced_order(problem, units.groups, size).flip(1)
    total = zero_error(problem)
    errors = total.new_ones(units.groups + 1, each + 1)
    for kept in range(1, each + 1):
        staying = heads[groups, :kept].sort(dim=1).values.reshape(-1)
        columns = (staying[:, None] * size + torch.arange(size, device=staying.device)).reshape(-1)
        factor = Factor.of(problem, columns)
        errors[:, kept] = factor.errors(total)[:: kept * size]
    return {**_stored(factor, errors, problem), "groups": groups.cpu(), "heads": heads.cpu()}


def mlp_tensors(units: MlpUnits, gram: Tensor, missing: Tensor | None = None) -> Stored:
    """What is kept of an MLP; arguments and errors as of `attention_tensors`.

    Returns:
        Among others ``errors`` [neurons + 1], by how many stay.
    """
    problem = problem_of(units, gram, missing)
    factor = Factor.of(problem, column_order(problem).flip(0))
    return _stored(factor, factor.errors(zero_error(problem)), problem)


def part_bytes(part: Part) -> int:
    """About what is kept of a part takes."""
    site = part.output.site
    return 4 * site.in_features * (site.in_features + site.out_features)


def factor_of(stored: Stored, device: torch.device | str = "cpu") -> Factor:
    """The factor that was kept, on a device."""
    return Factor(*(stored[name].to(device) for name in ("order", "lower", "target")))


def kept_heads(stored: Stored, groups: int, heads_per_group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The KV groups and the query heads, ascending, that stay longest: so many groups, so many heads in each."""
    staying = sorted(stored["groups"][:groups].tolist())
    heads = [head for group in staying for head in sorted(stored["heads"][group, :heads_per_group].tolist())]
    return tuple(staying), tuple(heads)


def columns_of(part: Part, shape: BlockShape) -> list[int]:
    """Columns of the part's output that stay where this is kept of its block, ascending."""
    return part.columns(shape.heads) if isinstance(part, AttentionUnits) else list(shape.neurons)


def mixture(part: Part, stored: Stored) -> Tensor:
    """[out, in] float32: the mean of what the output can become, each width by the share of its columns that stay.

    Attentions keep KV groups in eighths of all, or all of these with fewer query heads; MLPs keep eighths of their
    neurons. An output is linear in its weight, so this weight gives the mean of their outputs.
    Source: Li et al. 2025 (Týr-the-Pruner, arXiv:2503.09657), section 3; allocation chapter, section 4.1 (ii).
    """
    kept = _attention_widths(part, stored) if isinstance(part, AttentionUnits) else _mlp_widths(part, stored)
    factor, shares = factor_of(stored, part.output.weight().device), sum(map(len, kept))
    mean = torch.zeros_like(factor.target.T)
    for columns in kept:
        mean += len(columns) / shares * spread(part, factor.refit(columns), columns)
    return mean


def refitted(part: Part, stored: Stored, columns: Sequence[int]) -> Tensor:
    """[out, in] float32: the best weight on these columns, zeros in the others."""
    return spread(part, factor_of(stored, part.output.weight().device).refit(columns), columns)


def spread(part: Part, weight: Tensor, columns: Sequence[int]) -> Tensor:
    """[out, in]: the weight of a part's output on these columns, [out, kept], with zeros in the others."""
    whole = weight.new_zeros(len(weight), part.output.site.in_features)
    whole[:, list(columns)] = weight
    return whole


def _attention_widths(units: AttentionUnits, stored: Stored) -> list[list[int]]:
    each = units.heads // units.groups
    counts = [(groups, each) for groups in _eighths(units.groups)]
    counts += [(units.groups, heads) for heads in range(1, each)]
    return [units.columns(kept_heads(stored, *count)[1]) for count in counts]


def _mlp_widths(units: MlpUnits, stored: Stored) -> list[list[int]]:
    return [sorted(stored["order"][:width].tolist()) for width in _eighths(units.neurons)]


def _eighths(count: int) -> list[int]:
    return sorted({ceil(count * eighth / EIGHTHS) for eighth in range(1, EIGHTHS + 1)})


def _stored(factor: Factor, errors: Tensor, problem: Problem) -> Stored:
    return {
        "order": factor.order.cpu(),
        "lower": factor.lower.float().cpu().contiguous(),
        "target": factor.target.float().cpu().contiguous(),
        "errors": errors.cpu(),
        "damping": torch.tensor(problem.damping),
    }
