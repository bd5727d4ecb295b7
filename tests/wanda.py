"""Wanda as its released code computes it: its own accumulator, its own scores, its own masks; no code of evoprune."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningMean:
    """The reference's ``scaler_row``: updated in place, in float32, one sequence at a time."""

    def __init__(self, columns: int) -> None:
        self.scaler_row = torch.zeros(columns)
        self.sequences = 0

    def add_batch(self, inputs: Tensor) -> None:
        """Take in the [1, tokens, columns] inputs of one sequence."""
        rows = inputs.reshape(-1, inputs.shape[-1]).t().type(torch.float32)
        self.scaler_row *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        self.scaler_row += torch.norm(rows, p=2, dim=1) ** 2 / self.sequences


def keep(weight: Tensor, scaler_row: Tensor, sparsity: float) -> Tensor:
    """[out, in] bool: each row loses its int(in * sparsity) lowest scores by a stable sort."""
    scores = torch.abs(weight) * torch.sqrt(scaler_row.reshape((1, -1)))
    removed = torch.zeros_like(scores, dtype=torch.bool)
    _, order = torch.sort(scores, dim=-1, stable=True)
    removed.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
    return ~removed


def keep_pattern(weight: Tensor, scaler_row: Tensor, gone: int, width: int) -> Tensor:
    """[out, in] bool: `gone` of every `width` consecutive columns go."""
    scores = torch.abs(weight) * torch.sqrt(scaler_row.reshape((1, -1)))
    removed = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], width):
        block = scores[:, start : start + width].float()
        removed.scatter_(1, start + torch.topk(block, gone, dim=1, largest=False)[1], True)
    return ~removed
