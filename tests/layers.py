"""A synthetic layer: inputs that are correlated and of very different size (pruners.md 0.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def synthetic_layer(
    decay: float = 0.8,
    *,
    out: int = 64,
    width: int = 128,
    tokens: int = 2048,
    dead: tuple[int, ...] = (),
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A weight, [out, width] float32, and the Gram matrix of its inputs, [width, width] float32.

    Args:
        decay: the inputs have the variances 1, 2^-decay, 3^-decay, ... along axes drawn at random.
        out, width: the size of the weight.
        tokens: how many inputs there are.
        dead: columns that are always zero.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    sizes = torch.arange(1, width + 1, dtype=torch.float64) ** (-decay / 2)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) * sizes @ rotation.T
    inputs[:, torch.randperm(width, generator=generator)[:4]] *= 10
    inputs[:, list(dead)] = 0
    spread = torch.exp(0.3 * torch.randn(width, generator=generator))
    weight = torch.randn(out, width, generator=generator) * spread / width**0.5
    return weight, (inputs.T @ inputs / tokens).float()
