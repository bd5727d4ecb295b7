"""Results of structure searches as tables for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evoprune.fitness.latency_passes import Work
from evoprune.fitness.part_merges import read_block
from evoprune.search.objective_words import over_most_likely
from evoprune.search.replaying import REFIT_OPTION
from evoprune.search.spaces.structure import shape_text
from evoprune.search.tables import (
    COUNTED,
    NOT_REPRODUCIBLE,
    facts_table,
    heldout_table,
    plain_box,
    recovery_lines,
    removed_words,
)


def result_view(result: Mapping[str, Any], run: Path) -> list[RenderableType]:
    """A finished run: the table, the winner block by block, how it was found, and where its files are."""
    best = result["best"]
    numerics = {} if result.get("bit_reproducible", True) else {"numerics": Text(NOT_REPRODUCIBLE, style="yellow")}
    left = best["cost"] + result["rest_cost"]
    unit = "nanoseconds" if result["cost"] == "latency" else result["cost"]
    facts = facts_table(
        {
            "fitness": f"KL {best['fitness']:.5f}{over_most_likely(result.get('top_k'))} on {result['final_tokens']:,} "
            "tokens of text B",
            "keeps": f"{shape_text(best['shape'])}: {best['cost']:,} of {result['dense_cost']:,} {unit} of "
            f"heads and MLPs ({best['cost'] / result['dense_cost']:.2%}), {left:,} in the whole model",
            "removed": removed_text(result),
            **({"latency": latency_text(result["latency"])} if "latency" in result else {}),
            "found": f"generation {best['generation']} of {result['generations']} ({best['origin']})",
            "search": f"{result['evaluations']} evaluations, seed {result['seed']}",
            **({"selection": selection_text(result)} if "recovered" in result else {}),
            **numerics,
        }
    )
    blocks = Padding(blocks_table(best["shape"], result["widths"]), (0, 0, 1, 0))
    return [Padding(heldout_table(result), (1, 0, 1, 0)), blocks, facts, Text(), *ways_on(result, run)]


def selection_text(result: Mapping[str, Any]) -> str:
    """What candidates went through before the last stage measured them, and how many did."""
    recovered, best = result["recovered"], result["best"]
    if "tokens" not in recovered:
        return f"fitness is after a path refit, of {recovered['candidates']:,} candidates; so are the held-out rows"
    told = (
        f"fitness is after training on {recovered['tokens_each']:,} tokens, of {recovered['candidates']:,} candidates "
        f"({recovered['tokens']:,} tokens in all); the held-out rows are without it"
    )
    if "trained" not in best:
        return told
    return f"{told}, and with it the winner's KL is {best['trained']['kl']:.4f} and not {best['heldout']['kl']:.4f}"


def removed_text(result: Mapping[str, Any]) -> str:
    """What is gone of the cost of heads and MLPs, beside what was asked for: where units are few, it is more."""
    removed = 1 - result["best"]["cost"] / result["dense_cost"]
    asked = float(result["target"])
    return f"{removed:.3%} of the {COUNTED[result['cost']]} of heads and MLPs, where {asked:.3%} was asked for"


def latency_text(latency: Mapping[str, Any]) -> str:
    """What the winner takes, end to end, and how far that is from the sum of its parts."""
    measured, predicted = latency["measured"], latency["predicted"]
    work = Work(latency["batch"], latency["sequence"], latency["decode"])
    return (
        f"{measured['winner'] / 1e6:.4g} ms against {measured['dense'] / 1e6:.4g} ms measured end to end, a speedup of "
        f"{measured['speedup']:.3g}; predicted {predicted['winner'] / 1e6:.4g} ms and {predicted['speedup']:.3g} "
        f"(gap {latency['gap']:+.1%}); {work.words}, {latency['device']}"
    )


def cut_view(document: Mapping[str, Any]) -> Group:
    """What `prune` left of a model, block by block.

    Args:
        document: as `prune --json` prints it with a shape or a method.
    """
    size = f"{document['form']}: {document['parameters']:,} of {document['dense_parameters']:,} parameters"
    times = [f"{row['pass']}: {row['cut']:.3f} ms, dense {row['dense']:.3f} ms" for row in document["milliseconds"]]
    lines = Text("\n".join([f"{removed_words(document)}; {size}", *times]))
    said = [*_refit_lines(document.get("refit")), *recovery_lines(document["recovery"])]
    return Group(blocks_table(document["shape"], document["widths"]), lines, *said)


def _refit_lines(refit: Mapping[str, Any] | None) -> Iterator[Text]:
    """What refitted output matrices brought, on held-out text."""
    if refit is not None:
        before, after = refit["before"], refit["after"]
        yield Text(
            f"{refit['method']}: on {after['tokens']:,} predicted tokens of held-out text loss {before['loss']:.4f} "
            f"before, {after['loss']:.4f} after"
        )


def blocks_table(shape: Sequence[Sequence[int]], widths: Sequence[Sequence[int]]) -> Table:
    """What every block keeps.

    Args:
        shape: of each block KV groups, query heads in each, and neurons; see `evoprune.fitness.part_merges.read_block`.
        widths: what the dense block has: KV groups, query heads in all of them, neurons.
    """
    table = plain_box("block", "KV groups", "query heads", "neurons")
    rows = zip(shape, widths, strict=True)
    for block, (spelled, (all_groups, heads, all_neurons)) in enumerate(rows):
        (groups, each, neurons), merged = read_block(spelled)
        attention = [_share(groups, all_groups), _share(groups * each, heads)]
        table.add_row(
            str(block),
            *([Text("merged")] * 2 if merged[0] else attention),
            Text("merged") if merged[1] else _share(neurons, all_neurons),
        )
    for column in table.columns:
        column.justify = "right"
    return table


def _share(kept: int, count: int) -> Text:
    style = "dim" if kept == count else "bold" if not kept else ""
    return Text(f"{kept:,} of {count:,}" if kept else "dropped", style=style)


def ways_on(result: Mapping[str, Any], run: Path) -> list[Text]:
    """Where the files are, and commands to copy; one line each, however long."""
    quoted, file = shlex.quote(str(run)), run / "export" / "shape.json"
    prune = f"evoprune prune {shlex.quote(result['model'])} --shape {shlex.quote(str(file))}"
    refitted = result["best"].get("refitted") is not None
    ways = {
        "json": str(file),
        "report": f"evoprune report {quoted}",
        "show": f"evoprune show {quoted}",
        "go on": f"evoprune resume {quoted} --fork --set evaluations={2 * result['evaluations']}",
        "prune": f"{prune} --out DIR",
        **({"refit": f"{prune}{REFIT_OPTION} --out DIR"} if refitted else {}),
    }
    return [Text.assemble((f"{name:<10}", "dim"), way) for name, way in ways.items()]
