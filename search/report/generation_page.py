"""What the pages of all searches by generations have in common: words, and what their template reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from evoprune.search.report import document
from evoprune.search.report.generation_data import Generation, GenerationData
from evoprune.search.report.names import label
from evoprune.search.report.run_data import OF_WINNER

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Moves:
    """How the page says what a generation changed.

    Attributes:
        caption: of the lower half of the figure.
        heads: of the columns that `counts` fills.
        counts: what stands in them for a generation.
        note: below the table, after what KL is.
    """

    caption: str
    heads: Sequence[str]
    counts: Callable[[Generation], Sequence[int]]
    note: str = ""


def fill(
    template: str, data: GenerationData[Any, Any], drawn: Mapping[str, str], removed: str, moves: Moves, **values: Any
) -> str:
    """The page of a template that extends ``generation_page.html.jinja``; arguments as of `document.fill`."""
    return document.fill(
        environment(data.genome),
        template,
        data,
        drawn,
        removed,
        data.genome.capitalize(),
        best=data.best,
        verdicts=verdicts(data),
        moves=moves,
        **values,
    )


@cache
def environment(genome: str) -> Environment:
    """See `document.new_environment`; the filter ``origin`` says how a candidate came about.

    Args:
        genome: what a candidate is, in a word.
    """
    found = document.new_environment()
    found.filters |= {"origin": partial(origin_text, genome=genome)}
    return found


def origin_text(origin: str, genome: str) -> str:
    """How a candidate came about, in words; arguments as of `environment`."""
    family, _, name = origin.partition(":")
    return {
        "seed": f"the {genome} of {label(name)}",
        "switch": "bred by level switches",
        "crossover": "bred from what several children of one parent changed",
        "formula": "given by a formula",
    }.get(family, origin)


def verdicts(data: GenerationData[Any, Any]) -> list[str]:
    """What was found, on held-out text, as sentences."""
    if data.result is None or data.best is None:
        return []
    seed = data.best.origin.partition("seed:")[2]
    subject = f"{label(seed)}, which no child beat," if seed else f"Generation {data.best.generation}"
    found = []
    if data.gap is not None:
        share = f"{abs(100 * data.gap):.0f} %"
        change = f"wins back {share} of" if data.gap >= 0 else f"adds {share} to"
        found.append(f"{subject} {change} the held-out loss between uniform and dense")
    elif data.contender(data.reference):
        found.append(f"{subject} has a held-out loss {document.beside(data.reference, data)}")
    told = {"dense", *OF_WINNER, data.reference, seed}
    told |= {name for names in data.alike if told.intersection(names) for name in names}
    rivals = [row.name for row in data.contenders if row.name not in told]
    if rivals:
        best = f", the best of {len(rivals)} others" if len(rivals) > 1 else ""
        found.append(f"{'Its' if found else f'{subject}: its'} loss is {document.beside(rivals[0], data)}{best}")
    return found
