"""Masks of a policy in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def chosen_metrics(mask: Mask, metrics: Sequence[str]) -> list[str]:
    """The metric of each matrix, of a mask [matrices * metrics] that keeps one unit of each."""
    return [metrics[choice] for choice in mask.reshape(-1, len(metrics)).argmax(axis=1).tolist()]


def metric_counts(metrics: Iterable[str]) -> list[tuple[str, int]]:
    """How often each metric was chosen, the most frequent first, of equal ones by name."""
    return sorted(Counter(metrics).items(), key=lambda item: (-item[1], item[0]))


def counts_text(metrics: Iterable[str]) -> str:
    """Such as ``ria 30, wanda 12``; see `metric_counts`."""
    return ", ".join(f"{name} {count:,}" for name, count in metric_counts(metrics))


def mask_words(mask: Mask, masker: Mapping[str, Any]) -> str:
    """A few words of what a mask [n] keeps: how many units, or how many matrices have which metric.

    Args:
        masker: what its units are, as jobs spell it.
    """
    if masker.get("kind") == "metrics":
        return counts_text(chosen_metrics(mask, masker["metrics"]))
    return f"{int(mask.sum()):,} of {len(mask):,} units"


def spelled(mask: Mask, masker: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A mask as files have it beside its bits: units kept of each block and kind, or the metric of each matrix.

    Args:
        masker: what its units are, as jobs spell it.
        rows: ``name`` and ``count`` of the units of each block and kind, or of each matrix.
    """
    if masker["kind"] == "metrics":
        chosen = chosen_metrics(mask, masker["metrics"])
        return {"metrics": {row["name"]: metric for row, metric in zip(rows, chosen, strict=True)}}
    if masker["kind"] == "units":
        ends = np.cumsum([row["count"] for row in rows]).tolist()
        return {"counts": [int(mask[end - row["count"] : end].sum()) for row, end in zip(rows, ends, strict=True)]}
    return {}
