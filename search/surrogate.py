"""A surrogate of the fitness of genomes: linear in softened levels, from what generations have measured.

It only chooses among proposals, before anything is measured, and never all of them.
Source: layerwise sparsity allocation, section 7 (surrogate option): ridge regression on one-hot levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evoprune.search.spaces.ladder import Genome, LadderSpace

KNOTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Fractions of a gene's weights; a level between two of them is a mixture of both."""
MOST_ROWS = 2048
"""Measurements remembered, the latest: those around the present parent say the most of its children."""
FEWEST_ROWS = 64
_PENALTIES = np.logspace(-3, 3, 13)


class Surrogate:
    """Ridge regression on the levels of genes, within generations.

    A generation is measured on windows of its own, so what is learned are differences within it: features and KL have
    its means taken off. The penalty is the one of `_PENALTIES` with the least generalised cross-validation error.

    Args:
        space: what genomes are made of.
    """

    def __init__(self, space: LadderSpace) -> None:
        self._space = space
        self._rows: list[tuple[int, Genome, float]] = []

    @property
    def ready(self) -> bool:
        """Whether enough was measured to predict from."""
        return len(self._rows) >= FEWEST_ROWS

    def tell(self, generation: int, genome: Genome, kl: float | None) -> None:
        """Take in what a child was worth in its first stage; nothing is learned of one without a fitness."""
        if kl is not None:
            self._rows = [*self._rows[1 - MOST_ROWS :], (generation, genome, kl)]

    def best(self, genomes: Sequence[Genome], count: int) -> list[Genome]:
        """So many of these, those with the least predicted KL first; of equals the earlier."""
        if not genomes:
            return []
        weights = self._weights()
        # Rounded, so that the order does not hang on the last bits of a sum.
        predicted = np.round(self._features(genomes) @ weights, 9)
        return [genomes[at] for at in np.argsort(predicted, kind="stable")[:count]]

    def _weights(self) -> np.ndarray:
        generations = np.array([generation for generation, _, _ in self._rows])
        features = self._features([genome for _, genome, _ in self._rows])
        target = np.array([kl for _, _, kl in self._rows])
        for generation in np.unique(generations):
            rows = generations == generation
            features[rows] -= features[rows].mean(axis=0)
            target[rows] -= target[rows].mean()
        left, scales, right = np.linalg.svd(features, full_matrices=False)
        projected = left.T @ target
        rest = float(target @ target - projected @ projected)

        def error(penalty: float) -> float:
            shrunk = penalty / (scales**2 + penalty)
            residual = float(((shrunk * projected) ** 2).sum()) + max(rest, 0.0)
            freedom = len(target) - float((1 - shrunk).sum())
            return residual / freedom**2

        penalty = min(_PENALTIES, key=error)
        return right.T @ (scales / (scales**2 + penalty) * projected)

    def _features(self, genomes: Sequence[Genome]) -> np.ndarray:
        """Shape (genomes, genes * knots), float64: of every gene the weights of the knots that it stands between."""
        shares = np.array(
            [
                [
                    gene.removed[option] / gene.removed[-1]
                    for gene, option in zip(self._space.genes, genome, strict=True)
                ]
                for genome in genomes
            ]
        )
        width = KNOTS[1] - KNOTS[0]
        near = np.clip(1 - np.abs(shares[:, :, None] - np.array(KNOTS)) / width, 0.0, None)
        return near.reshape(len(genomes), -1)

    def state(self) -> Any:
        """Everything that `restore` needs, as JSON values."""
        return [[generation, list(genome), kl] for generation, genome, kl in self._rows]

    def restore(self, state: Any) -> None:
        """Continue from `state`."""
        self._rows = [(generation, tuple(genome), kl) for generation, genome, kl in state]
