"""Frozen records that cross package borders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from evoprune.metrics.errors import InvalidInput

Group = Literal["row", "layer", "global"]
GROUPS: tuple[Group, ...] = ("row", "layer", "global")

# The part of a model that reads and writes text; a text-only model has no other.
LANGUAGE = "language_model"


LEVELS = 256
"""Levels are 0 to LEVELS - 1, in steps of 1 / LEVELS of a row."""


@dataclass(frozen=True, slots=True)
class Site:
    """One matrix whose weights can be removed.

    Attributes:
        name: module path in the model, such as ``model.layers.3.mlp.down_proj``.
        kind: the part of the block, such as ``mlp.down_proj``: the same in every block.
        block: index of the block, from 0, in the order of a forward pass through all parts that may be pruned.
        n_blocks: number of these blocks in the model.
        out_features: rows of the matrix in [out, in] orientation.
        in_features: columns.
        component: the part of the model that it belongs to, such as ``vision_tower``.
    """

    name: str
    kind: str
    block: int
    n_blocks: int
    out_features: int
    in_features: int
    component: str = LANGUAGE

    @property
    def depth(self) -> float:
        """Relative depth of the block, 0 for the first and 1 for the last."""
        return self.block / max(self.n_blocks - 1, 1)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


def is_attention(kind: str) -> bool:
    """Whether a kind of matrix belongs to the attention of a block; if not, it belongs to the MLP."""
    return "attn" in kind or "attention" in kind


def split_site(name: str) -> tuple[str, int]:
    """(kind, block) of a site's name: ``model.layers.3.mlp.down_proj`` is ``mlp.down_proj`` of block 3."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (match[2], int(match[1])) if match else (name, 0)


@dataclass(frozen=True, slots=True)
class MaskRule:
    """How many weights go, and what they are compared with.

    Attributes:
        sparsity: fraction to remove, in [0, 1); None when `pattern` is set.
        pattern: (n, m): n weights kept of every m consecutive input columns; None when `sparsity` is set.
        group: compare within a row, a whole matrix or the whole model. A pattern is always within a row.
    """

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    group: Group = "row"

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise InvalidInput("give either a sparsity or a pattern such as 2:4, not both and not neither")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise InvalidInput(f"sparsity {self.sparsity} is outside [0, 1): give the fraction of weights to remove")
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
            raise InvalidInput(f"pattern {self.pattern[0]}:{self.pattern[1]} must keep 0 < N < M of every M weights")
        if self.group not in GROUPS:
            raise InvalidInput(f"no group {self.group!r}; the groups are {', '.join(GROUPS)}")

    @property
    def fraction(self) -> float:
        """Fraction of weights removed, nominally."""
        if self.pattern is not None:
            return 1 - self.pattern[0] / self.pattern[1]
        assert self.sparsity is not None
        return self.sparsity

    def __str__(self) -> str:
        return f"{self.pattern[0]}:{self.pattern[1]}" if self.pattern else f"{self.sparsity:g}"


def parse_pattern(text: str) -> tuple[int, int]:
    """(n, m) from text such as ``2:4``, which keeps 2 of every 4.

    Raises:
        InvalidInput: `text` is not two whole numbers with 0 < n < m.
    """
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise InvalidInput(f"pattern {text[:40]!r} is not N:M with 0 < N < M, such as 2:4 (2 kept of every 4)")
    return int(match[1]), int(match[2])


def removed_count(sparsity: float, total: int) -> int:
    """floor(sparsity * total) of the decimal number that was written: 0.29 of 100 is 29."""
    product = float(sparsity) * total
    # Rounding moves a product by less than this: farther from a whole number, its floor is beyond doubt.
    if abs(product - round(product)) > 1e-12 * total:
        return int(product)
    return int(Fraction(repr(float(sparsity))) * total)
