"""The page of a metric search: its figures, its formulas and its words."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from evoprune.metrics.emit import latex, to_text
from evoprune.metrics.emit_formula import without_scale
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.expression import Expression, parse
from evoprune.metrics.terminals import TERMINALS
from evoprune.search.removal import compressor_option, in_brackets
from evoprune.search.report import document, figures_best, figures_result, figures_search, numbers
from evoprune.search.report.data import ReportData
from evoprune.search.report.formula import formula_svg
from evoprune.search.report.lineage import ancestors, main_line
from evoprune.search.report.names import label, needs_text, objective_text
from evoprune.search.report.tree import kind_of, tree_svg
from evoprune.search.rundir import RunDirectory

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure

FIGURES: dict[str, Callable[[ReportData], Figure | None]] = {
    "baselines": figures_result.baselines,
    "convergence": figures_best.convergence,
    "front": figures_best.front,
    "fronts": figures_best.fronts,
    "lineage": figures_search.lineage,
    "origins": figures_search.origins,
    "rungs": figures_search.rungs,
    "agreement": figures_result.agreement,
}

_WIDEST_IN_TABLE = 16.0  # em


def write_page(run: RunDirectory) -> Path:
    """See `evoprune.search.report.write_report`."""
    data = ReportData(run)
    drawn = document.draw(FIGURES, data)
    return document.write_files(run.path, FIGURES, drawn, render(data, drawn))


def render(data: ReportData, drawn: dict[str, str]) -> str:
    """The page with these figures inlined."""
    best = data.best
    return document.fill(
        _environment(),
        "page.html.jinja",
        data,
        drawn,
        target_text(data),
        "Criterion",
        best=best,
        plain=None if best is None else _up_to_scale(best.expression, data),
        line=[] if best is None else main_line(best, data.by_birth),
        family=[] if best is None else ancestors(best, data.by_birth),
        terminals=[] if best is None else [TERMINALS[name] for name in TERMINALS if name in best.expression.terminals],
        verdicts=verdicts(data),
        commands=commands(data),
    )


@cache
def _environment() -> Environment:
    environment = document.new_environment()
    environment.filters |= {
        "needs": needs_text,
        "formula": formula,
        "score": score,
        "symbol": lambda terminal: formula(Expression(terminal.name)),
        "kind": lambda terminal: kind_of(Expression(terminal.name)),
        "tree": lambda expression: _markup(tree_svg(expression)),
        "latex": latex,
        "origin": origin_text,
        "objective": objective_text,
    }
    return environment


def formula(expression: Expression | str) -> Markup | str:
    """A formula as a picture in a table; as Unicode text, which wraps, where it is long, cannot be set or is a name."""
    try:
        parsed = parse(expression) if isinstance(expression, str) else expression
    except InvalidInput:
        return str(expression) or "–"
    text = to_text(parsed)
    svg = formula_svg(latex(parsed), text, widest=_WIDEST_IN_TABLE)
    return text if svg is None else _markup(svg)


def score(expression: Expression, relation: str = "=") -> Markup | str:
    """The formula of the score, full size."""
    text = f"S {'=' if relation == '=' else '∝'} {to_text(expression)}"
    svg = formula_svg(f"S {relation} {latex(expression)}", text, display=True)
    return text if svg is None else _markup(svg)


def origin_text(origin: str) -> str:
    """How a candidate came about, in words."""
    family, _, name = origin.partition(":")
    known = {"seed": f"given: {label(name)}", "mutate": f"mutation ({name})", "power": "tuned power product"}
    return known.get(family, {"tune": "tuned constants", "random": "drawn at random"}.get(family, origin))


def target_text(data: ReportData) -> str:
    """What is removed, in words."""
    rule, inside = data.config.target.rule, in_brackets(data.config.target.compressor)
    if rule.pattern is not None:
        return f"{rule.pattern[0]}:{rule.pattern[1]} ({rule.pattern[0]} kept of every {rule.pattern[1]} inputs){inside}"
    if data.config.target.allocation is not None:
        return f"{100 * rule.fraction:g} % of all prunable weights, shared out by an allocation{inside},"
    within = {"row": "of every row", "layer": "of every matrix", "global": "of all prunable weights"}[rule.group]
    return f"{100 * rule.fraction:g} % {within}{inside}"


def verdicts(data: ReportData) -> list[str]:
    """How the winner's held-out loss compares with the two criteria that matter most, in words."""
    found = []
    for name, whose in (("wanda", "Wanda's"), ("power", "the tuned power product's")):
        row = data.contender(name)
        if row is not None and row.difference is not None:
            loss, error = row.difference["loss"], row.difference["stderr"]
            if data.best is not None and row.what == data.best.expression.text:
                found.append(f"the same as {whose}: it is the same metric")
            elif abs(loss) <= error:
                found.append(f"level with {whose} ({numbers.signed(loss)} ± {numbers.nats(error)})")
            else:
                side = "below" if loss < 0 else "above"
                found.append(f"{numbers.nats(abs(loss))} ± {numbers.nats(error)} nats per token {side} {whose}")
    return found


def commands(data: ReportData) -> dict[str, str]:
    """Command lines to go on from here, by what they do."""
    run, model = shlex.quote(str(data.run.path)), shlex.quote(data.config.model.name)
    rule = data.config.target.rule
    target = f"--pattern {rule}" if rule.pattern is not None else f"--sparsity {rule}"
    metric = shlex.quote(str(data.run.path / "export" / "metric.json"))
    if data.config.target.allocation is not None:
        target = f"--allocation {shlex.quote(str(data.run.path / 'export' / 'allocation.json'))}"
    target += compressor_option(data.result or {"compressor": data.config.target.compressor})
    with_winner = {
        **document.pruning(
            data,
            "Prune a model with the winner",
            f"evoprune prune {model} --metric {metric} {target} --out pruned{document.same_statistics(data)}",
        ),
        **document.search_on(data),
        "Start another search from this front": f"evoprune search metric OTHER_MODEL --seed-from {run}",
    }
    return document.commands(data, with_winner)


def _up_to_scale(expression: Expression, data: ReportData) -> Expression | None:
    """The formula without positive factors, if that changes no mask and is not the formula itself."""
    plain = without_scale(expression)
    return None if data.config.target.group == "global" or latex(plain) == latex(expression) else plain


def _markup(svg: str) -> Markup:
    from markupsafe import Markup

    return Markup(svg)
