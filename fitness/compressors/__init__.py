"""Compressors: what becomes of a matrix that has to lose weights. Plug-ins, one file each.

A compressor is a frozen dataclass whose fields are its parameters, with their defaults.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from evoprune.fitness.activations import Thresholded
from evoprune.fitness.factored import Factors
from evoprune.fitness.gram import wide
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.removal_order import Problem
from evoprune.fitness.samples import Sequences
from evoprune.metrics import mask as masks
from evoprune.metrics.errors import EvopruneError, InvalidCandidate, InvalidInput
from evoprune.metrics.parameters import configured, parameters_of
from evoprune.metrics.records import Group, MaskRule
from evoprune.metrics.registry import Registry

Cost = Literal["mask", "linear", "cubic", "cubic by row"]
"""Of an [out, in] matrix: ``mask`` sorts it, ``linear`` multiplies it by its Gram matrix some times, ``cubic`` also
factorises that matrix or sweeps over its columns, ``cubic by row`` does so for every row."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What has to go from one matrix.

    Attributes:
        removed: how many weights, exactly.
        pattern: (n, m): n weights kept of every m consecutive columns; None: any of them.
        mask: [out, in] bool, True = keep, by which a criterion removes as many; None if nobody reads it.
        group: for a compressor that chooses, beside no pattern: what weights compete within. Of ``row`` every row loses
            as many.
    """

    removed: int
    pattern: tuple[int, int] | None = None
    mask: Tensor | None = None
    group: Literal["row", "layer"] = "layer"

    @classmethod
    def of_mask(cls, mask: Tensor, pattern: tuple[int, int] | None = None) -> Goal:
        """What the [out, in] bool `mask`, True = keep, removes."""
        return cls(mask.numel() - int(mask.sum()), pattern, mask)

    def largest(self, scores: Tensor) -> Tensor:
        """The mask, [out, in] bool, True = keep, that removes the lowest of some scores, [out, in] float32."""
        if self.pattern is not None:
            return masks.mask(scores, MaskRule(None, self.pattern))
        if self.group == "row":
            rows = len(scores)
            return masks.mask_of_counts(scores, torch.full((rows,), self.removed // rows, device=scores.device))
        return masks.mask_of_count(scores, self.removed)


Made = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]
"""A weight and its mask; or a core, its mask, and the blocks on its left and on its right, see `Factors`."""


class Compressor(Protocol):
    """Turns a dense matrix into those that replace it, one for each goal. A frozen dataclass of plain parameters.

    Attributes:
        needs: names of the statistics it reads, such as ``H`` (Gram matrix of the inputs, [in, in] float32).
        reads_criterion: it is given the mask of a criterion. One that is not chooses by itself what goes.
        keeps_mask: it prunes exactly by that mask; one that does not takes it as a start.
        keeps_weights: weights that stay are as they were.
        groups: of one that reads no criterion: what a goal may have weights compete within; none if it has its own way.
        cost: what it takes.
        source: the paper it is from.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def reads_criterion(self) -> bool: ...

    @property
    def keeps_mask(self) -> bool: ...

    @property
    def keeps_weights(self) -> bool: ...

    @property
    def groups(self) -> frozenset[Group]: ...

    @property
    def cost(self) -> Cost: ...

    @property
    def source(self) -> str: ...

    def compress(self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]) -> Iterator[Made]:
        """The new weight and its mask for each goal, in their order; no argument is changed.

        What goals have in common, such as a factor of the statistics, is computed once.

        Args:
            weight: [out, in] float32.
            goals: with a `mask` each if `reads_criterion`.
            statistics: by name, at least those of `needs`, float32.

        Yields:
            [out, in] float32, zero outside the mask; [out, in] bool, True = keep, which removes as many weights as the
            goal says, in its pattern. Of one that wraps the sparse matrix in others also the blocks of these: the first
            is then the `Factors.core`.
        """
        ...


@runtime_checkable
class Wrapping(Protocol):
    """A compressor that yields wrappers beside its cores; it has this beside what `Compressor` has.

    Attributes:
        wraps: with what, in words.
    """

    @property
    def wraps(self) -> str: ...


@runtime_checkable
class AtRunTime(Protocol):
    """A compressor that changes what a model does and no weight of it; its `compress` refuses every matrix."""

    def attach(
        self,
        language_model: LanguageModel,
        text: Sequences,
        sparsity: float | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[Thresholded, ...]:
        """Give layers of a model thresholds for their inputs, in place of those that they have.

        Args:
            language_model: as it is to run, with its masks.
            text: what the thresholds are set on.
            sparsity: share of the inputs of every prunable matrix that goes, in [0, 1); None leaves it to the
                compressor.
            progress: called with (done, total) in blocks.

        Returns:
            One entry for each layer that has a threshold now, in model order.
        """
        ...


@runtime_checkable
class Limited(Protocol):
    """A compressor that cannot do everything to every matrix; it may have this method beside those of `Compressor`."""

    def check(self, out_features: int, in_features: int, pattern: tuple[int, int] | None) -> None:
        """Refuse a matrix of this size, or a pattern of it; asked before long work.

        Raises:
            InvalidInput: says what would be right.
        """


@dataclass(frozen=True, slots=True)
class Compressed:
    """The replacement of one matrix.

    Attributes:
        weight: [out, in] in the dtype of the dense one, zero outside `mask` unless there are `factors`.
        mask: [out, in] bool, True = keep.
        error: relative output error, or None without statistics of the inputs.
        factors: whose product `weight` is, in its dtype, and whose core is zero outside `mask`; None if it is none.
    """

    weight: Tensor
    mask: Tensor
    error: float | None
    factors: Factors | None = None


COMPRESSORS: Registry[Compressor] = Registry("compressor", "evoprune.fitness.compressors")


def compressor_of(spelled: str) -> Compressor:
    """A registered compressor, with some parameters changed.

    Args:
        spelled: its name, or with parameters such as ``obq:bits=3`` or ``obq:bits=3,symmetric=true``.

    Raises:
        UnknownName: no such compressor.
        InvalidInput: no such parameter, or a value that it cannot have.
    """
    name, colon, words = spelled.partition(":")
    given: dict[str, str] = {}
    for word in words.split(",") if colon else ():
        key, equals, value = (part.strip() for part in word.partition("="))
        if not key or not equals or key in given:
            raise InvalidInput(
                f"{word[:40]!r} of compressor {spelled[:60]!r} is not KEY=VALUE with each KEY once, such as obq:bits=3"
            )
        given[key] = value
    return configured(COMPRESSORS, name, given)


def has_bits(spelled: str) -> bool:
    """Whether a compressor rounds weights to so many bits as it is told.

    Raises:
        UnknownName, InvalidInput: see `compressor_of`.
    """
    return "bits" in parameters_of(compressor_of(spelled))


def at_bits(spelled: str, bits: int) -> str:
    """A compressor with so many bits for each weight that stays, spelled as for `compressor_of`.

    Raises:
        UnknownName: no such compressor.
        InvalidInput: it has no bits, its spelling says how many by itself, or it cannot have so many.
    """
    name, _, words = spelled.partition(":")
    if not has_bits(spelled):
        having = [known for known in COMPRESSORS if has_bits(known)]
        raise InvalidInput(f"compressor {name!r} has no bits: give one that has, {', '.join(having)}")
    said = [word for word in words.split(",") if word]
    if any(word.partition("=")[0].strip() == "bits" for word in said):
        raise InvalidInput(
            f"compressor {spelled!r} says how many bits every weight has: leave that out for bits by matrix"
        )
    found = f"{name}:{','.join([*said, f'bits={bits}'])}"
    compressor_of(found)
    return found


def stores_weights(spelled: str) -> bool:
    """Whether the levels of a matrix are weights of their own: not where they are one dense matrix under masks.

    Raises:
        UnknownName, InvalidInput: see `compressor_of`.
    """
    compressor = compressor_of(spelled)
    return not (compressor.keeps_mask and compressor.keeps_weights)


def problem_of(weight: Tensor, gram: Tensor, damping: float) -> Problem:
    """What the output error of a matrix depends on, in float64 where the device has it.

    Args:
        weight: [out, in].
        gram: H, [in, in], of any scale.
        damping: the least; see `evoprune.fitness.gram.damped_cholesky`.

    Raises:
        InvalidInput: the Gram matrix is not positive definite, even damped.
    """
    try:
        return Problem.of(weight, wide(gram), damping)
    except EvopruneError as error:
        raise InvalidInput(f"{error}: calibrate on more text, or on another") from None


def compress(spelled: str, weight: Tensor, goal: Goal, statistics: Mapping[str, Tensor]) -> Compressed:
    """`compress_all` for one goal."""
    return next(compress_all(spelled, weight, [goal], statistics))


@torch.no_grad()
def compress_all(
    spelled: str, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor], *, measured: bool = True
) -> Iterator[Compressed]:
    """Run a compressor on one matrix, for each goal in turn, and measure what it did.

    Args:
        spelled: the compressor; see `compressor_of`.
        weight: [out, in] of any floating dtype, in which the results come back.
        goals: what has to go.
        statistics: what the compressor needs, and ``H`` or ``X_ss`` for the error.
        measured: whether anybody wants to know the error.

    Raises:
        UnknownName: no such compressor.
        InvalidInput: a parameter that it cannot have, or a statistic that it needs is not there, or of no use to it.
        InvalidCandidate: weights that are not finite.
        EvopruneError: the compressor broke its contract: a weight outside its mask, or a mask that is not what the goal
            says.
    """
    compressor = compressor_of(spelled)
    for missing in sorted(compressor.needs - set(statistics)):
        raise InvalidInput(f"compressor {spelled!r} reads {missing}, which was not collected: add it to the statistics")
    asked: deque[Goal] = deque()  # a compressor may want to see all goals before its first result

    def noted() -> Iterator[Goal]:
        for goal in goals:
            asked.append(goal)
            yield goal

    for made in compressor.compress(weight.float().contiguous(), noted(), statistics):
        new, kept = made[:2]
        cast = sparse = new.to(weight.dtype)
        factors = None
        if len(made) == 4:
            factors = Factors(new, *made[2:]).to(weight.dtype)
            cast = factors.merged().to(weight.dtype)
        if not bool(cast.isfinite().all()):
            raise InvalidCandidate("NONFINITE", f"compressor {spelled!r} returned weights that are not finite")
        if bool((sparse[~kept] != 0).any()):
            raise EvopruneError(f"compressor {spelled!r} returned weights that lie outside its mask")
        _check_mask(spelled, kept, asked.popleft())
        gram, squares = (statistics.get(name) if measured else None for name in ("H", "X_ss"))
        error = relative_output_error(weight.float(), cast.float(), gram=gram, input_squares=squares)
        yield Compressed(cast, kept, error, factors)


def _check_mask(spelled: str, kept: Tensor, goal: Goal) -> None:
    removed = kept.numel() - int(kept.sum())
    if removed != goal.removed:
        raise EvopruneError(f"compressor {spelled!r} removed {removed:,} weights and not {goal.removed:,}")
    if goal.pattern is not None:
        n, m = goal.pattern
        if bool((kept.view(kept.shape[0], -1, m).sum(2) != n).any()):
            raise EvopruneError(f"compressor {spelled!r} left the pattern {n}:{m}")


def relative_output_error(
    weight: Tensor, new: Tensor, *, gram: Tensor | None = None, input_squares: Tensor | None = None
) -> float | None:
    """tr((W - V) H (W - V)^T) / tr(W H W^T): 0 = lossless, 1 = as bad as deleting the layer.

    Args:
        weight: W, [out, in] float32.
        new: V, [out, in] float32.
        gram: H, [in, in] float32, of any scale.
        input_squares: diagonal of H where H itself is not there, [1, in] or [in] float32, of any scale.

    Returns:
        The error; 0 for a layer whose output is zero anyway; None without both `gram` and `input_squares`.

    Source: specification, pruners.md 0.1; the objective of Frantar and Alistarh 2022, arXiv:2208.11580.
    """
    if gram is not None:
        whole, lost = (_total(m @ gram, m) for m in (weight, weight - new))
    elif input_squares is not None:
        whole, lost = (_total(m * input_squares, m) for m in (weight, weight - new))
    else:
        return None
    return lost / whole if whole > 0 else 0.0


def _total(left: Tensor, right: Tensor) -> float:
    """Sum of the products of two matrices, in double: float32 sums over millions of products drift."""
    return (left.double() * right.double()).sum().item()
