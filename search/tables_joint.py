"""Results of joint searches as tables for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from evoprune.metrics.emit import to_text
from evoprune.metrics.expression import parse
from evoprune.search.calibration import calibration_options
from evoprune.search.joint_steps import FOLDER
from evoprune.search.objective_words import over_most_likely
from evoprune.search.removal import compressor_option
from evoprune.search.tables import NOT_REPRODUCIBLE, facts_table, heldout_table, plain_box, prune_ways
from evoprune.search.tables_allocation import map_table


def result_view(result: Mapping[str, Any], run: Path) -> list[RenderableType]:
    """A finished run: the table, the steps, the winning pair, and where its files are."""
    best = result["best"]
    numerics = {} if result.get("bit_reproducible", True) else {"numerics": Text(NOT_REPRODUCIBLE, style="yellow")}
    winner = facts_table(
        {
            "winner": f"round {best['round']} of {result['rounds']}",
            "metric": Text(best["expression"], style="bold green"),
            "formula": Text(to_text(parse(best["expression"]))),
            "fitness": f"KL {best['fitness']:.5f}{over_most_likely(result.get('top_k'))} on {result['final_tokens']:,} "
            "tokens of text B, least of all rounds",
            "removed": f"{best['removed']:,} of {result['prunable']:,} prunable weights "
            f"({best['removed'] / result['prunable']:.3%})",
            "search": f"{result['evaluations']} evaluations in {len(result['steps'])} steps, seed {result['seed']}",
            **numerics,
        }
    )
    steps = plain_box("step", "evaluations", "KL on text B")
    for column in steps.columns[1:]:
        column.justify = "right"
    for step in result["steps"]:
        steps.add_row(f"{FOLDER}/{step['step']}", f"{step['evaluations']:,}", f"{step['fitness']:.5f}")
    shown: list[RenderableType] = [Padding(heldout_table(result), (1, 0, 1, 0))]
    if (table := map_table(best["allocation"])) is not None:
        shown.append(Padding(table, (0, 0, 1, 0)))
    return [*shown, Padding(steps, (0, 0, 1, 0)), winner, Text(), *_ways_on(result, run)]


def prune_command(result: Mapping[str, Any], run: Path) -> str:
    """The command that prunes a model with both winners."""
    metric, allocation = (shlex.quote(str(run / "export" / name)) for name in ("metric.json", "allocation.json"))
    model = shlex.quote(result["model"])
    options, inside = calibration_options(result["calibration"], result["seed"]), compressor_option(result)
    return f"evoprune prune {model} --metric {metric} --allocation {allocation}{inside} --out DIR{options}"


def _ways_on(result: Mapping[str, Any], run: Path) -> list[Text]:
    """Where the files are, and commands to copy; one line each, however long."""
    quoted, page = shlex.quote(str(run)), run / "report.html"
    ways = {
        "files": str(run / "export"),
        "report": str(page) if page.exists() else f"evoprune report {quoted}",
        "show": f"evoprune show {quoted}",
        "a step": f"evoprune show {shlex.quote(str(run / FOLDER / result['steps'][0]['step']))}",
        **prune_ways(result, prune_command(result, run)),
    }
    return [Text.assemble((f"{name:<10}", "dim"), way) for name, way in ways.items()]
