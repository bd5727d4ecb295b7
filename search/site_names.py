"""Names of matrices: which block, which kind."""

from __future__ import annotations

import re
from collections.abc import Mapping

from evoprune.metrics.records import is_attention


def split_site(name: str) -> tuple[str, int]:
    """(kind, block) of a site's name: ``model.layers.3.mlp.down_proj`` is ``mlp.down_proj`` of block 3."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (match[2], int(match[1])) if match else (name, 0)


def grid(values: Mapping[str, float]) -> tuple[list[str], list[int], dict[tuple[str, int], float]]:
    """Numbers by module path as a table.

    Returns:
        Kinds in order of appearance, attention before the rest; blocks in order; the number by (kind, block).
    """
    cells = {split_site(name): value for name, value in values.items()}
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    kinds.sort(key=attention_first)
    return kinds, sorted({block for _, block in cells}), cells


def attention_first(kind: str) -> bool:
    """A key that sorts kinds of matrices."""
    return not is_attention(kind)
