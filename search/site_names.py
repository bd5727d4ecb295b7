"""Names of matrices as a table: which block, which kind."""

from __future__ import annotations

from collections.abc import Mapping

from evoprune.metrics.records import is_attention, split_site


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
