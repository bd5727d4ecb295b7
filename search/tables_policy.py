"""Results of policy searches as tables for people."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evoprune.search.spaces.structure import shape_text
from evoprune.search.tables import COUNTED, NOT_REPRODUCIBLE, facts_table, heldout_table, plain_box


def policy_text(best: Mapping[str, Any]) -> str:
    """A few words of what a mask keeps."""
    if best.get("shape") is not None:
        return shape_text(best["shape"])
    policy = best["policy"]
    if "metrics" in policy:
        counts = Counter(policy["metrics"].values())
        return ", ".join(f"{name} {count}" for name, count in counts.most_common())
    kept = bytes.fromhex(policy["kept"])
    return f"{sum(byte.bit_count() for byte in kept):,} units"


def result_view(result: Mapping[str, Any], run: Path) -> list[RenderableType]:
    """A finished run: the table, the winner block by block, how it was found, and where its files are."""
    best = result["best"]
    numerics = {} if result.get("bit_reproducible", True) else {"numerics": Text(NOT_REPRODUCIBLE, style="yellow")}
    found = f"before step {best['step'] + 1} of {result['steps']}" if best["step"] else "the initialisation"
    facts = facts_table(
        {
            "fitness": f"{best['fitness']:.5f} ({result['objective']} on {result['final_tokens']:,} tokens of text B)",
            "keeps": policy_text(best),
            **({"removed": removed_text(result)} if "sparsity" not in best else {}),
            "found": found,
            "search": f"{result['evaluations']} evaluations of {result['distinct']} masks, {result['samples']} a step "
            f"on {result['batch_tokens']:,} tokens, seed {result['seed']}",
            **numerics,
        }
    )
    parts = [Padding(heldout_table(result), (1, 0, 1, 0))]
    if (table := units_table(result)) is not None:
        parts.append(Padding(table, (0, 0, 1, 0)))
    return [*parts, facts, Text(), *ways_on(result, run)]


def removed_text(result: Mapping[str, Any]) -> str:
    """What is gone, beside what was asked for."""
    removed = result["best"]["removed"] / result["dense_cost"]
    if "pattern" in result["masker"]:
        return f"{removed:.3%} of the weights of matrices, {result['target']}"
    asked = float(result["target"])
    return f"{removed:.3%} of the {COUNTED[result['cost']]} of heads and MLPs, where {asked:.3%} was asked for"


def units_table(result: Mapping[str, Any]) -> Table | None:
    """Units kept of every kind in every block; None where matrices are masked."""
    counts = result["best"]["policy"].get("counts")
    if counts is None:
        return None
    rows = result["units"]["rows"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    blocks: dict[int, dict[str, Text]] = {}
    for row, kept in zip(rows, counts, strict=True):
        style = "dim" if kept == row["count"] else "bold" if not kept else ""
        text = f"{kept:,} of {row['count']:,}" if kept else "none"
        blocks.setdefault(row["block"], {})[row["kind"]] = Text(text, style=style)
    table = plain_box("block", *kinds)
    for block, cells in blocks.items():
        table.add_row(str(block), *(cells.get(kind, Text()) for kind in kinds))
    for column in table.columns:
        column.justify = "right"
    return table


def ways_on(result: Mapping[str, Any], run: Path) -> list[Text]:
    """Where the files are, and commands to copy; one line each, however long."""
    quoted, file = shlex.quote(str(run)), run / "export" / "policy.json"
    ways = {
        "json": str(file),
        "report": f"evoprune report {quoted}",
        "show": f"evoprune show {quoted}",
        "go on": f"evoprune resume {quoted} --fork --set evaluations={2 * result['evaluations']}",
        "prune": f"evoprune prune {shlex.quote(result['model'])} --policy {shlex.quote(str(file))} --out DIR",
    }
    return [Text.assemble((f"{name:<10}", "dim"), way) for name, way in ways.items()]
