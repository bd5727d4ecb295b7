"""AlphaPruning: blocks whose spectra have heavy tails keep more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.allocators import (
    ALLOCATORS,
    Evidence,
    Use,
    check_numbers,
    group_weights,
    grouped,
    scaled,
    shared_out,
)
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice, check_range

FITS = ("peak", "median")
_HISTOGRAM_BINS = 100
# The tail may begin at up to this many times the mode of the eigenvalues.
_BEYOND_MODE = 1.5
# Eigenvalues below this fraction of the largest are zero but for rounding.
_ZERO = 1e-12


def tail_exponent(eigenvalues: Tensor, fit: str = "peak") -> float:
    """Exponent of the power law that the largest eigenvalues follow: 1 + n / sum(ln(l_i / l_min)), l_i >= l_min.

    Args:
        eigenvalues: [n] squared singular values, in any order.
        fit: where the tail begins: ``median``, or ``peak`` for the start, up to 1.5 times the mode of the histogram of
            log10(l), at which the tail is nearest to its power law by the Kolmogorov-Smirnov distance.

    Raises:
        InvalidInput: fewer than two different eigenvalues.

    Source: Lu et al. 2024, AlphaPruning, arXiv:2410.10912, section 3 (Hill estimator), and its released code.
    """
    values = eigenvalues.double().cpu().sort().values
    values = values[values > _ZERO * values[-1]]
    if len(values) < 2 or values[0] == values[-1]:
        raise InvalidInput("a spectrum with fewer than two different eigenvalues has no exponent")
    if fit == "median":
        return _hill(values, (len(values) - 1) // 2)
    logs = values.log10()
    counts = torch.histc(logs, _HISTOGRAM_BINS)
    low, high = logs[0].item(), logs[-1].item()
    mode = 10 ** (low + (high - low) * int(counts.argmax()) / _HISTOGRAM_BINS)
    # The last start would leave a tail of one, which fits any law.
    starts = max(int((values[:-1] <= _BEYOND_MODE * mode).sum()), 1)
    distances = [_distance(values, start) for start in range(starts)]
    return _hill(values, min(range(starts), key=distances.__getitem__))


def _hill(values: Tensor, start: int) -> float:
    tail = values[start:]
    total = (tail / tail[0]).log().sum().item()
    return 1 + len(tail) / total if total > 0 else math.inf


def _distance(values: Tensor, start: int) -> float:
    """Largest distance between the distribution of the tail and its power law."""
    alpha = _hill(values, start)
    if math.isinf(alpha):
        return math.inf
    tail = values[start:]
    law = 1 - (tail / tail[0]) ** (1 - alpha)
    steps = torch.arange(len(tail), dtype=torch.float64) / len(tail)
    return (law - steps).abs().max().item()


@dataclass(frozen=True)
class AlphaPruning:
    """Blocks whose weight spectra have heavy tails (small exponents) keep more; reads no text.

    The exponent of a group is the mean over its matrices; sparsity is proportional to a number between 1 - spread and
    1 + spread that grows with it.

    Attributes:
        spread: epsilon of the paper.
        fit: where a tail begins: peak or median.
        granularity: what shares a sparsity: block, kind or matrix.
    """

    spread: float = 0.3
    fit: str = "peak"
    granularity: str = "block"

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset()
    source: ClassVar[str] = "Lu et al. 2024, arXiv:2410.10912; released code"

    def __post_init__(self) -> None:
        check_range("spread", self.spread, 0, 1)
        check_choice("fit", self.fit, FITS)
        grouped((), self.granularity)

    def request(self, evidence: Evidence) -> Sequence[float]:
        sites = evidence.sites
        groups = grouped(sites, self.granularity)
        exponents = [
            math.fsum(
                tail_exponent(torch.linalg.svdvals(evidence.weight(sites[index])).double().square(), self.fit)
                for index in group
            )
            / len(group)
            for group in groups
        ]
        check_numbers("the spectrum's exponent", sites, groups, exponents)
        ratios = [1 - self.spread + 2 * self.spread * place for place in scaled(exponents)]
        weights = group_weights(sites, groups)
        whole = math.fsum(ratio * size for ratio, size in zip(ratios, weights, strict=True))
        # With a spread of 1 a target near 1 asks for more than all of a matrix, which the repair gives to others.
        scale = evidence.target * sum(weights) / whole
        return shared_out(groups, [ratio * scale for ratio in ratios])


ALLOCATORS.add("alpha-pruning", AlphaPruning())
