"""The coin problem at the end of a repair: whole columns of unlike matrices that add up to what is still missing."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping


def nearest_moves(residue: int, rooms: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """How many columns to remove more (positive) or fewer (negative) of each kind of matrix, to remove `residue` more.

    Args:
        residue: weights still to be removed; negative if too many have gone.
        rooms: weights in a column of a kind of matrix -> (columns that can come back, columns that can still go).

    Returns:
        Moves by kind, without zeros. What is left of the residue is as near to zero as sums of columns reach, and
        among such moves they touch the fewest weights; if both signs are as near, less is removed.

    Sums of coins between the largest coin and its negative suffice: any set of moves can be put in an order whose
    partial sums stay there. So this is a shortest path over at most 2 * max / gcd sums. It keeps one set of moves per
    sum, which where a kind has room for a few columns only may not be the one that goes on best.
    """
    steps = sorted(step for step, (back, on) in rooms.items() if back or on)
    if not steps or not residue:
        return {}
    divisor = math.gcd(*steps)
    least = min(residue % divisor, -residue % divisor)
    if abs(residue) == least:
        return {}
    bound = max(abs(residue), steps[-1])
    best = (abs(residue), 0, residue < 0)
    found: tuple[int, ...] = (0,) * len(steps)
    queue = [(0, residue < 0, residue, found)]
    settled: set[int] = set()
    while queue:
        touched, _, left, moves = heapq.heappop(queue)
        if left in settled:
            continue
        settled.add(left)
        rank = (abs(left), touched, left < 0)
        if rank <= best:
            best, found = rank, moves
            if abs(left) == least:
                break
        for place, step in enumerate(steps):
            back, on = rooms[step]
            for move in (1, -1):
                after, count = left - move * step, moves[place] + move
                if -back <= count <= on and abs(after) <= bound and after not in settled:
                    changed = (*moves[:place], count, *moves[place + 1 :])
                    heapq.heappush(queue, (touched + step, after < 0, after, changed))
    return {step: count for step, count in zip(steps, found, strict=True) if count}
