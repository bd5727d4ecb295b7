"""Compressors at work on many masks of the same matrices, as a search asks: what masks have in common is done once.

A compressor is an iterator over goals that computes what they share, such as a damped and factored Gram matrix, before
the first of them. Kept alive between two goals, it keeps that too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor

from evoprune.fitness.compressors import Compressed, Goal, compress_all, compressor_of
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site

MAX_KEPT_BYTES = 1 << 30
"""What compressors may keep of all matrices in one worker."""

# Of float32 matrices of the size of the Gram matrix that a compressor keeps: the Gram matrix itself, and a damped one
# and its factor in float64.
_KEPT_GRAMS = 5

Given = Callable[[], tuple[Tensor, Mapping[str, Tensor]]]
"""Weight of a matrix, [out, in] in any floating dtype, and the statistics that the compressor needs, by name."""


def kept_bytes(sites: Iterable[Site], max_bytes: int = MAX_KEPT_BYTES) -> int:
    """What a `Compressing` keeps of these matrices, at most, asked about in this order."""
    kept = 0
    for site in sites:
        if kept + _size(site) <= max_bytes:
            kept += _size(site)
    return kept


def _size(site: Site) -> int:
    return 4 * (site.weights + _KEPT_GRAMS * site.in_features**2)


class MatrixCompressor:
    """A compressor at work on one matrix, given one goal after the other.

    What it makes of a goal does not depend on the goals before.

    Args:
        spelled: see `compressor_of`.
        given: read when the compressor begins: once, unless it wants to see all goals before its first result.
    """

    def __init__(self, spelled: str, given: Given) -> None:
        self._spelled = spelled
        self._given = given
        self._asked: deque[Goal] = deque()
        self._running: Iterator[Compressed] = iter(())

    def compressed(self, goal: Goal) -> Compressed:
        """What becomes of the matrix; its error is not measured. Raises what `compress_all` does."""
        self._asked.append(goal)
        found = next(self._running, None)
        if found is None:  # it has not begun, was done with the goals that there were, or failed at the last of them
            self._asked.clear()
            self._asked.append(goal)
            weight, statistics = self._given()
            self._running = compress_all(self._spelled, weight, self._goals(), statistics, measured=False)
            found = next(self._running)
        return found

    def _goals(self) -> Iterator[Goal]:
        while self._asked:
            yield self._asked.popleft()


class Compressing:
    """Compresses the matrices of one model, again and again.

    Of as many of them as there is room for, the first in the order in which they are asked about, it keeps what does
    not depend on the mask.

    Args:
        spelled: a compressor that reads a criterion; see `compressor_of`.
        given: weight and statistics of a matrix.
        max_bytes: what may be kept.

    Attributes:
        needs: names of the statistics that it reads.
    """

    def __init__(
        self,
        spelled: str,
        given: Callable[[Site, frozenset[str]], tuple[Tensor, Mapping[str, Tensor]]],
        max_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        self.needs = compressor_of(spelled).needs
        self._spelled = spelled
        self._given = given
        self._room = max_bytes
        self._kept: dict[str, MatrixCompressor] = {}

    def weight(self, site: Site, keep: Tensor, pattern: tuple[int, int] | None) -> Tensor:
        """[out, in] weight that a matrix gets by a mask, in its dtype.

        Args:
            site: which matrix.
            keep: [out, in] bool, True = keep.
            pattern: that of the mask, if it has one.

        Raises:
            InvalidCandidate: the weights are not finite.
            InvalidInput: the compressor can make nothing of the statistics; names the matrix.
        """
        try:
            return self._of(site).compressed(Goal.of_mask(keep, pattern)).weight
        except InvalidInput as error:
            raise InvalidInput(f"cannot compress {site.name}: {error}") from None

    def _of(self, site: Site) -> MatrixCompressor:
        if site.name in self._kept:
            return self._kept[site.name]
        found = MatrixCompressor(self._spelled, lambda: self._given(site, self.needs))
        size = _size(site)
        if size <= self._room:
            self._room -= size
            self._kept[site.name] = found
        return found
