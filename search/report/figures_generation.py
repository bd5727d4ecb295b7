"""Figures of any search by generations: how it went. Every KL in them is from text B: none shows a result.

Each function returns None when there is nothing to draw yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evoprune.search.report import canvas
from evoprune.search.report.axes import ceiling, columns, limit, note_beyond, plain_numbers
from evoprune.search.report.generation_data import GenerationData
from evoprune.search.report.labels import name_levels
from evoprune.search.report.names import label, objective_text, shortened
from evoprune.search.report.numbers import nats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_RIVALS = 3
"""Seeds that are told apart beside the winner."""


def convergence(data: GenerationData[Any, Any]) -> Figure | None:
    """KL of the parent after each generation by evaluations, with the seeds' and the finalists'."""
    if not data.seeds:
        return None
    won = [generation for generation in data.generations if generation.winner is not None]
    parents = [(generation.evaluations, generation.winner["kl"]) for generation in won if generation.winner]
    finals = [(data.evaluations_until(line), line["kl"]) for line in data.finals]
    seeds = [(line["birth"] + 1, line["kl"]) for line in data.seeds]
    figure = canvas.new_figure(3.9)
    axes = figure.add_subplot()
    named = _named_seeds(data)
    values = [value for _, value in (*seeds, *parents, *finals)]
    # Some seeds are dreadful: to their scale, the whole search would be one line.
    keep = [*(value for _, value in (*parents, *finals)), *named.values()]
    beyond = limit(axes, min(values), ceiling(values, keep=keep), values)
    high = axes.get_ylim()[1]
    axes.scatter(
        *columns(point for point in seeds if point[1] <= high),
        s=14,
        color=canvas.MUTED,
        linewidth=0,
        label=f"{data.starters}, on the last stage's text",
    )
    last = max([data.n_evaluations, *(x for x, _ in parents)])
    if parents:
        axes.step(
            *columns([*parents, (last, parents[-1][1])]),
            where="post",
            color=canvas.WINNER,
            linewidth=1.2,
            alpha=0.75,
            label="parent, on its generation's windows",
        )
    if finals:
        axes.scatter(
            *columns(finals), s=26, marker="D", color=canvas.WINNER, zorder=3, label="finalists, on all of text B"
        )
    _mark_seeds(axes, named, data.reference)
    axes.set_xlim(0, last * 1.01 + 1)
    axes.set_xlabel("evaluations")
    axes.set_ylabel(f"{objective_text(data.config)}, nats per token")
    note_beyond(axes, beyond)
    figure.legend(loc="outside lower center", ncols=3, handletextpad=0.4, columnspacing=1.5)
    return figure


def moves(data: GenerationData[Any, Any]) -> Figure | None:
    """By generation: what the winner gained on its parent, and how far what moved did."""
    won = [generation for generation in data.generations if generation.gain is not None]
    if not won:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = canvas.new_figure(4.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    accepted = [(generation.number, generation.gain or 0.0) for generation in won if not generation.kept]
    upper.vlines([x for x, _ in accepted], 0, [y for _, y in accepted], color=canvas.WINNER, linewidth=1.1)
    upper.scatter(*columns(accepted), s=16, color=canvas.WINNER, linewidth=0)
    kept = [(generation.number, 0.0) for generation in won if generation.kept]
    upper.scatter(*columns(kept), s=16, facecolor="white", edgecolor=canvas.MUTED, linewidth=0.9, zorder=3)
    upper.set_ylabel("gain, nats per token")
    moved: dict[str, list[tuple[float, float]]] = {}
    for generation in won:
        for what, changes in data.changes(generation).items():
            moved.setdefault(what, []).extend((generation.number, change) for change in changes)
    lower.axhline(0, color=canvas.FAINT, linewidth=0.8)
    # The winner's colour is that of the gains above, and means no kind.
    colours = canvas.RIVAL_COLOURS if len(moved) > 1 else (canvas.WINNER,)
    for (what, points), colour in zip(moved.items(), colours, strict=False):
        if points:
            lower.scatter(*columns(points), s=16, color=colour, alpha=0.8, linewidth=0, label=what)
    if len(moved) > 1:
        figure.legend(*lower.get_legend_handles_labels(), loc="outside lower center", ncols=len(moved))
    lower.set_ylabel("change, % points")
    lower.set_xlabel("generation")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        plain_numbers(axes.yaxis)
    return figure


def _named_seeds(data: GenerationData[Any, Any]) -> dict[str, float]:
    """KL of the reference and of the best few seeds, by name."""
    reference = data.reference
    ranked: Sequence[tuple[str, float]] = [(name, line["kl"]) for name, line in data.best_seeds.items()]
    return dict([*ranked[:MOST_RIVALS], *(seed for seed in ranked[MOST_RIVALS:] if seed[0] == reference)])


def _mark_seeds(axes: Axes, named: dict[str, float], reference: str) -> None:
    """Seeds as lines across, with names in the right margin."""
    names = []
    for name, level in named.items():
        colour = canvas.POWER if name == reference else canvas.MUTED
        axes.axhline(level, color=colour, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        names.append((f"{shortened(label(name))}  {nats(level)}", level, colour))
    name_levels(axes, names)
