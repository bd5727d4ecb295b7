"""Min-max scaling and standardisation, over the matrix or within each row. A constant becomes zero."""

from __future__ import annotations

import torch
from torch import Tensor

from evoprune.metrics.operators import Operator, define
from evoprune.metrics.types import ANY, NONNEGATIVE


def mms_t(x: Tensor) -> Tensor:
    low = x.amin()
    spread = x.amax() - low
    return torch.where(spread > 0, (x - low) / spread, torch.zeros_like(spread))


def mms_r(x: Tensor) -> Tensor:
    low = x.amin(1, keepdim=True)
    spread = x.amax(1, keepdim=True) - low
    return torch.where(spread > 0, (x - low) / spread, torch.zeros_like(spread))


def zsn_t(x: Tensor) -> Tensor:
    wide = x.double()
    mean = wide.mean()
    deviation = (wide - mean).square_().mean().sqrt_().float()
    # A constant has no spread beyond the rounding of its mean.
    varies = (x.amax() > x.amin()) & (deviation > 0)
    return torch.where(varies, (x - mean.float()) / deviation, torch.zeros_like(deviation)).clamp_(-1e30, 1e30)


def zsn_r(x: Tensor) -> Tensor:
    wide = x.double()
    mean = wide.mean(1, keepdim=True)
    deviation = (wide - mean).square_().mean(1, keepdim=True).sqrt_().float()
    varies = (x.amax(1, keepdim=True) > x.amin(1, keepdim=True)) & (deviation > 0)
    return torch.where(varies, (x - mean.float()) / deviation, torch.zeros_like(deviation)).clamp_(-1e30, 1e30)


define(
    Operator(
        "mms_t",
        mms_t,
        "normaliser",
        1,
        lambda x: NONNEGATIVE,
        lambda x: f"\\operatorname{{minmax}}({x})",
        2,
        increasing="always",
        scope="matrix",
    )
)
define(
    Operator(
        "mms_r",
        mms_r,
        "normaliser",
        1,
        lambda x: NONNEGATIVE,
        lambda x: f"\\operatorname{{minmax}}_\\mathrm{{row}}({x})",
        2,
        increasing="always",
        scope="row",
    )
)
define(
    Operator(
        "zsn_t",
        zsn_t,
        "normaliser",
        1,
        lambda x: ANY,
        lambda x: f"\\operatorname{{zscore}}({x})",
        2,
        increasing="always",
        scope="matrix",
    )
)
define(
    Operator(
        "zsn_r",
        zsn_r,
        "normaliser",
        1,
        lambda x: ANY,
        lambda x: f"\\operatorname{{zscore}}_\\mathrm{{row}}({x})",
        2,
        increasing="always",
        scope="row",
    )
)
