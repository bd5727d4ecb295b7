"""Results of searches for a front as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evoprune.search.result import measured_on
from evoprune.search.spaces.levels import reference_name
from evoprune.search.tables import NOT_REPRODUCIBLE, facts_table, plain_box, target_text
from evoprune.search.tables_allocation import ways_on

WHAT_IS_SAVED = {
    "parameters": "prunable weights that are gone",
    "flops": "multiply-adds of the prunable matrices and of attention; dense kernels save none for single zeros",
    "latency": "time of a forward pass, as the sum of its parts measured on the machine of the search",
}


def front_head(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the columns of `front_rows`."""
    reference = f"minus {reference_name(result['drop_only'])}'s"
    return "saved", *_end_to_end_head(result), "sparsity", "perplexity", "loss", "KL", reference


def front_table(result: Mapping[str, Any]) -> Table:
    """The front on held-out text, the dearest first."""
    table = plain_box(*front_head(result))
    table.title = f"{result['model']}, {target_text(result)}, held-out text"
    table.title_style, table.title_justify = "bold", "left"
    table.caption, table.caption_justify = front_caption(result), "left"
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for row, *cells in front_rows(result):
        chosen = row is not None and row["saved"] == result["best"]["saved"]
        table.add_row(*cells, style="dim" if row is None else "bold green" if chosen else "")
    return table


def front_rows(result: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The dense model, then the members on held-out text: their part of the result (None for dense), and cells."""
    dense = result["dense"]["heldout"]
    yield (
        None,
        "dense",
        *_end_to_end(result, None),
        "",
        f"{dense['perplexity']:,.2f}",
        f"{dense['loss']:.4f} ± {dense['stderr']:.4f}",
        "",
        "",
    )
    for row in measured(result):
        heldout, reference = row["heldout"], row[reference_name(result["drop_only"])]
        beside = None if reference is None else reference["member_minus_this"]
        yield (
            row,
            f"{row['saved']}%",
            *_end_to_end(result, row),
            f"{row['sparsity']:.1%}",
            f"{heldout['perplexity']:,.2f}",
            f"{heldout['loss']:.4f} ± {heldout['stderr']:.4f}",
            f"{heldout['kl']:.4f}",
            "" if beside is None else f"{beside['loss']:+.4f} ± {beside['stderr']:.4f}",
        )


def _end_to_end_head(result: Mapping[str, Any]) -> tuple[str, ...]:
    return ("ms",) if "measured" in result["pareto"] else ()


def _end_to_end(result: Mapping[str, Any], row: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The milliseconds that the whole model took, as a cell, where they were measured; None is the dense model."""
    if "measured" not in result["pareto"]:
        return ()
    times = result["pareto"]["measured"]
    taken = times["dense"] if row is None else times["front"][result["front"].index(row)]
    return (f"{taken / 1e6:.2f}",)


def measured(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Members of the front that were measured on held-out text."""
    return [row for row in result["front"] if row["heldout"] is not None]


def front_caption(result: Mapping[str, Any]) -> str:
    """What the numbers of `front_rows` are."""
    members, shown = len(result["front"]), len(measured(result))
    others = f" {members - shown} more members have a fitness only." if members > shown else ""
    return (
        f"Saved: {WHAT_IS_SAVED[result['pareto']['cost']]}"
        f"{'; ms: the whole model without them, measured at the end' if _end_to_end_head(result) else ''}. "
        f"{result['dense']['heldout']['tokens']:,} predicted tokens of {result['data']} (text C), "
        f"{measured_on(result)}. Loss and KL from the dense model in nats per token, ± standard error over windows. "
        f"The last column is the loss minus that of {beside(result['drop_only'])} at the same cost, ± paired standard "
        f"error.{others}"
    )


def result_view(result: Mapping[str, Any], run: Path) -> list[RenderableType]:
    """A finished run: the front, its member that is exported as the allocation, and where the files are."""
    best = result["best"]
    numerics = {} if result.get("bit_reproducible", True) else {"numerics": Text(NOT_REPRODUCIBLE, style="yellow")}
    facts: dict[str, RenderableType] = {
        "front": f"{len(result['front'])} allocations, {span(result)}",
        "allocation": f"the one nearest to a sparsity of {result['target']}: {best['removed']:,} of "
        f"{result['prunable']:,} prunable weights ({best['sparsity']:.3%})",
        "fitness": f"KL {best['fitness']:.5f} on {result['final_tokens']:,} tokens of text B",
        "search": f"{result['evaluations']} evaluations in {result['generations']} generations, seed {result['seed']}",
        **numerics,
    }
    files = Text.assemble(
        (f"{'files':<10}", "dim"), str(run / "export" / "front" / f"{best['saved']}.json"), " and so on"
    )
    return [Padding(front_table(result), (1, 0, 1, 0)), facts_table(facts), Text(), files, *ways_on(result, run)]


def beside(drop_only: bool) -> str:
    """What members of a front are compared with: where parts go as a whole, there is no uniform sparsity."""
    return "parts dropped at random" if drop_only else "uniform sparsity"


def span(result: Mapping[str, Any]) -> str:
    """Such as ``saving 40 % to 70 % of the weights``."""
    first, last = result["front"][0]["saved"], result["front"][-1]["saved"]
    return f"saving {first}% to {last}% of the {result['pareto']['cost']}"
