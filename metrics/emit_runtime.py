"""What every exported metric carries, word for word, beside its operators: the mask rule and portable test numbers.

The exporter copies these functions' source, so they use nothing but torch and their own arguments. They repeat
`evoprune.metrics.mask` in the fewest words; tests hold the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def removed_count(sparsity: float, total: int) -> int:
    """floor(sparsity * total) of the decimal that was written: 0.29 of 100 is 29."""
    digits, _, power = repr(float(sparsity)).partition("e")
    whole, _, fraction = digits.partition(".")
    return int(whole + fraction) * total // 10 ** (len(fraction) - int(power or 0))


def keep_largest(rows: Tensor, removed: int) -> Tensor:
    """True = keep: each row loses its `removed` lowest scores; ties lose the lower column first."""
    if not torch.isfinite(rows).all():
        raise ValueError("a score is NaN or infinite")
    lowest = rows.argsort(dim=1, stable=True)[:, :removed]
    return torch.ones_like(rows, dtype=torch.bool).scatter_(1, lowest, False)


def draw(seed: int, rows: int, columns: int) -> Tensor:
    """Pseudo-random float32 numbers in [0, 1) with 24 bits, the same on every machine."""
    numbers = []
    for _ in range(rows * columns):
        seed = (1103515245 * seed + 12345) % 2**31
        numbers.append((seed >> 7) / 2**24)
    return torch.tensor(numbers, dtype=torch.float32).reshape(rows, columns)
