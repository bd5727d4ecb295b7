"""Results of allocation searches as tables for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evoprune.search.calibration import calibration_options
from evoprune.search.objective_words import over_most_likely
from evoprune.search.removal import PLAIN, removal_options
from evoprune.search.result import closed_gap
from evoprune.search.site_names import grid
from evoprune.search.tables import NOT_REPRODUCIBLE, facts_table, heldout_table, plain_box, prune_ways

WIDEST = 16
"""Blocks in the map on a terminal; the report's has no limit."""


def result_view(result: Mapping[str, Any], run: Path) -> list[RenderableType]:
    """A finished run: the table, the winner, how it was found, and where its files are."""
    best = result["best"]
    closed = closed_gap(result)
    gap = {} if closed is None else {"gap": f"{closed:.0%} of the loss between uniform and dense is won back"}
    numerics = {} if result.get("bit_reproducible", True) else {"numerics": Text(NOT_REPRODUCIBLE, style="yellow")}
    winner = facts_table(
        {
            "fitness": f"KL {best['fitness']:.5f}{over_most_likely(result.get('top_k'))} on {result['final_tokens']:,} "
            "tokens of text B",
            "removed": f"{best['removed']:,} of {result['prunable']:,} prunable weights "
            f"({best['removed'] / result['prunable']:.3%})",
            "found": f"generation {best['generation']} of {result['generations']} ({best['origin']})",
            "search": f"{result['evaluations']} evaluations, seed {result['seed']}",
            **gap,
            **_formula(result),
            **numerics,
        }
    )
    shown = [Padding(heldout_table(result), (1, 0, 1, 0))]
    if (table := map_table(best["allocation"])) is not None:
        shown.append(Padding(table, (0, 0, 1, 0)))
    return [*shown, winner, Text(), *ways_on(result, run)]


def _formula(result: Mapping[str, Any]) -> dict[str, str]:
    """What is said of the best formula, where formulas were searched."""
    found = result.get("formula")
    if found is None:
        return {}
    said = {"formula": found["text"], **{f"  {name}": what for name, what in found["reads"].items()}}
    if not found["wins"]:
        behind = found["winner_minus_this"]
        said["beside"] = (
            f"no formula won: the best one has KL {found['fitness']:.5f} on the same text, and a held-out loss of "
            f"{found['heldout']['loss']:.4f}, {-behind['loss']:+.4f} ± {behind['stderr']:.4f} to the winner's"
        )
    return said


def map_table(allocation: Mapping[str, float]) -> Table | None:
    """Sparsity in per cent by kind of matrix and block; None for models with more than `WIDEST` blocks."""
    kinds, blocks, cells = grid(allocation)
    if len(blocks) > WIDEST:
        return None
    table = plain_box("sparsity in %, by block", *(str(block) for block in blocks))
    for column in table.columns[1:]:
        column.justify = "right"
    for kind in kinds:
        row = []
        for block in blocks:
            sparsity = cells.get((kind, block))
            shade = "" if sparsity is None else "bold" if sparsity < 0.4 else "dim" if sparsity > 0.8 else ""
            row.append(Text("" if sparsity is None else f"{100 * sparsity:.0f}", style=shade))
        table.add_row(kind, *row)
    return table


def ways_on(result: Mapping[str, Any], run: Path) -> list[Text]:
    """Where the files are, and commands to copy; one line each, however long."""
    inside = removal_options(result["metric"], result.get("compressor", PLAIN))
    quoted, file, page = shlex.quote(str(run)), run / "export" / "allocation.json", run / "report.html"
    ways = {
        "json": str(file),
        "report": str(page) if page.exists() else f"evoprune report {quoted}",
        "show": f"evoprune show {quoted}",
        "go on": f"evoprune resume {quoted} --fork --set evaluations={2 * result['evaluations']}",
        **prune_ways(
            result,
            f"evoprune prune {shlex.quote(result['model'])} {inside} --allocation {shlex.quote(str(file))} "
            f"--out DIR{calibration_options(result['calibration'], result['seed'])}",
        ),
    }
    if "formula" in result:
        formula = file.with_name("formula.json")
        ways["python"] = str(file.with_suffix(".py"))
        ways["elsewhere"] = (
            f"evoprune prune OTHER_MODEL --metric {shlex.quote(result['metric'])} --allocation "
            f"{shlex.quote(str(formula))} --sparsity {result['target']} --out DIR"
        )
    return [Text.assemble((f"{name:<10}", "dim"), way) for name, way in ways.items()]
