"""The page of an allocation search: its figures and its words."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.metrics.records import split_site
from evoprune.search.removal import PLAIN, removal_options
from evoprune.search.report import document, figures_allocation, figures_generation, figures_result
from evoprune.search.report.allocation_data import AllocationData, range_text
from evoprune.search.report.formula import formula_svg
from evoprune.search.report.names import label
from evoprune.search.rundir import RunDirectory

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[AllocationData], Figure | None]] = {
    "allocation": figures_allocation.allocation,
    "profile": figures_allocation.profile,
    "baselines": figures_result.baselines,
    "convergence": figures_generation.convergence,
    "moves": figures_generation.moves,
}


def write_page(run: RunDirectory) -> Path:
    """See `evoprune.search.report.write_report`."""
    data = AllocationData(run)
    drawn = document.draw(FIGURES, data)
    return document.write_files(run.path, FIGURES, drawn, render(data, drawn))


def render(data: AllocationData, drawn: dict[str, str]) -> str:
    """The page with these figures inlined."""
    best = data.best
    return document.fill(
        _environment(),
        "allocation_page.html.jinja",
        data,
        drawn,
        target_text(data),
        "Allocation",
        best=best,
        span=None if best is None or not best.plan else range_text(best.plan),
        verdicts=verdicts(data),
        commands=commands(data),
        listing=listing(data),
        formula=None if data.result is None else data.result.get("formula"),
    )


@cache
def _environment() -> Environment:
    environment = document.new_environment()
    environment.filters |= {"origin": origin_text, "typeset": typeset}
    return environment


def origin_text(origin: str) -> str:
    """How a candidate came about, in words."""
    family, _, name = origin.partition(":")
    return {
        "seed": f"the allocation of {label(name)}",
        "switch": "bred by level switches",
        "crossover": "bred from what several children of one parent changed",
        "formula": "given by a formula",
    }.get(family, origin)


def typeset(found: Mapping[str, Any]) -> Markup | str:
    """A formula as the result has it, as a picture; its text if it cannot be set."""
    from markupsafe import Markup

    svg = formula_svg(found["latex"], found["text"], display=True)
    return found["text"] if svg is None else Markup(svg)


def target_text(data: AllocationData) -> str:
    """What is removed, in words."""
    target = data.config.target
    compressor = "" if target.compressor == PLAIN else f" ({target.compressor})"
    return f"{100 * target.sparsity:g} % of all prunable weights{compressor}"


def verdicts(data: AllocationData) -> list[str]:
    """What was found, on held-out text, as sentences."""
    if data.result is None or data.best is None:
        return []
    seed, target = data.best.origin.partition("seed:")[2], data.config.target
    subject = f"{label(seed)}, which no child beat," if seed else f"Generation {data.best.generation}"
    found = []
    if data.gap is not None:
        share = f"{abs(100 * data.gap):.0f} %"
        change = f"wins back {share} of" if data.gap >= 0 else f"adds {share} to"
        found.append(f"{subject} {change} the held-out loss between uniform and dense")
    elif data.contender(target.reference):
        found.append(f"{subject} has a held-out loss {document.beside(target.reference, data)}")
    told = {"dense", "winner", target.reference, seed}
    told |= {name for names in data.alike if told.intersection(names) for name in names}
    rivals = [row.name for row in data.contenders if row.name not in told]
    if rivals:
        best = f", the best of {len(rivals)} other allocators" if len(rivals) > 1 else ""
        found.append(f"{'Its' if found else f'{subject}: its'} loss is {document.beside(rivals[0], data)}{best}")
    return found


def commands(data: AllocationData) -> dict[str, str]:
    """Command lines to go on from here, by what they do."""
    run, model = shlex.quote(str(data.run.path)), shlex.quote(data.config.model.name)
    file, target = shlex.quote(str(data.run.path / "export" / "allocation.json")), data.config.target
    inside = removal_options(target.metric, target.compressor)
    with_winner = {
        "Prune the model with the winner": f"evoprune prune {model} {inside} --allocation {file} --out pruned"
        f"{document.same_statistics(data)}",
        "Write the winner as EvoPress reads it": f"evoprune export {run} --to allocation.txt",
        **document.search_on(data),
        "Start another search of this model from the winner": (
            f"evoprune search allocation {model} {inside} --sparsity {target.sparsity:g} --seed-from {run}"
        ),
    }
    return document.commands(data, with_winner)


def listing(data: AllocationData) -> str:
    """The sparsity of every matrix of the winner, one a line; empty before the run is finished."""
    if data.result is None:
        return ""
    kinds, _ = data.axes

    def place(name: str) -> tuple[int, int]:
        kind, block = split_site(name)
        return block, kinds.index(kind)

    sparsities = data.result["best"]["allocation"]
    widest = max(map(len, sparsities))
    return "\n".join(f"{name:<{widest}}  {sparsities[name]}" for name in sorted(sparsities, key=place))
