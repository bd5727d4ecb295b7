"""What `evoprune eval` measured, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from evoprune.search.result import measured_on
from evoprune.search.tables import facts_table, plain_box


def evaluation_table(document: Mapping[str, Any], stderr: float | None, dense: str | None) -> Table:
    """What `eval` measured.

    Args:
        document: as `eval --json` prints it.
        stderr: of the loss.
        dense: name of the model that the KL divergence is from.
    """
    facts: dict[str, RenderableType] = {
        "model": document["model"],
        "perplexity": Text(f"{document['perplexity']:,.4f}", style="bold"),
        "loss": f"{document['loss']:.5f}{'' if stderr is None else f' ± {stderr:.5f}'} nats per token",
    }
    if document["kl"] is not None:
        facts["KL"] = f"{document['kl']:.5f} nats per token from {dense}"
    facts["sparsity"] = f"{document['sparsity']:.4%} of the prunable weights are zero"
    facts["text"] = f"{document['data']} (text C), {document['tokens']:,} predicted tokens, {measured_on(document)}"
    return facts_table(facts)


def tasks_table(document: Mapping[str, Any]) -> Table:
    """Scores of tasks, beside those of the dense model if there are any.

    Args:
        document: as `eval --json` prints it.
    """
    dense = document.get("dense_tasks")
    table = plain_box("task", "metric", "value", *(["dense"] if dense else []))
    for name, scores in document["tasks"].items():
        for metric, score in scores.items():
            beside = [_with_error(dense.get(name, {}).get(metric))] if dense else []
            table.add_row(name, metric, _with_error(score), *beside)
    return table


def samples_table(document: Mapping[str, Any]) -> Table:
    """How models go on with the same words, the dense model's text beside the other.

    Args:
        document: as `eval --json` prints it.
    """
    dense = any(sample["dense"] is not None for sample in document["samples"])
    table = plain_box("prompt", *(["dense"] if dense else []), "continuation")
    for sample in document["samples"]:
        texts = [sample["dense"]] * dense + [sample["continuation"]]
        table.add_row(Text(sample["prompt"], style="dim"), *(Text(text) for text in texts), end_section=True)
    return table


def _with_error(score: Mapping[str, float | None] | None) -> str:
    if score is None or score["value"] is None:
        return ""
    return f"{score['value']:.4f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.4f}")
