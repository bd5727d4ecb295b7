"""Erdős-Rényi densities: wide, large matrices lose more, by their shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use, matching
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Site

_SOURCE = "Mocanu et al. 2018, arXiv:1707.04780; Evci et al. 2020, arXiv:1911.11134"


def erdos_renyi(sites: Sequence[Site], density: float, power: float = 1.0, dense: Collection[int] = ()) -> list[float]:
    """Density of each matrix, proportional to ((out + in) / (out * in))^power and at most 1.

    Args:
        sites: the matrices.
        density: fraction of all weights that stays.
        power: 0 gives equal densities.
        dense: indices of matrices that keep everything, at the expense of the others.

    Returns:
        One density per site; their weighted mean is `density`.

    Raises:
        InvalidInput: the dense ones alone hold more than may stay.

    Source: Evci et al. 2020, arXiv:1911.11134, section 3, and its released code: whenever a density would exceed 1, the
    matrices with the largest become dense and the scale is found anew.
    """
    full = set(dense)
    kept = density * sum(site.weights for site in sites)
    raw = [((site.out_features + site.in_features) / site.weights) ** power for site in sites]
    while True:
        free = [index for index in range(len(sites)) if index not in full]
        left = kept - sum(sites[index].weights for index in full)
        if left < 0 or not free:
            raise InvalidInput(
                f"sparsity {1 - density:g} cannot be reached: the matrices that stay dense hold more than the "
                f"{density:.1%} of the weights that may stay"
            )
        scale = left / sum(raw[index] * sites[index].weights for index in free)
        largest = max(raw[index] for index in free)
        if scale * largest <= 1:
            return [1.0 if index in full else scale * raw[index] for index in range(len(sites))]
        full.update(index for index in free if raw[index] == largest)


@dataclass(frozen=True)
class ErdosRenyi:
    """Densities by the shapes of matrices: (out + in) / (out * in).

    Attributes:
        power: of that ratio; 0 gives equal densities.
    """

    power: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset()
    source: ClassVar[str] = _SOURCE

    def __post_init__(self) -> None:
        check_range("power", self.power, 0, 10)

    def request(self, evidence: Evidence) -> Sequence[float]:
        return [1 - kept for kept in erdos_renyi(evidence.sites, 1 - evidence.target, self.power)]


@dataclass(frozen=True)
class ErdosRenyiPlus:
    """As `erk`, with the matrix before the output head dense, or others of choice.

    The published form keeps the output layer dense. That of a language model is not prunable, so the matrix next to
    it takes its place.

    Attributes:
        power: see `erk`.
        dense: patterns of the names of matrices that stay dense, separated by commas; empty for the last matrix.
    """

    power: float = 1.0
    dense: str = ""

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset()
    source: ClassVar[str] = f"{_SOURCE}; Liu et al. 2022, arXiv:2202.02643"

    def __post_init__(self) -> None:
        check_range("power", self.power, 0, 10)

    def request(self, evidence: Evidence) -> Sequence[float]:
        sites = evidence.sites
        dense = matching(sites, self.dense) or [len(sites) - 1]
        return [1 - kept for kept in erdos_renyi(sites, 1 - evidence.target, self.power, dense)]


# For matrices the kernel's dimensions, which the K stands for, do not exist: both names mean one formula.
ALLOCATORS.add("er", ErdosRenyi())
ALLOCATORS.add("erk", ErdosRenyi())
ALLOCATORS.add("erk+", ErdosRenyiPlus())
