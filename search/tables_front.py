"""Results of searches for a front as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evoprune.search import tables_allocation, tables_structure
from evoprune.search.kinds import kind_of
from evoprune.search.objective_words import over_most_likely
from evoprune.search.result import measured_on, member_name
from evoprune.search.spaces.levels import reference_name
from evoprune.search.spaces.structure import shape_text
from evoprune.search.tables import COUNTED, NOT_REPRODUCIBLE, facts_table, plain_box, target_text

_OF_ALLOCATIONS = {
    "parameters": "prunable weights that are gone",
    "flops": "multiply-adds of the prunable matrices and of attention; dense kernels save none for single zeros",
    "latency": "time of a forward pass, as the sum of its parts measured on the machine of the search",
}


def what_is_saved(kind: str, cost: str) -> str:
    """What the first cost of a front is of, in words.

    Args:
        kind: of the search.
    """
    return _OF_ALLOCATIONS[cost] if kind == "allocation" else f"{COUNTED[cost]} of heads and MLPs that are gone"


def front_head(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the columns of `front_rows`."""
    what: tuple[str, ...] = ("sparsity",)
    if result["kind"] == "structure":
        what = () if _time_head(result) else ("heads", "neurons")  # more columns than a terminal has room for
    reference = f"minus {_reference(result)}'s"
    return "saved", *_time_head(result), *_end_to_end_head(result), *what, "perplexity", "loss", "KL", reference


def front_table(result: Mapping[str, Any]) -> Table:
    """The front on held-out text, the dearest first."""
    table = plain_box(*front_head(result))
    table.title = f"{result['model']}, {target_text(result)}, held-out text"
    table.title_style, table.title_justify = "bold", "left"
    table.caption, table.caption_justify = front_caption(result), "left"
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for row, *cells in front_rows(result):
        chosen = row is not None and row == result["best"]
        table.add_row(*cells, style="dim" if row is None else "bold green" if chosen else "")
    return table


def front_rows(result: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The dense model, then the members on held-out text: their part of the result (None for dense), and cells."""
    dense = result["dense"]["heldout"]
    yield (
        None,
        "dense",
        *("" for _ in _time_head(result)),
        *_end_to_end(result, None),
        *_what(result, None),
        f"{dense['perplexity']:,.2f}",
        f"{dense['loss']:.4f}",
        "",
        "",
    )
    for row in measured(result):
        heldout, reference = row["heldout"], row[_reference(result)]
        beside = None if reference is None else reference["member_minus_this"]
        yield (
            row,
            f"{row['saved']}%",
            *(f"{percent}%" for percent in member_name(row).split("-")[1:]),
            *_end_to_end(result, row),
            *_what(result, row),
            f"{heldout['perplexity']:,.2f}",
            f"{heldout['loss']:.4f}",
            f"{heldout['kl']:.4f}",
            "" if beside is None else f"{beside['loss']:+.4f} ± {beside['stderr']:.4f}",
        )


def _reference(result: Mapping[str, Any]) -> str:
    """What members are compared with, by name."""
    return reference_name(result.get("drop_only", False))


def _what(result: Mapping[str, Any], row: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What a member loses or keeps, as cells; None is the dense model."""
    if result["kind"] != "structure":
        return ("" if row is None else f"{row['sparsity']:.1%}",)
    if _time_head(result):
        return ()
    shape = [(1, *kept) for _, *kept in result["widths"]] if row is None else row["shape"]
    heads = sum(groups * each for groups, each, _ in shape)
    return f"{heads:,}", f"{sum(neurons for _, _, neurons in shape):,}"


def _time_head(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the time that is saved beside the first cost, where it is a cost of its own."""
    return ("time",) if "others" in result["pareto"] else ()


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
    reference = beside(result["kind"], result.get("drop_only", False))
    times = "; time: what is saved of that of a forward pass, as the sum of parts" if _time_head(result) else ""
    return (
        f"Saved: {what_is_saved(result['kind'], result['pareto']['cost'])}{times}"
        f"{'; ms: the whole model without them, measured at the end' if _end_to_end_head(result) else ''}. "
        f"{result['dense']['heldout']['tokens']:,} predicted tokens of {result['data']} (text C), "
        f"{measured_on(result)}. Loss and KL from the dense model in nats per token. "
        f"The last column is the loss minus that of {reference} at the same cost, ± paired standard error over windows."
        f"{others}"
    )


def result_view(result: Mapping[str, Any], run: Path) -> list[RenderableType]:
    """A finished run: the front, its member that is exported as the winner, and where the files are."""
    best, winner = result["best"], kind_of(result["kind"]).winner
    whole, of = result.get("prunable"), "prunable weights"
    if result["kind"] == "structure":
        whole = result["dense_cost"]
        of = f"{COUNTED[result['cost']]} of heads and MLPs; keeps {shape_text(best['shape'])}"
    numerics = {} if result.get("bit_reproducible", True) else {"numerics": Text(NOT_REPRODUCIBLE, style="yellow")}
    facts: dict[str, RenderableType] = {
        "front": f"{len(result['front'])} {winner}s, {span(result)}",
        winner: f"the one nearest to a sparsity of {result['target']}: removed {best['removed']:,} of {whole:,} "
        f"({best['sparsity']:.3%}) {of}",
        "fitness": f"KL {best['fitness']:.5f}{over_most_likely(result.get('top_k'))} on {result['final_tokens']:,} "
        "tokens of text B",
        "search": f"{result['evaluations']} evaluations in {result['generations']} generations, seed {result['seed']}",
        **numerics,
    }
    files = Text.assemble(
        (f"{'files':<10}", "dim"), str(run / "export" / "front" / f"{member_name(best)}.json"), " and so on"
    )
    ways = tables_structure.ways_on if result["kind"] == "structure" else tables_allocation.ways_on
    return [Padding(front_table(result), (1, 0, 1, 0)), facts_table(facts), Text(), files, *ways(result, run)]


def beside(kind: str, drop_only: bool = False) -> str:
    """What members of a front are compared with: where parts only go as a whole, there is no uniform sparsity.

    Args:
        kind: of the search.
    """
    if kind == "structure":
        return "the uniform shape"
    return "parts dropped at random" if drop_only else "uniform sparsity"


def span(result: Mapping[str, Any]) -> str:
    """Such as ``saving 40 % to 70 % of the weights``."""
    saved = [row["saved"] for row in result["front"]]
    first, last = min(saved), max(saved)
    return f"saving {first}% to {last}% of the {result['pareto']['cost']}"
