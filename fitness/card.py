"""The model card of a pruned checkpoint: what was done, what it costs, what it does not bring."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("perplexity", "loss", "stderr", "kl", "tokens")


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """What is in the files, counted.

    Attributes:
        prunable: weights in the prunable matrices.
        removed: zeros among them.
        parameters: parameters of the whole model, tied ones once.
        zeros: zeros among them.
        dense_bytes: size of all parameters in the dtype of the files, zeros included.
        file_bytes: size of the weight files.
    """

    prunable: int
    removed: int
    parameters: int
    zeros: int
    dense_bytes: int
    file_bytes: int


# What loads text beside the model, and the Hub's name of the task, by the class that loads the model.
_TEXT_ONLY = ("AutoTokenizer", "tokenizer", "text-generation")
_TASKS = {"AutoModelForImageTextToText": ("AutoProcessor", "processor", "image-text-to-text")}


def model_card(
    name: str,
    counts: WeightCounts,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    loader: str = "AutoModelForCausalLM",
) -> str:
    """README.md of a checkpoint.

    Args:
        name: the original model, as the user named it.
        counts: what the files hold.
        recipe: how the model was pruned.
        report: mappings in it that have a ``perplexity``, at any depth, become rows; plain values become a list.
        loader: name of the class in transformers that loads the checkpoint.
    """
    reader, variable, task = _TASKS.get(loader, _TEXT_ONLY)
    original = public_name(name)
    results = list(_results(report, ()))
    facts = [(key, value) for key, value in report.items() if isinstance(value, (str, int, float))]
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {task}",
        *([f"base_model: {original}"] if "/" in original else []),
        "tags: [pruned, sparse, evoprune]",
        "---",
        "",
        f"# {original}, {counts.removed / max(counts.prunable, 1):.1%} pruned",
        "",
        f"Made by evoprune from `{original}`.",
        "",
        "| | weights | zeros | share |",
        "| --- | ---: | ---: | ---: |",
        f"| prunable matrices | {counts.prunable:,} | {counts.removed:,} | {_share(counts.removed, counts.prunable)} |",
        f"| whole model | {counts.parameters:,} | {counts.zeros:,} | {_share(counts.zeros, counts.parameters)} |",
        "",
        f"Weight files: {counts.file_bytes:,} bytes; the dense model in the same dtype: {counts.dense_bytes:,} bytes.",
        "",
        "**Zeros alone bring no speed and save no memory.** The weights are stored dense: this checkpoint is as large "
        "and as fast as the original. Zeros pay off only in software that makes use of them.",
        "",
    ]
    if results:
        lines += ["## Numbers", "", f"| | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS)]
        lines += [
            f"| {label} | {' | '.join(_number(row.get(column)) for column in COLUMNS)} |" for label, row in results
        ]
        lines += ["", "Loss and KL are in nats per token; KL is from the dense to the pruned model.", ""]
    if facts:
        lines += [f"- {key}: {_number(value)}" for key, value in facts] + [""]
    lines += [
        "## Recipe",
        "",
        "```json",
        json.dumps(_without_matrices(recipe), indent=2, sort_keys=True, ensure_ascii=False),
        "```",
        "",
        "All numbers, layer by layer, are in `evoprune.json`.",
        "",
        "## Loading",
        "",
        "Plain transformers, and whatever else loads the original: safetensors, no remote code, no `sparsity_config`.",
        "",
        "```python",
        f"from transformers import {loader}, {reader}",
        "",
        f'model = {loader}.from_pretrained("path/to/this/folder")',
        f'{variable} = {reader}.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "The licence of the original model applies.",
    ]
    return "\n".join(lines) + "\n"


def public_name(name: str) -> str:
    """A model's Hub id as it is, a local folder by its last part: nobody else's business where it lies."""
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
    return name if on_hub else Path(name).name


def _results(report: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(label, held-out result) for every mapping with a perplexity, labelled by its path in the report."""
    if "perplexity" in report and path:
        yield " ".join(path), report
        return
    for key, value in report.items():
        if isinstance(value, Mapping):
            yield from _results(value, (*path, str(key)))


def _without_matrices(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the hundreds of lines that an allocation has, one for each matrix."""
    allocation = recipe.get("allocation")
    if not isinstance(allocation, Mapping):
        return dict(recipe)
    return {**recipe, "allocation": {key: value for key, value in allocation.items() if key != "sites"}}


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.2%}"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
