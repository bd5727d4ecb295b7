"""The page of an allocation search: its figures and its words."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.metrics.records import split_site
from evoprune.search.removal import in_brackets, removal_options
from evoprune.search.report import document, figures_allocation, figures_generation, figures_result, generation_page
from evoprune.search.report.allocation_data import AllocationData, range_text
from evoprune.search.report.formula import formula_svg
from evoprune.search.rundir import RunDirectory

if TYPE_CHECKING:
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
    shared = {"matrix": "Matrices", "block": "Blocks", "kind": "Kinds"}[data.config.target.granularity]
    moves = generation_page.Moves(
        f"by how much each {data.config.target.granularity} that moved changed its sparsity.",
        (f"{shared} moved", "Levels moved"),
        lambda generation: (len(generation.moves), sum(map(abs, generation.moves))),
        "; one level is 1/256 of a row",
    )
    formula = None if data.result is None else data.result.get("formula")
    return generation_page.fill(
        "allocation_page.html.jinja",
        data,
        drawn,
        target_text(data),
        moves,
        span=None if best is None or not best.plan else range_text(best.plan),
        commands=commands(data),
        listing=listing(data),
        formula=None if formula is None else {**formula, "picture": typeset(formula)},
    )


def typeset(found: Mapping[str, Any]) -> Markup | str:
    """A formula as the result has it, as a picture; its text if it cannot be set."""
    from markupsafe import Markup

    svg = formula_svg(found["latex"], found["text"], display=True)
    return found["text"] if svg is None else Markup(svg)


def target_text(data: AllocationData) -> str:
    """What is removed, in words."""
    target = data.config.target
    return f"{100 * target.sparsity:g} % of all prunable weights{in_brackets(target.compressor)}"


def commands(data: AllocationData) -> dict[str, str]:
    """Command lines to go on from here, by what they do."""
    run, model = shlex.quote(str(data.run.path)), shlex.quote(data.config.model.name)
    file, target = shlex.quote(str(data.run.path / "export" / "allocation.json")), data.config.target
    inside = removal_options(target.metric, target.compressor)
    with_winner = {
        **document.pruning(
            data,
            "Prune the model with the winner",
            f"evoprune prune {model} {inside} --allocation {file} --out pruned{document.same_statistics(data)}",
        ),
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
