"""The same sparsity everywhere, or everywhere but in the matrices that stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use, matching
from evoprune.metrics.errors import InvalidInput


@dataclass(frozen=True)
class Uniform:
    """The same sparsity in every matrix."""

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset()
    source: ClassVar[str] = "baseline"

    def request(self, evidence: Evidence) -> Sequence[float]:
        return [evidence.target] * len(evidence.sites)


@dataclass(frozen=True)
class UniformPlus:
    """The same sparsity in every matrix but those whose names fit `dense`, which lose nothing.

    In image models the first convolution stays dense and the classifier keeps a fifth. Language models exempt nothing
    unless told to: embeddings and the output head are not prunable anyway.

    Attributes:
        dense: patterns of names, such as ``model.layers.0.*``, separated by commas.
    """

    dense: str = ""

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset()
    source: ClassVar[str] = "Gale et al. 2019, arXiv:1902.09574; Liu et al. 2022, arXiv:2202.02643"

    def request(self, evidence: Evidence) -> Sequence[float]:
        sites = evidence.sites
        dense = set(matching(sites, self.dense))
        weights = sum(site.weights for site in sites)
        left = sum(site.weights for index, site in enumerate(sites) if index not in dense)
        if evidence.target * weights >= left:
            raise InvalidInput(
                f"sparsity {evidence.target:g} cannot be reached with {self.dense!r} dense: they hold "
                f"{1 - left / weights:.1%} of the weights"
            )
        return [0.0 if index in dense else evidence.target * weights / left for index in range(len(sites))]


ALLOCATORS.add("uniform", Uniform())
ALLOCATORS.add("uniform+", UniformPlus())
