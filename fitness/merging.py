"""Merging decoder blocks: the parameters of one take in what those behind it differ by.

θ* = θ_0 + α Σ_k (θ_k - θ_0). With α = 1 that is reserving differences while seeking common (RDSC) of LaCo; α = 0 drops
the blocks behind. The released code of LaCo overwrites θ_0 with each sum, so that its result is the last θ_k.
Source: Yang et al. 2024 (LaCo, arXiv:2402.11187), section 3.2, and its released notebooks; weight compression
operators, section 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evoprune.metrics.errors import InvalidInput

Parameters = Mapping[str, Tensor]
"""Of a block, by their names in it."""


@torch.no_grad()
def merged(base: Parameters, others: Sequence[Parameters], share: float = 1) -> dict[str, Tensor]:
    """The parameters of `base` plus `share` of what the others differ from it by, summed; in its dtypes.

    Args:
        base: of the block that stays.
        others: of those that go, with at least its names.
        share: α; sums are taken in float32 at least.

    Raises:
        InvalidInput: a parameter has another shape there.
    """
    check_alike(base, others)
    found = {}
    for name, value in base.items():
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        found[name] = (wide + share * sum(other[name].to(wide) - wide for other in others)).to(value.dtype)
    return found


def check_alike(base: Parameters, others: Sequence[Parameters]) -> None:
    """Refuse blocks that cannot be merged.

    Raises:
        InvalidInput: a parameter is missing in one of them, or has another shape there.
    """
    for name, value in base.items():
        for other in others:
            if name not in other or other[name].shape != value.shape:
                raise InvalidInput(f"the blocks differ in {name}: they cannot be merged")
