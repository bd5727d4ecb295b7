"""The page of a search for a front of allocations: its figures and its words, and those of all fronts."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.search.removal import removal_options
from evoprune.search.report import document, figures_allocation, figures_front, numbers
from evoprune.search.report.allocation_data import range_text
from evoprune.search.report.front_data import AnyFrontData, FrontData
from evoprune.search.report.generation_page import environment
from evoprune.search.rundir import RunDirectory
from evoprune.search.tables_front import what_is_saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[FrontData], Figure | None]] = {
    "front": figures_front.front,
    "kinds": figures_front.kinds,
    "allocation": figures_allocation.allocation,
    "candidates": figures_front.candidates,
}


def write_page(run: RunDirectory) -> Path:
    """See `evoprune.search.report.write_report`."""
    data = FrontData(run)
    drawn = document.draw(FIGURES, data)
    return document.write_files(run.path, FIGURES, drawn, render(data, drawn))


def render(data: FrontData, drawn: dict[str, str]) -> str:
    """The page with these figures inlined."""
    best = data.best
    return fill(
        "allocation_front_page.html.jinja",
        data,
        drawn,
        "all prunable weights",
        str(data.config.target.pareto),
        commands(data),
        span=None if best is None or not best.plan else range_text(best.plan),
    )


def fill(
    template: str,
    data: AnyFrontData[Any, Any],
    drawn: dict[str, str],
    whole: str,
    cost: str,
    ways_on: dict[str, str],
    **values: Any,
) -> str:
    """The page of a template that extends ``front_page.html.jinja``.

    Args:
        whole: what the range is a part of, in words.
        cost: that the range is of.
        ways_on: command lines, by what they do.
        values: what else the template reads.
    """
    low, high = data.config.target.sparsity_range or (0.0, 0.0)
    return document.fill(
        environment(data.genome),
        template,
        data,
        drawn,
        f"{100 * low:g} to {100 * high:g} % of {whole}",
        data.genome.capitalize(),
        best=data.best,
        what_is_saved=what_is_saved(data.kind, cost),
        verdict=verdict(data),
        commands=ways_on,
        **values,
    )


def verdict(data: AnyFrontData[Any, Any]) -> str:
    """What was found, on held-out text, as a sentence; empty before the run is finished."""
    differences = [row.difference for row in data.rows if row.difference is not None]
    if not differences:
        return ""
    below = [place for place in differences if place.value < -place.error]
    above = [place for place in differences if place.value > place.error]
    least = min(differences, key=lambda place: place.value)
    found = f"{len(below)} of {len(differences)} members of the front have a held-out loss below that of {data.beside}"
    found += f" at the same cost{f', {len(above)} above' if above else ''} (by more than a standard error)"
    if least.value < 0:
        found += (
            f"; the most at {least.saved:.0f} % saved, by {numbers.nats(-least.value)} ± {numbers.nats(least.error)} "
            "nats per token"
        )
    return found


def commands(data: FrontData) -> dict[str, str]:
    """Command lines to go on from here, by what they do."""
    model, target = shlex.quote(data.config.model.name), data.config.target
    inside = removal_options(target.metric, target.compressor)
    export = data.run.path / "export"
    found = {}
    if data.result is not None:
        member = shlex.quote(str(export / "front" / f"{data.result['best']['saved']}.json"))
        prune = f"evoprune prune {model} {inside} --allocation"
        found = {
            "Prune the model with a member of the front": f"{prune} {member} --out pruned"
            f"{document.same_statistics(data)}",
            **document.search_on(data),
            "Search on at one sparsity, from the member nearest to it": (
                f"evoprune search allocation {model} {inside} --sparsity {target.sparsity:g} --seed-from {member}"
            ),
        }
    return document.commands(data, found)
