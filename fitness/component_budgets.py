"""Which sparsity each component should have, found by trying: one number each, the total fixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site

# Sparsity that the largest move takes from a component, and the smallest at which the search ends: cliffs lie within
# a twentieth of sparsity (multimodal allocation chapter, section 6).
FIRST_STEP, LAST_STEP = 0.1, 0.0125

# A loss that more than triples within a twentieth of sparsity is a cliff (same section). Near the dense model any loss
# does: that of magnitude pruning grows with the cube of sparsity, which triples so fast up to 0.16.
CLIFF_FACTOR, CLIFF_STEP, CLIFF_FROM = 3.0, 0.05, 0.2


def search_budgets(
    sites: Sequence[Site],
    target: float,
    loss_of: Callable[[Mapping[str, float]], float],
    progress: Callable[[int], None] = lambda tried: None,
) -> dict[str, float]:
    """Sparsity by component that a pattern search finds best, starting where all are equal.

    A move takes a step of sparsity from one component and gives the same number of weights to another. The best move
    is made as long as one lowers the loss; then the step is halved.

    Args:
        sites: the matrices, of two components or more.
        target: fraction of all their weights that goes, in (0, 1).
        loss_of: the loss at some budgets; infinite where the model is lost. Low is good.
        progress: told how many budgets have been tried.

    Returns:
        Sparsities that weighted by sizes add up to the target, at each of which every row keeps a weight.

    Raises:
        InvalidInput: there is one component only, or the model is lost at all budgets that were tried.
    """
    sizes: dict[str, int] = {}
    rows: dict[str, int] = {}
    for site in sites:
        sizes[site.component] = sizes.get(site.component, 0) + site.weights
        rows[site.component] = rows.get(site.component, 0) + site.out_features
    if len(sizes) < 2:
        raise InvalidInput(f"budgets can be searched for two components or more; there is {', '.join(sizes)} alone")
    best = dict.fromkeys(sizes, target)
    tried = {tuple(best.values()): loss_of(best)}
    least, step = next(iter(tried.values())), FIRST_STEP
    while step >= LAST_STEP:
        found = None
        for giver, taker in permutations(sizes, 2):
            moved = best | {
                giver: round(best[giver] - step, 9),
                taker: best[taker] + step * sizes[giver] / sizes[taker],
            }
            # Every row keeps a weight.
            if moved[giver] < 0 or moved[taker] > 1 - rows[taker] / sizes[taker]:
                continue
            key = tuple(moved.values())
            if key not in tried:
                tried[key] = loss_of(moved)
                progress(len(tried))
            if tried[key] < least:
                least, found = tried[key], moved
        if found is None:
            step /= 2
        else:
            best = found
    if least == math.inf:
        raise InvalidInput(f"the model is lost at all {len(tried)} budgets that were tried: give a lower sparsity")
    return best


def guarded(
    losses_of: Callable[[Mapping[str, float]], Mapping[str, float]],
) -> Callable[[Mapping[str, float]], float]:
    """The sum of the components' losses, infinite where one has fallen off a cliff.

    Args:
        losses_of: the loss of each component at some budgets, which depends on its own sparsity alone.
    """
    known: dict[tuple[str, float], float] = {}

    def losses(budgets: Mapping[str, float]) -> dict[str, float]:
        if not known.keys() >= set(budgets.items()):
            known.update({(name, budgets[name]): loss for name, loss in losses_of(budgets).items()})
        return {name: known[name, share] for name, share in budgets.items()}

    def loss_of(budgets: Mapping[str, float]) -> float:
        now = losses(budgets)
        before = losses({name: share - CLIFF_STEP * (share >= CLIFF_FROM) for name, share in budgets.items()})
        fallen = any(now[name] > CLIFF_FACTOR * before[name] for name, share in budgets.items() if share >= CLIFF_FROM)
        total = sum(now.values())
        return math.inf if fallen or not math.isfinite(total) else total

    return loss_of
