"""Groups of matrices with budgets of their own, such as the components of a multimodal model. Needs no torch.

Source: the study of Stable Diffusion 2 by Ramesh and Zhao 2024, arXiv:2411.15113, whose components each fail beyond a
sparsity of their own; multimodal allocation chapter, section 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from evoprune.metrics.allocation import exact_sparsity
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site, removed_count


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Matrices that share a budget.

    Attributes:
        name: the component or the pattern of names that they fit.
        indices: of the matrices, in model order.
        sparsity: fraction of all their weights that goes, in [0, 1).
    """

    name: str
    indices: tuple[int, ...]
    sparsity: float


def site_groups(sites: Sequence[Site], budgets: Mapping[str, float]) -> tuple[list[SiteGroup], tuple[int, ...]]:
    """The groups that budgets are given for, and the indices of the matrices in none of them.

    Args:
        sites: the matrices, in model order.
        budgets: sparsity by component, such as ``vision_tower``, or by pattern of names with ``*`` and ``?``. A matrix
            that fits several belongs to the first.

    Raises:
        InvalidInput: a group has no matrix, or a sparsity is outside [0, 1).
    """
    left = dict(enumerate(sites))
    groups = []
    for name, sparsity in budgets.items():
        if isinstance(sparsity, bool) or not 0 <= sparsity < 1:
            raise InvalidInput(
                f"the budget of {name[:80]!r} is {sparsity}, outside [0, 1): give the fraction to remove"
            )
        fits = tuple(index for index, site in left.items() if name == site.component or fnmatchcase(site.name, name))
        if not fits:
            raise InvalidInput(_nothing(name, sites))
        for index in fits:
            del left[index]
        groups.append(SiteGroup(name, fits, float(sparsity)))
    return groups, tuple(left)


def rest_sparsity(sites: Sequence[Site], rest: Sequence[int], removed: int, target: float) -> float:
    """What the matrices in no group lose so that all together lose the target.

    Args:
        sites: all matrices.
        rest: indices of those in no group.
        removed: weights that the groups lose.
        target: fraction of all weights that goes, in [0, 1).

    Raises:
        InvalidInput: the groups alone lose more than the target, or the rest cannot make up for them.
    """
    weights = sum(site.weights for site in sites)
    left = removed_count(target, weights) - removed
    room = sum(sites[index].weights for index in rest)
    if not rest:
        slack = max(min(site.out_features for site in sites), weights // 10_000)
        if abs(left) > slack:
            raise InvalidInput(
                f"the groups hold every matrix and lose {removed / weights:.6f} of all weights, not {target:g}: "
                f"leave out the sparsity, or leave a component without a budget"
            )
        return 0.0
    if not 0 <= left < room:
        raise InvalidInput(
            f"sparsity {target:g} cannot be reached: the groups lose {removed:,} of {weights:,} weights, and the "
            f"{room:,} weights outside of them would have to lose {left:,}"
        )
    return exact_sparsity(left, room)


def _nothing(name: str, sites: Sequence[Site]) -> str:
    if any(name == site.component or fnmatchcase(site.name, name) for site in sites):
        return f"every matrix that {name[:80]!r} fits is in an earlier group: give it first, or leave it out"
    components = ", ".join(dict.fromkeys(site.component for site in sites))
    return (
        f"no prunable matrix fits {name[:80]!r}; give a component ({components}) or a pattern such as "
        f"{sites[0].name.rpartition('.')[0]}.*"
    )
