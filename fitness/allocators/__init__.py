"""Allocators: how much each matrix should lose, from what a dense model shows. Plug-ins, one file each.

An allocator is a frozen dataclass whose fields are its parameters, with their defaults. It only says what it would
like; `evoprune.metrics.allocation.repair` then meets the budget exactly, the same way for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from evoprune.metrics import parameters
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice
from evoprune.metrics.records import Site
from evoprune.metrics.registry import Registry

Use = Literal["scores", "outputs", "hidden", "gradients", "loss", "losses by matrix"]
"""What an allocator may read beside weights and statistics: the scores of the criterion inside; outputs of the
matrices, hidden states between blocks or gradients in a pass over text A; losses on text B, with ``losses by matrix``
several for each matrix. Searches start from allocators that need gradients or these only if told to."""

READ_A: frozenset[Use] = frozenset({"outputs", "hidden", "gradients"})
"""Uses that text A is run for."""
READ_B: frozenset[Use] = frozenset({"loss", "losses by matrix"})
"""Uses that text B is run for."""

GRANULARITIES = ("matrix", "block", "kind")


@dataclass(frozen=True, slots=True)
class Level:
    """What may become of a matrix: so many bits for each weight that stays, and a sparsity of its rows."""

    bits: int
    sparsity: float


class Evidence(Protocol):
    """What an allocator may look at: a dense model, measured when it is asked for.

    Attributes:
        sites: its matrices, in model order.
        target: the budget, as the fraction of all their weights that goes, in [0, 1).
    """

    @property
    def sites(self) -> Sequence[Site]: ...

    @property
    def target(self) -> float: ...

    def weight(self, site: Site) -> Tensor:
        """[out, in] float32, a private copy."""

    def scores(self, site: Site) -> Tensor:
        """[out, in] float32 scores of the criterion inside, finite, low = removed first."""

    def statistic(self, site: Site, name: str) -> Tensor:
        """One of `needs`; shapes as in `evoprune.fitness.statistics.Statistics.tensor`."""

    def diversity(self, pairs: str, modalities: bool) -> Sequence[float]:
        """How unlike the outputs of each matrix are for different tokens, 0 to 2, one number per site.

        With `modalities`, the mean over pairs within each modality and between each two; else over all pairs.
        """

    def influence(self) -> Sequence[float]:
        """Mean of 1 - cos(input, output) of each block over tokens."""

    def losses(self, requests: Sequence[Sequence[float]]) -> Sequence[float]:
        """Loss on text B in nats per token at each request, repaired and pruned by the criterion inside."""

    def losses_without(self) -> Sequence[float]:
        """Loss on text B in nats per token without each block in turn, which then passes on what it is given."""

    def dense_loss(self) -> float:
        """Loss on text B in nats per token of the dense model."""

    def losses_with(self, replaced: Iterable[tuple[Site, Tensor]]) -> Sequence[float]:
        """Loss on text B in nats per token with one matrix at a time replaced by another, [out, in]."""

    def correlations(self, between: str, tokens: int, ridge: float, top: int) -> Sequence[float]:
        """Mean canonical correlation of what goes into and what comes out of each ``matrix``, or its ``block``.

        One number per site; the arguments are those of `evoprune.fitness.canonical_correlation.part_correlations`.
        """

    def input_noise(self) -> Sequence[float]:
        """What noise in the inputs of each matrix does to the loss; see `evoprune.fitness.input_noise`."""

    def compressed(self, site: Site, levels: Sequence[Level]) -> Iterator[tuple[Tensor, float]]:
        """What the compressor makes of a matrix at each level, [out, in] float32, and its relative output error.

        Only where bits are allocated.
        """


class Allocator(Protocol):
    """Says how much each matrix should lose. Deterministic; a frozen dataclass of plain parameters.

    Attributes:
        needs: names of the statistics it reads, beside those of the criterion inside.
        uses: what else it reads.
        source: the paper it is from.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def uses(self) -> frozenset[Use]: ...

    @property
    def source(self) -> str: ...

    def request(self, evidence: Evidence) -> Sequence[float]:
        """One sparsity per site, in model order; may lie outside [0, 1) and miss the budget.

        Raises:
            InvalidInput: a parameter does not fit this model.
        """


@runtime_checkable
class BitAllocator(Protocol):
    """An allocator that bits can be shared out by; it has this method beside those of `Allocator`.

    `evoprune.fitness.mixed_precision` then chooses the levels whose costs add up to the least at the budget.
    """

    def level_costs(self, evidence: Evidence, levels: Sequence[Sequence[Level]]) -> Sequence[Sequence[float]]:
        """What each level of each matrix costs, in any unit that can be added up; finite.

        Args:
            levels: of each site, in model order: different bits at one sparsity, unless `sparsities` gives more.
        """


ALLOCATORS: Registry[Allocator] = Registry("allocator", "evoprune.fitness.allocators")


def configured(name: str, given: Mapping[str, Any] | None = None) -> Allocator:
    """A registered allocator with some parameters changed; see `evoprune.metrics.parameters.configured`."""
    return parameters.configured(ALLOCATORS, name, given)


def grouped(sites: Sequence[Site], granularity: str) -> list[list[int]]:
    """Indices of the sites that share one sparsity: each alone, those of a block, or those of a kind, in model order.

    Raises:
        InvalidInput: no such granularity.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    groups: dict[object, list[int]] = {}
    for index, site in enumerate(sites):
        key = {"matrix": index, "block": site.block, "kind": site.kind}[granularity]
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def shared_out(groups: Sequence[Sequence[int]], values: Sequence[float]) -> list[float]:
    """One value per site from one per group."""
    by_site = {index: value for group, value in zip(groups, values, strict=True) for index in group}
    return [by_site[index] for index in range(len(by_site))]


def group_weights(sites: Sequence[Site], groups: Sequence[Sequence[int]]) -> list[int]:
    """Number of weights in each group."""
    return [sum(sites[index].weights for index in group) for group in groups]


def scaled(values: Sequence[float]) -> list[float]:
    """Values brought to [0, 1] by their smallest and largest; all 0 if they are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def by_sensitivity(
    sites: Sequence[Site], target: float, sensitivities: Sequence[float], spread: float, granularity: str
) -> list[float]:
    """Sparsities around the target by the order of sensitivities alone: the most sensitive lose the least.

    Args:
        sites: the matrices, in model order.
        target: whose mean they have, weights counted.
        sensitivities: one per site; matrices that share a sparsity have their mean.
        spread: see `around`.
        granularity: see `grouped`.
    """
    groups = grouped(sites, granularity)
    means = [math.fsum(sensitivities[index] for index in group) / len(group) for group in groups]
    check_numbers("the sensitivity", sites, groups, means)
    # Equals share the middle of their ranks, so that the order of the matrices decides nothing.
    ranks = [sum(other < mean for other in means) + sum(other <= mean for other in means) for mean in means]
    weights = group_weights(sites, groups)
    return shared_out(groups, around(target, [-rank for rank in ranks], spread, weights))


def around(target: float, removal: Sequence[float], spread: float, weights: Sequence[int] | None = None) -> list[float]:
    """Sparsities within a range of 2 * `spread` whose mean is the target, high where `removal` is.

    With `weights` each counts as many times in the mean.

    Source: the scaling of OWL (Yin et al. 2024, arXiv:2310.05175), which DSA shares.
    """
    offsets = [2 * spread * value for value in scaled(removal)]
    counts = weights or [1] * len(offsets)
    mean = math.fsum(offset * count for offset, count in zip(offsets, counts, strict=True)) / sum(counts)
    return [target + offset - mean for offset in offsets]


def check_numbers(what: str, sites: Sequence[Site], groups: Sequence[Sequence[int]], values: Sequence[float]) -> None:
    """Refuse scores that are no finite numbers.

    Raises:
        InvalidInput: names the first matrix that they are of.
    """
    for group, value in zip(groups, values, strict=True):
        if not math.isfinite(value):
            raise InvalidInput(f"{what} of {sites[group[0]].name} is {value}: no allocation follows from it")


def matching(sites: Sequence[Site], patterns: str) -> list[int]:
    """Indices of the sites whose name fits one of the patterns.

    Args:
        patterns: of names, with ``*`` and ``?``, separated by commas; none if empty.

    Raises:
        InvalidInput: a pattern fits no matrix.
    """
    found: set[int] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        fits = [index for index, site in enumerate(sites) if fnmatchcase(site.name, pattern)]
        if pattern and not fits:
            raise InvalidInput(f"no matrix is called {pattern[:80]!r}; one is {sites[0].name}, and * fits anything")
        found.update(fits)
    return sorted(found)
