"""What every report page shares: figures become files, the template is filled, and words that all searches have."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from evoprune.metrics.files import write_atomically
from evoprune.search.calibration import calibration_facts, calibration_options
from evoprune.search.engine.durable import disk_errors
from evoprune.search.objective_words import over_most_likely
from evoprune.search.replaying import NOTE, OPTION, REFIT_NOTE
from evoprune.search.report import canvas, numbers
from evoprune.search.report.latex_table import latex_table
from evoprune.search.report.names import label, reason_text
from evoprune.search.report.run_data import RunData
from evoprune.search.result import measured_on
from evoprune.search.tables import NOT_REPRODUCIBLE

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure

Data = TypeVar("Data")
Figures = Mapping[str, "Callable[[Data], Figure | None]"]
"""What draws each figure, by name; None where there is nothing to draw yet."""

_FOLDER = Path(__file__).parent


def draw(figures: Figures[Data], data: Data) -> dict[str, str]:
    """Every figure that there is something to draw for, as a standalone SVG, by name."""
    drawn = {}
    with canvas.house_style():
        for name, function in figures.items():
            figure = function(data)
            if figure is not None:
                drawn[name] = canvas.to_svg(figure)
    return drawn


def write_files(
    folder: Path,
    figures: Figures[Data],
    drawn: Mapping[str, str],
    page: str,
    tables: Mapping[str, str | None] | None = None,
) -> Path:
    """Write the page and its figures into a run's folder; figures and tables that there are no more go.

    Args:
        tables: what goes beside the figures as CSV, by name; None where there is nothing to tell yet.

    Returns:
        The path of the page.

    Raises:
        InvalidInput: the folder cannot be written.
    """
    target = folder / "report.html"
    plots = folder / "plots"
    with disk_errors(target):
        plots.mkdir(exist_ok=True)
        files = {f"{name}.svg": drawn.get(name) for name in figures}
        files |= {f"{name}.csv": table for name, table in (tables or {}).items()}
        for name, text in files.items():
            if text is not None:
                write_atomically(plots / name, text)
            else:
                (plots / name).unlink(missing_ok=True)
        write_atomically(target, page)
    return target


def new_environment() -> Environment:
    """Where templates come from, and the filters that all of them have."""
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
        "reason": reason_text,
        "breakable": breakable,
    }
    environment.globals |= {"percent": numbers.percent, "yaml_text": yaml_text}
    return environment


def fill(
    environment: Environment,
    template: str,
    data: RunData[Any],
    drawn: Mapping[str, str],
    removed: str,
    entrant: str,
    **values: Any,
) -> str:
    """The page of a template that extends ``base.html.jinja``, with these figures inlined.

    Args:
        removed: what is removed, in words.
        entrant: what a row of the held-out table is.
        values: what else the template reads.
    """
    from markupsafe import Markup

    script = (_FOLDER / "script.js.jinja").read_text(encoding="utf-8")
    caption = heldout_caption(data, removed)
    return environment.get_template(template).render(
        data=data,
        config=data.config,
        winner=data.contender("winner"),
        dense=data.contender("dense"),
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # The browser runs this one script and nothing else, whatever a model's name may contain.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        figures={name: Markup(canvas.inline(svg, name)) for name, svg in drawn.items()},
        target=removed,
        entrant=entrant,
        over=over_most_likely(data.config.top_k),
        table=latex_table(data.contenders, caption, entrant) if data.contenders else "",
        caption=caption,
        **values,
    )


def breakable(text: str) -> Markup:
    """An expression that a narrow column breaks after its commas; it is copied as it is."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=,)", text))


def heldout_caption(data: RunData[Any], removed: str) -> str:
    """What stands beside every held-out number.

    Args:
        removed: what is removed, in words.
    """
    if not data.contenders or data.result is None:
        return ""
    tokens = data.contenders[0].heldout["tokens"]
    return (
        f"{data.config.model.name} with {removed} removed. Held-out text C of {corpus_text(data)}: "
        f"{numbers.count(tokens)} predicted tokens in {measured_on(data.result)}. "
        "Loss and KL are in nats per token. "
        f"Standard errors are over windows; differences are paired, window by window."
        + (f" {NOTE}" if data.contender("replayed") is not None else "")
        + (f" {REFIT_NOTE}" if data.contender("refitted") is not None else "")
        + ("" if data.identity.get("bit_reproducible", True) else f" This run is {NOT_REPRODUCIBLE}.")
    )


def beside(name: str, data: RunData[Any]) -> str:
    """How the winner's loss compares with another's, in words."""
    row = data.contender(name)
    assert row is not None and row.difference is not None
    loss, error = row.difference["loss"], row.difference["stderr"]
    if abs(loss) <= error:
        return f"level with that of {label(name)} ({numbers.signed(loss)} ± {numbers.nats(error)})"
    side = "below" if loss < 0 else "above"
    return f"{numbers.nats(abs(loss))} ± {numbers.nats(error)} nats per token {side} that of {label(name)}"


def corpus_text(data: RunData[Any]) -> str:
    """Where the texts are from, in words."""
    source: str = data.config.data.source
    if source != "corpus":
        return source
    python = data.identity.get("versions", {}).get("python", "")
    return f"the embedded corpus (source of the standard library of Python {python})".replace(" )", ")")


def commands(data: RunData[Any], with_winner: Mapping[str, str]) -> dict[str, str]:
    """Command lines to go on from here, by what they do.

    Args:
        with_winner: those of a finished run.
    """
    run, model = shlex.quote(str(data.run.path)), shlex.quote(data.config.model.name)
    found = {} if data.result is not None else {"Continue this run": f"evoprune resume {run}"}
    found["Repeat it: the same configuration, seed and history"] = (
        f"evoprune search {data.kind} {model} --config {shlex.quote(str(data.run.path / 'config.yaml'))}"
    )
    if data.result is not None:
        found |= with_winner
    if argv := data.identity.get("argv"):
        # The address of a database may hold a password, and a page is there to be shown around.
        found["As it was started"] = re.sub(r"://[^/@\s]*@", "://***@", shlex.join(map(str, argv)))
    return found


def same_statistics(data: RunData[Any]) -> str:
    """Options of `prune` that give the run's statistics, each after a space; nothing for the usual ones."""
    return calibration_options(calibration_facts(data.config.data), data.config.seed)


def pruning(data: RunData[Any], words: str, command: str) -> dict[str, str]:
    """The command that prunes by the winner as it was searched, and where it was replayed also the one for that."""
    replayed = {} if data.contender("replayed") is None else {"The same as the winner replayed": f"{command}{OPTION}"}
    return {words: command, **replayed}


def search_on(data: RunData[Any]) -> dict[str, str]:
    """The command that searches on from a finished run."""
    more = f"--fork --set evaluations={2 * data.n_evaluations}"
    run = shlex.quote(str(data.run.path))
    return {"Search on, in a new run that reuses these evaluations": f"evoprune resume {run} {more}"}


def yaml_text(data: RunData[Any]) -> str:
    """The resolved configuration as the run's folder has it."""
    return (data.run.path / "config.yaml").read_text(encoding="utf-8").rstrip()
