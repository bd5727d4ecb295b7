"""From the scores of an allocation formula to sparsities that meet a budget.

Exports of formulas carry these functions word for word: they use nothing but `LEVELS`, each other and the standard
library. `spread` belongs to the formula as its constants do; it is searched with them, for how far matrices may be from
the mean decides as much as which of them are on which side.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from itertools import pairwise

from evoprune.metrics.records import LEVELS


def requested_sparsities(scores: list[float], spread: float, sparsity: float) -> list[float]:
    """What each matrix should lose: sparsity - spread * tanh(z / 2), z its score standardised over all; within [0, 1].

    A high score keeps more. tanh(z / 2), the logistic function from -1 to 1, is nearly linear where most z are and
    keeps one extreme matrix from taking the whole range. Rounded to nine decimals, so that formulas which differ by
    the noise of floats ask for the same.
    """
    mean = math.fsum(scores) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    if not (deviation > 0 and max(scores) > min(scores)):
        return [sparsity] * len(scores)
    squashed = [math.tanh((score - mean) / deviation / 2) for score in scores]
    return [min(max(round(sparsity - spread * value, 9), 0.0), 1.0) for value in squashed]


def levels_at_budget(requested: list[float], sizes: list[tuple[int, int]], budget: int) -> list[int]:
    """Levels near to the requested sparsities that together remove `budget` weights.

    A row of a matrix of `inputs` columns loses level * inputs // LEVELS of them; of equal levels the lowest is meant.
    The requests are moved by one common number until they add up, whole levels are then given by largest remainder,
    earlier matrices first among equals, and what is left is made up for by the fewest steps that do.

    Args:
        requested: one number in [0, 1] per matrix.
        sizes: (outputs, inputs) of each.
        budget: weights to remove in all.

    Returns:
        0 to LEVELS - 1 for each matrix. The sum misses the budget by half of the smallest step at most; by more only
        where the matrices are so few, or so many at their ends, that their steps do not add up.

    Raises:
        ValueError: the budget is beyond the highest levels.
    """
    ladders = [
        [outputs * lost for lost in sorted({level * inputs // LEVELS for level in range(LEVELS)})]
        for outputs, inputs in sizes
    ]
    most = sum(ladder[-1] for ladder in ladders)
    if budget > most:
        raise ValueError(f"{budget} weights are to go, and the matrices can lose {most}")
    wanted = shifted(
        [share * outputs * inputs for share, (outputs, inputs) in zip(requested, sizes, strict=True)],
        [outputs * inputs for outputs, inputs in sizes],
        [ladder[-1] for ladder in ladders],
        budget,
    )
    places = [bisect_right(ladder, weights) - 1 for ladder, weights in zip(ladders, wanted, strict=True)]
    residue = budget - sum(ladder[place] for ladder, place in zip(ladders, places, strict=True))
    open_ones = [at for at, place in enumerate(places) if place + 1 < len(ladders[at])]
    steps = {at: ladders[at][places[at] + 1] - ladders[at][places[at]] for at in open_ones}
    remainders = {at: round((wanted[at] - ladders[at][places[at]]) / steps[at], 9) for at in open_ones}
    for at in sorted(open_ones, key=lambda at: (-remainders[at], at)):
        if 2 * residue >= steps[at]:
            places[at] += 1
            residue -= steps[at]
    smallest = min((high - low for ladder in ladders for low, high in pairwise(ladder)), default=0)
    settle(places, ladders, residue, smallest // 2)
    return [
        -(-LEVELS * (ladder[place] // outputs) // inputs)
        for ladder, place, (outputs, inputs) in zip(ladders, places, sizes, strict=True)
    ]


def shifted(wanted: list[float], weights: list[int], tops: list[int], budget: int) -> list[float]:
    """Removed weights moved by one common share of each matrix, within 0 and `tops`, until they add up to `budget`."""
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        total = math.fsum(
            min(max(count + middle * size, 0.0), top) for count, size, top in zip(wanted, weights, tops, strict=True)
        )
        low, high = (middle, high) if total < budget else (low, middle)
    return [min(max(count + high * size, 0.0), top) for count, size, top in zip(wanted, weights, tops, strict=True)]


def settle(places: list[int], ladders: list[list[int]], residue: int, tolerance: int) -> None:
    """Move places until the residue is within the tolerance, or until nothing helps.

    One matrix by a step where that helps, the first of the best; else two matrices by up to 16 steps.
    """
    while abs(residue) > tolerance:
        made = [min(moves_within(1, places, ladders), key=lambda move: abs(residue - move[0]), default=(0, 0, 0))]
        if abs(residue - made[0][0]) >= abs(residue):
            made = nearest_pair(moves_within(16, places, ladders), residue)
        change = sum(move[0] for move in made)
        if abs(residue - change) >= abs(residue):
            break
        for _, at, span in made:
            places[at] += span
        residue -= change


def moves_within(most: int, places: list[int], ladders: list[list[int]]) -> list[tuple[int, int, int]]:
    """(weights removed by it, matrix, steps) of every move by up to so many steps, in order."""
    return [
        (ladders[at][place + span] - ladders[at][place], at, span)
        for at, place in enumerate(places)
        for span in range(-most, most + 1)
        if span and 0 <= place + span < len(ladders[at])
    ]


def nearest_pair(moves: list[tuple[int, int, int]], residue: int) -> list[tuple[int, int, int]]:
    """Two moves of different matrices that together remove most nearly the residue, with the fewest steps of these."""
    moves = sorted(moves)
    best, pair = (abs(residue), 0), []
    for one in moves:
        at = bisect_left(moves, (residue - one[0],))
        for other in moves[max(at - 2, 0) : at + 2]:
            found = (abs(residue - one[0] - other[0]), abs(one[2]) + abs(other[2]))
            if other[1] != one[1] and found < best:
                best, pair = found, [one, other]
    return pair
