"""How unlike the output tokens of a matrix are: one minus their mean cosine, streamed without comparing pairs.

Source: Lee et al. 2025, TAMP, arXiv:2504.09897; the sums are from the multimodal allocation chapter, 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

PAIRS = ("all", "positive")
# With positive pairs every token meets every other, so a modality is thinned to this many by a stride.
MAX_PAIRED_TOKENS = 1024


def token_diversity(tokens: Tensor, modality: Tensor | None = None, pairs: str = "all") -> dict[str, float]:
    """One minus the mean cosine between the tokens of one sample, within and between modalities.

    Args:
        tokens: [tokens, features] of any float type.
        modality: [tokens] int64, such as 0 for text and 1 for images; None if there is one only.
        pairs: ``all``, or ``positive`` for the published rule: means within a modality count positive cosines alone.

    Returns:
        Terms by name: ``0`` within modality 0, ``0-1`` between modalities 0 and 1. A modality with fewer than two
        tokens has no inner term, nor one without a positive pair; an absent one has no terms.

    With S the sum of n unit vectors, the mean over pairs is (|S|^2 - n) / (n (n - 1)), and S . S' / (n n') between two
    modalities: exact, and in time linear in the tokens.
    """
    unit = torch.nn.functional.normalize(tokens.double(), dim=1)
    kinds = torch.zeros(len(tokens), dtype=torch.int64) if modality is None else modality
    parts = {int(kind): unit[(kinds == kind).to(unit.device)] for kind in kinds.unique()}
    terms: dict[str, float] = {}
    for kind, part in parts.items():
        similarity = _mean_cosine(part) if pairs == "all" else _mean_positive_cosine(part)
        if similarity is not None:
            terms[f"{kind}"] = 1 - similarity
    for one, other in combinations(sorted(parts), 2):
        mean = parts[one].mean(0) @ parts[other].mean(0)
        terms[f"{one}-{other}"] = 1 - mean.item()
    return terms


def _mean_cosine(unit: Tensor) -> float | None:
    n = len(unit)
    if n < 2:
        return None
    # A zero vector has no direction and counts as unlike everything; it adds nothing to either sum.
    total = unit.sum(0).square().sum().item() - unit.square().sum().item()
    return total / (n * (n - 1))


def _mean_positive_cosine(unit: Tensor) -> float | None:
    thinned = unit[:: max(math.ceil(len(unit) / MAX_PAIRED_TOKENS), 1)]
    cosines = (thinned @ thinned.T).triu(1)
    positive = cosines[cosines > 0]
    return positive.mean().item() if len(positive) else None


class DiversityMean:
    """Mean over samples of the diversity of one matrix, every sample having the same weight."""

    def __init__(self, pairs: str) -> None:
        self._pairs = pairs
        self._values: list[float] = []

    def add(self, outputs: Tensor) -> None:
        """Take in [samples, tokens, features] of one modality."""
        for sample in outputs:
            self.add_sample(sample)

    def add_sample(self, tokens: Tensor, modality: Tensor | None = None) -> None:
        """Take in [tokens, features] and their [tokens] modality; a sample without a term counts for nothing."""
        terms = token_diversity(tokens, modality, self._pairs)
        if terms:
            self._values.append(mean_term(list(terms.values())))

    def result(self) -> float:
        """The mean, at least 0; not a number if no sample had a pair of tokens."""
        if not self._values:
            return math.nan
        # Rounding alone can bring the diversity of equal tokens below zero.
        return max(math.fsum(self._values) / len(self._values), 0.0)


def mean_term(terms: Sequence[float]) -> float:
    """A sample's score from its terms: their mean, of as many as it has."""
    return math.fsum(terms) / len(terms)
