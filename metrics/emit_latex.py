"""A metric as a piece of LaTeX: the formula, its symbols, and the formula up to scale where that is plainer."""

from __future__ import annotations

import re

from evoprune.metrics.criterion import Metric
from evoprune.metrics.emit_formula import latex, without_scale
from evoprune.metrics.expression import Expression
from evoprune.metrics.terminals import TERMINALS

_WITHIN = {"row": "each row", "layer": "the matrix", "global": "the whole model"}

# What the operators' names stand for; those of mathematics need no words.
_WORDS = {
    "mms_t": r"$\operatorname{minmax}(x) = (x - \min x)/(\max x - \min x)$ with extrema over the whole matrix",
    "mms_r": r"$\operatorname{minmax}_\mathrm{row}(x) = (x - \min x)/(\max x - \min x)$ with extrema over each row",
    "zsn_t": r"$\operatorname{zscore}(x)$ is $x$ minus its mean, over its standard deviation, in the whole matrix",
    "zsn_r": r"$\operatorname{zscore}_\mathrm{row}(x)$ is $x$ minus its mean, over its standard deviation, in each row",
    "reduce_row": r"the subscript $\mathrm{row}$ means: over the inputs, one value a row",
    "reduce_column": r"the subscript $\mathrm{col}$ means: over the outputs, one value a column",
    "reduce_all": r"the subscript $\mathrm{all}$ means: over the whole matrix",
}


def tex_source(metric: Metric, *, title: str, json_hash: str) -> str:
    """The text of ``metric.tex``, to be input in a document that uses amsmath."""
    formula = latex(metric.expression)
    clauses = [*_operator_clauses(metric.expression), *_terminal_clauses(metric.expression)]
    lines = [
        f"% {' '.join(title.split())}",
        f"% {metric.expression.text}",
        f"% metric-json sha256: {json_hash}; needs \\usepackage{{amsmath}}",
        "\\[",
        f"  S = {formula}",
        "\\]",
        f"where {'; '.join(clauses)}." if clauses else "",
        f"Scores are compared within {_WITHIN[metric.group]}; the lowest are removed first.",
    ]
    plain = latex(without_scale(metric.expression))
    # A matrix's scale matters when matrices are compared with each other.
    if plain != formula and metric.group != "global":
        lines += [
            "Up to a positive factor, which changes no mask,",
            "\\[",
            f"  S \\propto {plain}.",
            "\\]",
        ]
    return "\n".join(line for line in lines if line) + "\n"


def _operator_clauses(expression: Expression) -> list[str]:
    used = {node.head for node in expression.walk() if node.args}
    used |= {node.operator.kind for node in expression.walk() if node.args}
    return [words for name, words in _WORDS.items() if name in used]


def _terminal_clauses(expression: Expression) -> list[str]:
    return [
        f"${terminal.latex}$ is the {_words(terminal.meaning)}"
        for name, terminal in TERMINALS.items()
        if name in expression.terminals
    ]


def _words(meaning: str) -> str:
    """A terminal's meaning for running text: bars in math mode, names of the language as their symbols."""
    meaning = re.sub(r"\w+_\w+", lambda name: f"${TERMINALS[name[0]].latex}$", meaning)
    return re.sub(r"\|(\w)\|", r"$|\1|$", meaning)
