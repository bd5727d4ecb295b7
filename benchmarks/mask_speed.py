"""(e) Row masks without a sort, against a stable sort: equal masks, time ratio."""

from __future__ import annotations

import statistics
import time

import torch

from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, removed_count
from figure import Figure

SPARSITY = 0.6


def by_sorting(scores: torch.Tensor) -> torch.Tensor:
    """The same masks by a stable argsort of every row."""
    removed = removed_count(SPARSITY, scores.shape[1])
    order = scores.argsort(dim=1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :removed], False)


def measure() -> Figure:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ratios, details = [], {}
    for shape in ((512, 192), (192, 512), (2048, 2048), (1024, 4096)):
        scores = torch.rand(shape, generator=generator) * torch.rand(1, shape[1], generator=generator)
        scores[:, :3] = scores[:, 3:6]  # some ties
        assert torch.equal(mask(scores, MaskRule(SPARSITY)), by_sorting(scores))
        turns = []
        for _ in range(9):
            began = time.perf_counter()
            by_sorting(scores)
            middle = time.perf_counter()
            mask(scores, MaskRule(SPARSITY))
            turns.append((middle - began) / (time.perf_counter() - middle))
        ratios.append(statistics.median(turns))
        details["x".join(map(str, shape))] = ratios[-1]
    return Figure("(e) stable sort / mask construction, slowest of four shapes", min(ratios), 3.0, False, details)
