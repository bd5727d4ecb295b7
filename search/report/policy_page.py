"""The page of a policy search: its figures and its words."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from evoprune.metrics.records import parse_pattern
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.policy_search import INITIALISATION
from evoprune.search.replaying import REFIT_OPTION
from evoprune.search.report import document, figures_policy, figures_probabilities, figures_result
from evoprune.search.report.names import label, objective_text
from evoprune.search.report.policy_data import PolicyData
from evoprune.search.rundir import RunDirectory
from evoprune.search.tables import COUNTED

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[PolicyData], Figure | None]] = {
    "kept": figures_policy.kept,
    "probabilities": figures_probabilities.probabilities,
    "baselines": figures_result.baselines,
    "convergence": figures_policy.convergence,
    "groups": figures_policy.groups,
    "diagnostics": figures_policy.diagnostics,
}


def write_page(run: RunDirectory) -> Path:
    """See `evoprune.search.report.write_report`."""
    data = PolicyData(run)
    drawn = document.draw(FIGURES, data)
    tables = {"probabilities": data.probabilities_csv(), "kept": data.kept_csv()}
    return document.write_files(run.path, FIGURES, drawn, render(data, drawn), tables)


def render(data: PolicyData, drawn: dict[str, str]) -> str:
    """The page with these figures inlined."""
    return document.fill(
        _environment(),
        "policy_page.html.jinja",
        data,
        drawn,
        removed_text(data.config),
        "Mask",
        best=data.best,
        verdicts=verdicts(data),
        commands=commands(data),
        counted=COUNTED[data.config.target.cost].capitalize(),
        fitness=objective_text(data.config),
        called=figures_policy.DIAGNOSTICS,
        first=data.contender(INITIALISATION),
        by_unit=data.by_unit,
    )


@cache
def _environment() -> Environment:
    found = document.new_environment()
    found.filters["steps"] = steps_text
    return found


def steps_text(steps: int) -> str:
    """When a mask was the policy's mode."""
    return f"after {steps:,} step{'s' if steps != 1 else ''}" if steps else "before the first step"


def removed_text(config: PolicySearchConfig) -> str:
    """What is removed, in words."""
    target = config.target
    if target.pattern is not None:
        kept, of = parse_pattern(target.pattern)
        return f"{of - kept} of every {of} weights ({target.pattern})"
    assert target.sparsity is not None
    return f"{100 * target.sparsity:g} % of the {COUNTED[target.cost]} of heads and MLPs"


def verdicts(data: PolicyData) -> list[str]:
    """What was found, on held-out text, as sentences."""
    if data.result is None or data.best is None:
        return []
    steps = data.best["step"]
    same = [row.name for row in data.contenders if row.difference and not any(row.difference.values())]
    subject = f"The policy’s mode {steps_text(steps)}"
    if not steps:
        subject = f"{label(same[0])}, which no step beat," if same else "A mask that the search began with"
    told, found = {"dense", "winner", INITIALISATION, *same}, []
    if data.contender(INITIALISATION) is not None and INITIALISATION not in same:
        found.append(f"{subject} has a held-out loss {document.beside(INITIALISATION, data)}")
    rivals = [row.name for row in data.contenders if row.name not in told]
    if rivals:
        best = f", the best of {len(rivals)} others" if len(rivals) > 1 else ""
        compared = document.beside(rivals[0], data)
        found.append(f"Its loss is {compared}{best}" if found else f"{subject} has a held-out loss {compared}{best}")
    return found


def commands(data: PolicyData) -> dict[str, str]:
    """Command lines to go on from here, by what they do."""
    run, model, target = shlex.quote(str(data.run.path)), shlex.quote(data.config.model.name), data.config.target
    file = shlex.quote(str(data.run.path / "export" / "policy.json"))
    asked = f"--pattern {target.pattern}" if target.pattern is not None else f"--sparsity {target.sparsity:g}"
    smaller = f"evoprune prune {model} --policy {file}"
    with_winner = {"Write the smaller model": f"{smaller} --out small"}
    if data.result is not None and data.result["best"]["shape"] is not None:
        with_winner["Or with its output matrices refitted to what stays"] = f"{smaller}{REFIT_OPTION} --out small"
    with_winner |= {
        "Measure it": f"evoprune eval small --dense {model}",
        **document.search_on(data),
        "Start another search of this model from the winner": (
            f"evoprune search policy {model} {asked} --seed-from {run}"
        ),
    }
    return document.commands(data, with_winner)
