"""The model card of a pruned checkpoint: what was done, what it costs, what it does not bring."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import Shape

COLUMNS = ("perplexity", "loss", "stderr", "kl", "tokens", "window", "dtype")


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


@dataclass(frozen=True, slots=True)
class PassTimes:
    """How long a forward pass takes.

    Attributes:
        words: what it is of, for people.
        dense: nanoseconds of the model that was cut.
        cut: nanoseconds of what is left.
    """

    words: str
    dense: int
    cut: int


@dataclass(frozen=True, slots=True)
class Cut:
    """What a shape took away.

    Attributes:
        form: in which the rest is written.
        dense_parameters: of the model that it was cut from.
        times: of passes, measured in turns; none if no time was taken.
        place: where they were measured, for people.
        shape: what every block keeps.
    """

    form: str
    dense_parameters: int
    shape: Shape
    times: tuple[PassTimes, ...] = ()
    place: str = ""


@dataclass(frozen=True, slots=True)
class Loading:
    """What loads a checkpoint.

    Attributes:
        auto: name of the class in transformers.
        own_code: whether it needs the module that lies beside the weights.
        modular: whether evoprune alone loads it.
    """

    auto: str = "AutoModelForCausalLM"
    own_code: bool = False
    modular: bool = False


# What loads text beside the model, and the Hub's name of the task, by the class that loads the model.
_TEXT_ONLY = ("AutoTokenizer", "tokenizer", "text-generation")
_TASKS = {
    "AutoModelForImageTextToText": ("AutoProcessor", "processor", "image-text-to-text"),
    "AutoModelForImageClassification": ("AutoImageProcessor", "processor", "image-classification"),
}


def model_card(
    name: str,
    counts: WeightCounts,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    loading: Loading = Loading(),
    cut: Cut | None = None,
    again: bool = False,
    sparsities: bool = False,
) -> str:
    """README.md of a checkpoint.

    Args:
        name: the original model, as the user named it.
        counts: what the files hold.
        recipe: how the model was pruned.
        report: mappings in it that have a ``perplexity``, at any depth, become rows; plain values become a list.
        loading: what loads the checkpoint.
        cut: what a shape took away, if one did.
        again: whether the folder holds a recipe that makes it again.
        sparsities: whether it holds a report of what was done to each matrix.

    Raises:
        InvalidInput: rows were measured on windows of different lengths, or in different dtypes.
    """
    reader, variable, task = _TASKS.get(loading.auto, _TEXT_ONLY)
    # The tokenizer does not need it, but whoever loads it reads config.json first, and would be asked.
    trust = ", trust_remote_code=True" if loading.own_code else ""
    original = public_name(name)
    results = list(_results(report, ()))
    for what in ("window", "dtype"):
        if len(found := sorted({str(row[what]) for _, row in results if what in row})) > 1:
            raise InvalidInput(
                f"numbers were measured at {what} {' and '.join(found)}: one table holds one, so measure them alike"
            )
    facts = [(key, value) for key, value in report.items() if isinstance(value, (str, int, float))]
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {task}",
        *([f"base_model: {original}"] if "/" in original else []),
        "tags: [pruned, sparse, evoprune]",
        "---",
        "",
        f"# {original}, {_headline(counts, cut, recipe)}",
        "",
        f"Made by evoprune from `{original}`.",
        "",
        "| | weights | zeros | share |",
        "| --- | ---: | ---: | ---: |",
        f"| prunable matrices | {counts.prunable:,} | {counts.removed:,} | {_share(counts.removed, counts.prunable)} |",
        f"| whole model | {counts.parameters:,} | {counts.zeros:,} | {_share(counts.zeros, counts.parameters)} |",
        "",
        *_sizes(counts, cut),
        "",
        *_bits(recipe),
    ]
    if results:
        columns = [column for column in COLUMNS if any(row.get(column) is not None for _, row in results)]
        lines += ["## Numbers", "", f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
        lines += [
            f"| {label} | {' | '.join(_number(row.get(column)) for column in columns)} |" for label, row in results
        ]
        divergence = "; KL is from the dense to the pruned model" if "kl" in columns else ""
        lines += ["", f"Losses are in nats per token{divergence}.", ""]
    if facts:
        lines += [f"- {key}: {_number(value)}" for key, value in facts] + [""]
    if cut is not None:
        lines += ["## What every block keeps", "", *_blocks(cut.shape), ""]
    lines += [
        "## Recipe",
        "",
        "```json",
        json.dumps(_without_matrices(recipe), indent=2, sort_keys=True, ensure_ascii=False),
        "```",
        "",
        "All numbers, layer by layer, are in `evoprune.json`"
        + (", and what each layer took in `sparsity_report.json`." if sparsities else ".")
        + (_AGAIN if again else ""),
        "",
        "## Loading",
        "",
        _OWN_CODE if loading.own_code else _MODULAR if loading.modular else _PLAIN,
        "",
        "```python",
        *(
            _MODULAR_LINES
            if loading.modular
            else [
                f"from transformers import {loading.auto}, {reader}",
                "",
                f'model = {loading.auto}.from_pretrained("path/to/this/folder"{trust})',
                f'{variable} = {reader}.from_pretrained("path/to/this/folder"{trust})',
            ]
        ),
        "```",
        "",
        "The licence of the original model applies.",
    ]
    return "\n".join(lines) + "\n"


_PLAIN = "Plain transformers, and whatever else loads the original: safetensors, no remote code, no `sparsity_config`."
_OWN_CODE = (
    "evoprune as it is; transformers with the short Python file that lies beside the weights, which it runs only if "
    "you say so. The blocks differ in width: no stock class builds that, and those of the original refuse the folder."
)

_MODULAR = (
    "evoprune alone, with its own code: some layers are a sparse matrix between two block-diagonal ones, or let go of "
    "inputs near their most frequent value. `config.json` names them; no other program knows its model type. In "
    "evoprune both run as dense products, which is no faster than the original and, with wrappers, slower: they pay "
    "off with kernels for N:M matrices and for sparse vectors."
)
_AGAIN = " `evoprune prune --recipe path/to/this/folder --out DIR` makes the same weights again, by `recipe.yaml`."
_MODULAR_LINES = (
    "import evoprune",
    "",
    'loaded = evoprune.load_model("path/to/this/folder")',
    "model, tokenizer = loaded.model, loaded.tokenizer",
)


def _headline(counts: WeightCounts, cut: Cut | None, recipe: Mapping[str, Any]) -> str:
    if (allocation := _with_bits(recipe)) is not None and not allocation["sparsity"]:
        return f"rounded to {allocation['bits']['mean']:g} bits a weight"
    if cut is None or cut.form == "masked":
        return f"{counts.removed / max(counts.prunable, 1):.1%} pruned"
    return f"{1 - counts.parameters / cut.dense_parameters:.1%} smaller"


def _sizes(counts: WeightCounts, cut: Cut | None) -> list[str]:
    """Bytes, and what zeros are good for."""
    files = f"Weight files: {counts.file_bytes:,} bytes"
    if cut is None or cut.form == "masked":
        return [
            f"{files}; the dense model in the same dtype: {counts.dense_bytes:,} bytes.",
            "",
            "**Zeros alone bring no speed and save no memory.** The weights are stored dense: this checkpoint is as "
            "large and as fast as the original. Zeros pay off only in software that makes use of them.",
        ]
    padding = " Zeros fill the blocks up to one width." if cut.form == "padded" else ""
    dense_bytes = round(cut.dense_parameters * counts.dense_bytes / max(counts.parameters, 1))
    rows = [
        ("parameters", f"{cut.dense_parameters:,}", f"{counts.parameters:,}", counts.parameters / cut.dense_parameters),
        ("zeros among them", "-", f"{counts.zeros:,}", None),
        ("bytes of weights", f"{dense_bytes:,}", f"{counts.dense_bytes:,}", counts.dense_bytes / max(dense_bytes, 1)),
        *((f"ms for {row.words}", *(f"{ns / 1e6:.3f}" for ns in (row.dense, row.cut)), row.cut / max(row.dense, 1))
          for row in cut.times),
    ]  # fmt: skip
    return [
        f"{files}. Form {cut.form}.{padding}",
        "",
        "| | dense | this | ratio |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {name} | {dense} | {here} | {'-' if ratio is None else f'{ratio:.3f}'} |"
          for name, dense, here, ratio in rows),
        "",
        *([f"Times are medians of turns that both models took on {cut.place}.", ""] if cut.times else []),
        "Whole heads, neurons or blocks are gone, so the model takes less memory and does less work everywhere.",
    ]  # fmt: skip


def _bits(recipe: Mapping[str, Any]) -> list[str]:
    """How many matrices have how many bits, where an allocation says."""
    if (allocation := _with_bits(recipe)) is None:
        return []
    counts = Counter(site["bits"] for site in allocation["sites"])
    return [
        f"Weights that stay are rounded, and have at most {allocation['bits']['budget']:,} bits together (those of 16 "
        "bits are left whole). They are stored as the values of their grids in the dtype of the model: the files are "
        "no smaller. Zeros are counted with the weights that rounding made zero.",
        "",
        "| bits | matrices |",
        "| ---: | ---: |",
        *(f"| {bits} | {counts[bits]} |" for bits in sorted(counts)),
        "",
    ]


def _with_bits(recipe: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The allocation of a recipe, if it has bits."""
    allocation = recipe.get("allocation")
    return allocation if isinstance(allocation, Mapping) and "bits" in allocation else None


def _blocks(shape: Shape) -> list[str]:
    """A table of the blocks of the dense model."""
    rows = ["| block | KV groups | query heads | neurons |", "| ---: | ---: | ---: | ---: |"]
    for block, (kept, widths) in enumerate(zip(shape.blocks, shape.widths, strict=True)):
        counts = (
            (len(kept.groups), widths.groups), (len(kept.heads), widths.heads), (len(kept.neurons), widths.neurons)
        )  # fmt: skip
        cells = (f"{left:,} of {whole:,}" if left else "dropped" for left, whole in counts)
        rows.append(f"| {block} | {' | '.join(cells)} |")
    return rows


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
    """The recipe without the lines that allocations and policies have for each matrix, and a shape for each block."""
    return {
        name: {key: inner for key, inner in value.items() if key not in ("sites", "blocks")}
        if name in ("allocation", "shape", "policy") and isinstance(value, Mapping)
        else value
        for name, value in recipe.items()
    }


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.2%}"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
