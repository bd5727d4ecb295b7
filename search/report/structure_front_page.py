"""The page of a search for a front of shapes: its figures and its words."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from evoprune.search.report import document, figures_front, figures_structure, front_page
from evoprune.search.report.front_data import StructureFrontData
from evoprune.search.result import member_name
from evoprune.search.rundir import RunDirectory
from evoprune.search.tables import COUNTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[StructureFrontData], Figure | None]] = {
    "front": figures_front.front,
    "times": figures_front.times,
    "kinds": figures_front.kinds,
    "shape": figures_structure.shape,
    "candidates": figures_front.candidates,
}


def write_page(run: RunDirectory) -> Path:
    """See `evoprune.search.report.write_report`."""
    data = StructureFrontData(run)
    drawn = document.draw(FIGURES, data)
    return document.write_files(run.path, FIGURES, drawn, render(data, drawn))


def render(data: StructureFrontData, drawn: dict[str, str]) -> str:
    """The page with these figures inlined."""
    cost = data.config.target.cost
    whole = f"the {COUNTED[cost]} of heads and MLPs"
    return front_page.fill("structure_front_page.html.jinja", data, drawn, whole, cost, commands(data))


def commands(data: StructureFrontData) -> dict[str, str]:
    """Command lines to go on from here, by what they do."""
    model, target = shlex.quote(data.config.model.name), data.config.target
    found = {}
    if data.result is not None:
        member = data.run.path / "export" / "front" / f"{member_name(data.result['best'])}.json"
        file = shlex.quote(str(member))
        found = {
            "Write a smaller model, with the shape of a member of the front": (
                f"evoprune prune {model} --shape {file} --out small"
            ),
            "Measure it": f"evoprune eval small --dense {model}",
            **document.search_on(data),
            "Search on at one sparsity, from the member nearest to it": (
                f"evoprune search structure {model} --sparsity {target.sparsity:g} --cost {target.cost} "
                f"--seed-from {file}"
            ),
        }
    return document.commands(data, found)
