"""What stands in a block where a part was dropped.

The source of these classes also stands in the module that a compact checkpoint brings along for other programs, so they
use torch and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DroppedAttention(nn.Module):
    """Adds nothing, and tells the cache how many tokens went by."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        # Older families have another name for the cache.
        cache = kwargs.get("layer_past") if past_key_values is None else past_key_values
        if cache is not None:
            # Positions and masks follow from what the cache of the first block holds: one number a token will do.
            token = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(token, token, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class DroppedMlp(nn.Module):
    """Adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)
