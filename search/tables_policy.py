"""Results of policy searches as tables for people."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evoprune.search.mask_words import counts_text, metric_counts
from evoprune.search.objective_words import over_most_likely
from evoprune.search.spaces.structure import shape_text
from evoprune.search.tables import COUNTED, NOT_REPRODUCIBLE, facts_table, heldout_table, plain_box

if TYPE_CHECKING:
    from evoprune.search.config_policy import PolicySearchConfig


def policy_text(best: Mapping[str, Any]) -> str:
    """A few words of what a mask keeps."""
    if best.get("shape") is not None:
        return shape_text(best["shape"])
    policy = best["policy"]
    if "metrics" in policy:
        return counts_text(policy["metrics"].values())
    kept = bytes.fromhex(policy["kept"])
    return f"{sum(byte.bit_count() for byte in kept):,} units"


def result_view(result: Mapping[str, Any], run: Path) -> list[RenderableType]:
    """A finished run: the table, the winner in a table, how it was found, and where its files are."""
    best = result["best"]
    numerics = {} if result.get("bit_reproducible", True) else {"numerics": Text(NOT_REPRODUCIBLE, style="yellow")}
    facts = facts_table(
        {
            "fitness": f"{best['fitness']:.5f} ({result['objective']}{over_most_likely(result.get('top_k'))} on "
            f"{result['final_tokens']:,} tokens of text B)",
            "keeps": policy_text(best),
            **({"removed": removed_text(result)} if "sparsity" not in best else {}),
            "found": found_text(result),
            "search": f"{result['evaluations']} evaluations of {result['distinct']} masks, {result['samples']} a step "
            f"on {result['batch_tokens']:,} tokens, seed {result['seed']}",
            **numerics,
        }
    )
    parts = [Padding(heldout_table(result), (1, 0, 1, 0))]
    if (table := units_table(result) or metrics_table(result)) is not None:
        parts.append(Padding(table, (0, 0, 1, 0)))
    return [*parts, facts, Text(), *ways_on(result, run)]


def unfinished_facts(
    config: PolicySearchConfig, document: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> dict[str, RenderableType]:
    """When the best mask was the policy's mode, and the losses of the last step; see `Kind.unfinished_facts`."""
    facts: dict[str, RenderableType] = {}
    if (best := document["best"]) is not None:
        facts["from"] = f"after {best['step']:,} steps" if best["step"] else "before the first step"
    last = next((line for line in reversed(history) if line["stage"] == "step" and "policy" in line), None)
    if last is None:
        return facts
    note = last["policy"]
    if note.get("loss") is not None:
        spread = "" if note.get("loss_std") is None else f" ± {note['loss_std']:.4f}"
        tokens = config.searcher.batch * config.data.window
        losses = f"{note['loss']:.4f}{spread} ({config.objective}{over_most_likely(config.top_k)} on {tokens:,} tokens)"
        facts["last step"] = f"number {last['step'] + 1:,}, mean loss of its masks {losses}"
    if note.get("undecided") is not None:
        facts["undecided"] = f"{note['undecided']:.0%} of the units that may go (keep probability from 0.05 to 0.95)"
    return facts


def found_text(result: Mapping[str, Any]) -> str:
    """When the winner was the policy's mode; of one from before the first step, what it is called in the table."""
    step = result["best"]["step"]
    if step:
        return f"after {step:,} of {result['steps']:,} steps"
    same = [row["name"] for row in result["baselines"] if not any(row["winner_minus_this"].values())]
    return f"before the first step, as {' and '.join(same)}" if same else "before the first step"


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


def metrics_table(result: Mapping[str, Any]) -> Table | None:
    """How many matrices of every kind have each metric, the most frequent first; None where units are masked."""
    chosen = result["best"]["policy"].get("metrics")
    if chosen is None:
        return None
    kinds = list(dict.fromkeys(row["kind"] for row in result["units"]["rows"]))
    counts = Counter((row["kind"], chosen[row["name"]]) for row in result["units"]["rows"])
    metrics = [name for name, _ in metric_counts(chosen.values())]
    table = plain_box("kind of matrix", *metrics)
    for kind in kinds:
        cells = [counts[kind, metric] for metric in metrics]
        table.add_row(kind, *(Text(f"{count:,}" if count else "–", style="" if count else "dim") for count in cells))
    totals = [sum(counts[kind, metric] for kind in kinds) for metric in metrics]
    table.add_section()
    table.add_row("all", *(Text(f"{total:,}", style="bold") for total in totals))
    for column in table.columns[1:]:
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
