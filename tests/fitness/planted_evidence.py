"""Evidence for allocators that tests make up, and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evoprune.fitness.allocators import Level
from evoprune.metrics.records import Site
from tests.models import random_windows

TEXT_A, TEXT_B = random_windows(3, 16), random_windows(2, 16, seed=5)
SHAPES = ((8, 12), (4, 12), (12, 8))


@dataclass
class Planted:
    """Evidence of a model that does not exist: three matrices a block, and whatever a test says of them."""

    n_blocks: int = 4
    target: float = 0.5
    shapes: Sequence[tuple[int, int]] = SHAPES
    seed: int = 0
    loss_of: Callable[[Sequence[float]], float] = lambda requested: 0.0
    per_site: Sequence[float] = ()
    per_block: Sequence[float] = ()
    order: Sequence[int] | None = None
    scores_of: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        found = [
            Site(f"m.{block}.{kind}", f"{kind}", block, self.n_blocks, *shape)
            for block in range(self.n_blocks)
            for kind, shape in enumerate(self.shapes)
        ]
        return found if self.order is None else [found[index] for index in self.order]

    def _drawn(self, site: Site, what: int, *shape: int) -> Tensor:
        place = self.n_blocks * int(site.kind) + site.block
        generator = torch.Generator().manual_seed(1000 * self.seed + 10 * place + what)
        # Blocks and kinds differ in scale and in their tails.
        drawn = torch.randn(*shape, generator=generator)
        return drawn * drawn.abs() ** (0.3 * site.block) * (1 + int(site.kind))

    def weight(self, site: Site) -> Tensor:
        return self._drawn(site, 0, site.out_features, site.in_features)

    def statistic(self, site: Site, name: str) -> Tensor:
        if name == "H":
            rows = self._drawn(site, 1, 40, site.in_features)
            return rows.T @ rows / 40
        return self._drawn(site, 2, 1, site.in_features).abs() + 0.1

    def scores(self, site: Site) -> Tensor:
        if site.name in self.scores_of:
            return self.scores_of[site.name]
        return self.weight(site).abs() * self.statistic(site, "X_l2")

    def diversity(self, pairs: str, modalities: bool) -> Sequence[float]:
        return self.per_site or [0.2 + 0.05 * site.block + 0.1 * int(site.kind) for site in self.sites]

    def influence(self) -> Sequence[float]:
        return self.per_block or [0.5 / (1 + block) for block in range(self.n_blocks)]

    def losses(self, requests: Sequence[Sequence[float]]) -> Sequence[float]:
        return [self.loss_of(requested) for requested in requests]

    def losses_without(self) -> Sequence[float]:
        return self.per_block or [3 + 0.5 / (1 + block) for block in range(self.n_blocks)]

    def dense_loss(self) -> float:
        return 3.0

    def losses_with(self, replaced: Iterable[tuple[Site, Tensor]]) -> Sequence[float]:
        """A matrix's own squared error, times what tells it apart from the others."""
        return [
            3 + (1 + site.block + 0.1 * int(site.kind)) * (self.weight(site) - new).square().sum().item()
            for site, new in replaced
        ]

    def correlations(self, between: str, tokens: int, ridge: float, top: int) -> Sequence[float]:
        return [0.9 / (1 + site.block) - 0.05 * int(site.kind) for site in self.sites]

    def input_noise(self) -> Sequence[float]:
        return self.per_site or [1 / (1 + site.block) + 0.1 * int(site.kind) for site in self.sites]

    def compressed(self, site: Site, levels: Sequence[Level]) -> Iterator[tuple[Tensor, float]]:
        raise AssertionError("no bits are shared out here")


def mean_sparsity(sites: Sequence[Site], requested: Sequence[float]) -> float:
    weights = np.array([site.weights for site in sites], dtype=float)
    return float(weights @ np.array(requested) / weights.sum())
