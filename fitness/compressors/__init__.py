"""Compressors: what happens to a matrix once its mask is known. Plug-ins, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from evoprune.metrics.errors import EvopruneError
from evoprune.metrics.registry import Registry


class Compressor(Protocol):
    """Turns a dense matrix and a mask into the matrix that replaces it.

    Attributes:
        needs: names of the statistics it reads, such as ``H`` (Gram matrix of the inputs, [in, in] float32).
        keeps_mask: it prunes exactly by the mask it is given; one that does not takes it as a start.
    """

    needs: frozenset[str]
    keeps_mask: bool

    def compress(self, weight: Tensor, mask: Tensor, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The new weight and its mask; no argument is changed.

        Args:
            weight: [out, in] float32.
            mask: [out, in] bool, True = keep.
            statistics: by name, at least those of `needs`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Compressed:
    """The replacement of one matrix.

    Attributes:
        weight: [out, in] float32, zero outside `mask`.
        mask: [out, in] bool, True = keep.
        error: relative output error, or None without statistics of the inputs.
    """

    weight: Tensor
    mask: Tensor
    error: float | None


COMPRESSORS: Registry[Compressor] = Registry("compressor", "evoprune.fitness.compressors")


def compress(name: str, weight: Tensor, mask: Tensor, statistics: Mapping[str, Tensor]) -> Compressed:
    """Run the compressor `name` on one matrix and measure what it did.

    Args:
        name: one of `COMPRESSORS`.
        weight: [out, in] float32.
        mask: [out, in] bool, True = keep.
        statistics: what the compressor needs, and ``H`` or ``X_ss`` for the error.

    Raises:
        UnknownName: no such compressor.
        EvopruneError: the compressor broke its contract: not finite, or a weight outside its mask.
    """
    new, kept = COMPRESSORS[name].compress(weight, mask, statistics)
    if not bool(new.isfinite().all()) or bool((new[~kept] != 0).any()):
        raise EvopruneError(f"compressor {name!r} returned weights that are not finite or lie outside its mask")
    error = relative_output_error(weight, new, gram=statistics.get("H"), input_squares=statistics.get("X_ss"))
    return Compressed(new, kept, error)


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
