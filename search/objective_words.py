"""What fitness measures: as facts of a result, and in words."""

from __future__ import annotations

from typing import Any

from evoprune.search.config_sections import SearchConfig


def objective_facts(config: SearchConfig) -> dict[str, Any]:
    """``objective``, and ``top_k`` where the KL is not over the whole vocabulary."""
    reduced = {} if config.top_k is None else {"top_k": config.top_k}
    return {"objective": config.objective, **reduced}


def over_most_likely(top_k: int | None) -> str:
    """What stands behind a KL on text B: over which tokens it is; nothing where these are the whole vocabulary.

    Args:
        top_k: of the configuration, or of a result, which lacks it for the whole vocabulary.
    """
    return "" if top_k is None else f" over the dense model's {top_k:,} most likely tokens"
