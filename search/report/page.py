"""The page: figures drawn, formulas set, template filled, files written."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from evoprune.metrics.emit import latex, to_text
from evoprune.metrics.emit_formula import without_scale
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.expression import Expression, parse
from evoprune.metrics.files import write_atomically
from evoprune.metrics.terminals import TERMINALS
from evoprune.search.engine.durable import disk_errors
from evoprune.search.report import canvas, figures_best, figures_result, figures_search, numbers
from evoprune.search.report.data import ReportData
from evoprune.search.report.formula import formula_svg
from evoprune.search.report.latex_table import latex_table
from evoprune.search.report.lineage import ancestors, main_line
from evoprune.search.report.names import label, needs_text, objective_text, reason_text
from evoprune.search.report.tree import kind_of, tree_svg
from evoprune.search.rundir import RunDirectory
from evoprune.search.tables import NOT_REPRODUCIBLE

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

_FOLDER = Path(__file__).parent
_WIDEST_IN_TABLE = 16.0  # em


def write_page(run: RunDirectory) -> Path:
    """See `evoprune.search.report.write_report`."""
    data = ReportData(run)
    drawn = draw(data)
    page = render(data, drawn)
    target = run.path / "report.html"
    plots = run.path / "plots"
    with disk_errors(target):
        plots.mkdir(exist_ok=True)
        for name in FIGURES:
            path = plots / f"{name}.svg"
            if name in drawn:
                write_atomically(path, drawn[name])
            else:
                path.unlink(missing_ok=True)
        write_atomically(target, page)
    return target


def draw(data: ReportData) -> dict[str, str]:
    """Every figure that there is something to draw for, as a standalone SVG, by name."""
    drawn = {}
    with canvas.house_style():
        for name, function in FIGURES.items():
            figure = function(data)
            if figure is not None:
                drawn[name] = canvas.to_svg(figure)
    return drawn


def render(data: ReportData, drawn: dict[str, str]) -> str:
    """The page with these figures inlined."""
    from markupsafe import Markup

    script = (_FOLDER / "script.js.jinja").read_text(encoding="utf-8")
    best = data.best
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            data=data,
            style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            # The browser runs this one script and nothing else, whatever a model's name may contain.
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            figures={name: Markup(canvas.inline(svg, name)) for name, svg in drawn.items()},
            best=best,
            plain=None if best is None else _up_to_scale(best.expression, data),
            line=[] if best is None else main_line(best, data.by_birth),
            family=[] if best is None else ancestors(best, data.by_birth),
            terminals=[]
            if best is None
            else [TERMINALS[name] for name in TERMINALS if name in best.expression.terminals],
            target=target_text(data),
            verdicts=verdicts(data),
            table=latex_table(data.contenders, heldout_caption(data)) if data.contenders else "",
            caption=heldout_caption(data),
            commands=commands(data),
        )
    )


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": numbers.count,
        "perplexity": numbers.perplexity,
        "nats": numbers.nats,
        "signed": numbers.signed,
        "duration": numbers.seconds,
        "label": label,
        "needs": needs_text,
        "reason": reason_text,
        "breakable": breakable,
        "formula": formula,
        "score": score,
        "symbol": lambda terminal: formula(Expression(terminal.name)),
        "kind": lambda terminal: kind_of(Expression(terminal.name)),
        "tree": lambda expression: _markup(tree_svg(expression)),
        "latex": latex,
        "origin": origin_text,
        "objective": objective_text,
    }
    environment.globals |= {"percent": numbers.percent, "yaml_text": yaml_text}
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


def breakable(text: str) -> Markup:
    """An expression that a narrow column breaks after its commas; it is copied as it is."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=,)", text))


def origin_text(origin: str) -> str:
    """How a candidate came about, in words."""
    family, _, name = origin.partition(":")
    known = {"seed": f"given: {label(name)}", "mutate": f"mutation ({name})", "power": "tuned power product"}
    return known.get(family, {"tune": "tuned constants", "random": "drawn at random"}.get(family, origin))


def target_text(data: ReportData) -> str:
    """What is removed, in words."""
    rule = data.config.target.rule
    if rule.pattern is not None:
        return f"{rule.pattern[0]}:{rule.pattern[1]} ({rule.pattern[0]} kept of every {rule.pattern[1]} inputs)"
    within = {"row": "of every row", "layer": "of every matrix", "global": "of all prunable weights"}[rule.group]
    return f"{100 * rule.fraction:g} % {within}"


def heldout_caption(data: ReportData) -> str:
    """What stands beside every held-out number."""
    if not data.contenders:
        return ""
    tokens = data.contenders[0].heldout["tokens"]
    return (
        f"{data.config.model.name} with {target_text(data)} removed. Held-out text C of {corpus_text(data)}: "
        f"{numbers.count(tokens)} predicted tokens in non-overlapping windows of {data.config.data.window}. "
        "Loss and KL are in nats per token. "
        f"Standard errors are over windows; differences are paired, window by window."
        + ("" if data.identity.get("bit_reproducible", True) else f" This run is {NOT_REPRODUCIBLE}.")
    )


def corpus_text(data: ReportData) -> str:
    """Where the texts are from, in words."""
    source = data.config.data.source
    if source != "corpus":
        return source
    python = data.identity.get("versions", {}).get("python", "")
    return f"the embedded corpus (source of the standard library of Python {python})".replace(" )", ")")


def verdicts(data: ReportData) -> list[str]:
    """How the winner's held-out loss compares with the two criteria that matter most, in words."""
    found = []
    for name, whose in (("wanda", "Wanda's"), ("power", "the tuned power product's")):
        row = data.contender(name)
        if row is not None and row.difference is not None:
            loss, error = row.difference["loss"], row.difference["stderr"]
            if data.best is not None and row.expression == data.best.expression.text:
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
    found = {} if data.result is not None else {"Continue this run": f"evoprune resume {run}"}
    found["Repeat it: the same configuration, seed and history"] = (
        f"evoprune search metric {model} --config {shlex.quote(str(data.run.path / 'config.yaml'))}"
    )
    if data.result is not None:
        metric = shlex.quote(str(data.run.path / "export" / "metric.json"))
        found["Prune a model with the winner"] = f"evoprune prune {model} --metric {metric} {target} --out pruned"
        more = f"evoprune resume {run} --fork --set evaluations={2 * data.n_evaluations}"
        found["Search on, in a new run that reuses these evaluations"] = more
        found["Start another search from this front"] = f"evoprune search metric OTHER_MODEL --seed-from {run}"
    if argv := data.identity.get("argv"):
        # The address of a database may hold a password, and a page is there to be shown around.
        found["As it was started"] = re.sub(r"://[^/@\s]*@", "://***@", shlex.join(map(str, argv)))
    return found


def yaml_text(data: ReportData) -> str:
    """The resolved configuration as the run's folder has it."""
    return (data.run.path / "config.yaml").read_text(encoding="utf-8").rstrip()


def _up_to_scale(expression: Expression, data: ReportData) -> Expression | None:
    """The formula without positive factors, if that changes no mask and is not the formula itself."""
    plain = without_scale(expression)
    return None if data.config.target.group == "global" or latex(plain) == latex(expression) else plain


def _markup(svg: str) -> Markup:
    from markupsafe import Markup

    return Markup(svg)
