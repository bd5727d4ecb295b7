"""Which sparsity each component should have, found by trying: one number each, the total fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site

# Sparsity that the largest move takes from a component, and the smallest at which the search ends: cliffs lie within
# a twentieth of sparsity (multimodal allocation chapter, section 6).
FIRST_STEP, LAST_STEP = 0.1, 0.0125


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
        InvalidInput: there is one component only.
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
    return best
