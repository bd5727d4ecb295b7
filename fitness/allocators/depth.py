"""By what a whole block does: ShortGPT's block influence and Shortened LLaMA's loss without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use, around, check_numbers, grouped, shared_out
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Site, removed_count


def emptied(sites: Sequence[Site], importance: Sequence[float], target: float) -> list[float]:
    """Empty the least important blocks one after another until the budget is met; the last one in part.

    Args:
        sites: the matrices.
        importance: one number per block, in the order in which the sites come to them; the earlier of equals goes
            first.
        target: fraction of all weights that goes.
    """
    groups = grouped(sites, "block")
    left = removed_count(target, sum(site.weights for site in sites))
    sparsities = [0.0] * len(groups)
    for place in sorted(range(len(groups)), key=importance.__getitem__):
        room = sum(sites[index].out_features * (sites[index].in_features - 1) for index in groups[place])
        weights = sum(sites[index].weights for index in groups[place])
        taken = min(room, left)
        # A block that is emptied asks for everything: the repair leaves a weight in each row.
        sparsities[place] = 1.0 if taken == room else taken / weights
        left -= taken
    return shared_out(groups, sparsities)


def by_importance(
    sites: Sequence[Site], importance: Sequence[float], target: float, spread: float, drop: bool
) -> list[float]:
    """Sparsity per site from one number per block: blocks emptied in order, or spread around the target."""
    groups = grouped(sites, "block")
    ours = [importance[sites[group[0]].block] for group in groups]
    check_numbers("the importance of the block", sites, groups, ours)
    if drop:
        return emptied(sites, ours, target)
    return shared_out(groups, around(target, [-value for value in ours], spread))


@dataclass(frozen=True)
class BlockInfluence:
    """Blocks that change the hidden states little lose more (ShortGPT): influence is the mean of 1 - cos(in, out).

    Published to drop blocks, which `drop` does; a sparsity for each block comes from spreading them as OWL does.

    Attributes:
        spread: largest distance from the mean would be twice this.
        drop: empty the blocks of least influence one after another instead.
    """

    spread: float = 0.08
    drop: bool = False

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset({"hidden"})
    source: ClassVar[str] = "Men et al. 2024, ShortGPT, arXiv:2403.03853"

    def __post_init__(self) -> None:
        check_range("spread", self.spread, 0, 1)

    def request(self, evidence: Evidence) -> Sequence[float]:
        return by_importance(evidence.sites, evidence.influence(), evidence.target, self.spread, self.drop)


@dataclass(frozen=True)
class ShortenedLlama:
    """Blocks without which the loss on text B rises little lose more (Shortened LLaMA); one evaluation a block.

    Published to drop blocks, which `drop` does; a sparsity for each block comes from spreading them as OWL does.

    Attributes:
        spread: largest distance from the mean would be twice this.
        drop: empty the blocks of least loss one after another instead.
    """

    spread: float = 0.08
    drop: bool = False

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset({"loss"})
    source: ClassVar[str] = "Kim et al. 2024, Shortened LLaMA, arXiv:2402.02834"

    def __post_init__(self) -> None:
        check_range("spread", self.spread, 0, 1)

    def request(self, evidence: Evidence) -> Sequence[float]:
        return by_importance(evidence.sites, evidence.losses_without(), evidence.target, self.spread, self.drop)


ALLOCATORS.add("block-influence", BlockInfluence())
ALLOCATORS.add("shortened-llama", ShortenedLlama())
