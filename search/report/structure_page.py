"""The page of a structure search: its figures and its words."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from evoprune.search.config_structure import StructureTarget
from evoprune.search.replaying import REFIT_OPTION
from evoprune.search.report import document, figures_generation, figures_result, figures_structure, generation_page
from evoprune.search.report.structure_data import StructureData
from evoprune.search.rundir import RunDirectory
from evoprune.search.tables import COUNTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[StructureData], Figure | None]] = {
    "shape": figures_structure.shape,
    "profile": figures_structure.profile,
    "baselines": figures_result.baselines,
    "convergence": figures_generation.convergence,
    "moves": figures_generation.moves,
}


def write_page(run: RunDirectory) -> Path:
    """See `evoprune.search.report.write_report`."""
    data = StructureData(run)
    drawn = document.draw(FIGURES, data)
    return document.write_files(run.path, FIGURES, drawn, render(data, drawn))


def render(data: StructureData, drawn: dict[str, str]) -> str:
    """The page with these figures inlined."""
    target = data.config.target
    counted = COUNTED[target.cost]
    moves = generation_page.Moves(
        "by how much each attention and MLP that changed did, in per cent points of the dense block's.",
        ("Attentions changed", "MLPs changed"),
        lambda generation: [len(changes) for changes in data.changes(generation).values()],
    )
    return generation_page.fill(
        "structure_page.html.jinja",
        data,
        drawn,
        removed_text(target, counted),
        moves,
        counted=counted.capitalize(),
        commands=commands(data),
    )


def removed_text(target: StructureTarget, counted: str) -> str:
    """What is removed, in words."""
    if target.sparsity is None:
        return f"what makes it {target.speedup:g} times as fast"
    return f"{100 * target.sparsity:g} % of the {counted} of heads and MLPs"


def commands(data: StructureData) -> dict[str, str]:
    """Command lines to go on from here, by what they do."""
    run, model = shlex.quote(str(data.run.path)), shlex.quote(data.config.model.name)
    file, target = shlex.quote(str(data.run.path / "export" / "shape.json")), data.config.target
    prune = f"evoprune prune {model} --shape {file}"
    refit = {"Write it with a path refit": f"{prune}{REFIT_OPTION} --out small"}
    with_winner = {
        "Write the smaller model": f"{prune} --out small",
        **(refit if data.contender("refitted") is not None else {}),
        "Measure it": f"evoprune eval small --dense {model}",
        **document.search_on(data),
        "Start another search of this model from the winner": (
            f"evoprune search structure {model} --sparsity {target.sparsity:g} --cost {target.cost} --seed-from {run}"
        ),
    }
    return document.commands(data, with_winner)
