"""The held-out table as LaTeX, for a paper."""

from __future__ import annotations

from collections.abc import Sequence

from evoprune.search.report.names import label
from evoprune.search.report.numbers import nats, perplexity, signed
from evoprune.search.report.run_data import Contender

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_"},
}


def escape(text: str) -> str:
    """`text` so that LaTeX prints it as it is."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def latex_table(rows: Sequence[Contender], caption: str, entrant: str = "Criterion") -> str:
    """A ``table`` environment that uses booktabs.

    Args:
        entrant: head of the first column.
    """
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escape(caption)}}}",
        r"  \begin{tabular}{lrrrr}",
        r"    \toprule",
        f"    {escape(entrant)} & Perplexity & Loss & KL to dense & Minus winner's \\\\",
        r"    \midrule",
    ]
    for row in rows:
        values = row.heldout
        difference = "--" if row.difference is None else _math(signed(row.above), row.difference["stderr"])
        cells = [
            escape(label(row.name)),
            perplexity(values["perplexity"]),
            _math(nats(values["loss"]), values["stderr"]),
            "--" if row.name == "dense" else f"${nats(values['kl'])}$",
            difference,
        ]
        lines.append(f"    {' & '.join(cells)} \\\\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]) + "\n"


def _math(value: str, error: float) -> str:
    return f"${value} \\pm {nats(error)}$".replace("−", "-")
