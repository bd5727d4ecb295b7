"""An allocation formula as one Python file that needs nothing but Python itself.

The file carries the operators that the formula uses and the rule from scores to levels, word for word, and the
statistics that the formula reads of one model: run as a script it prints that model's allocation.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from evoprune.metrics import formula_operators, formula_rule
from evoprune.metrics.allocation_formula import AllocationFormula, Statistics
from evoprune.metrics.emit_runtime import removed_count
from evoprune.metrics.expression import CONSTANT, Expression
from evoprune.metrics.formula_operators import BOUND, FUNCTIONS, TINY
from evoprune.metrics.records import LEVELS, Site

_RULE: tuple[Callable[..., Any], ...] = (
    formula_rule.requested_sparsities,
    formula_rule.levels_at_budget,
    formula_rule.shifted,
    formula_rule.settle,
    formula_rule.moves_within,
    formula_rule.nearest_pair,
    removed_count,
)


def allocation_source(
    formula: AllocationFormula, statistics: Statistics, sites: Sequence[Site], sparsity: float, *, title: str
) -> str:
    """The file's text.

    Args:
        statistics: of the matrices of one model; what the formula reads of them goes into the file.
        sites: these matrices.
        sparsity: that the file removes of this model, when run.
        title: one line for people.
    """
    nodes = list(dict.fromkeys(_arguments_first(formula.expression)))
    heads = {node.head for node in nodes if node.args}
    functions: list[Callable[..., Any]] = [
        formula_operators.bounded,
        *(FUNCTIONS[name] for name in FUNCTIONS if name in heads),
    ]
    return "\n".join(
        [
            f'"""{_plain(title)}\n\n{_plain(formula.text)}\n\n{_meanings(formula)}\n"""\n',
            "from __future__ import annotations\n",
            "import json\nimport math\nfrom bisect import bisect_left, bisect_right\nfrom itertools import pairwise\n",
            f"LEVELS = {LEVELS}\nBOUND = {BOUND!r}\nTINY = {TINY!r}\nSPREAD = {formula.spread!r}",
            f"SPARSITY = {sparsity!r}",
            f"NAMES = {_listed([site.name for site in sites])}",
            f"SIZES = {_listed([(site.out_features, site.in_features) for site in sites])}",
            f"STATISTICS = {_mapped({name: list(statistics[name]) for name in formula.reads})}\n",
            "Vector = list[float]\n",
            *(f"\n{inspect.getsource(function)}" for function in functions),
            *(f"\n{inspect.getsource(function)}" for function in _RULE),
            f"\n{_score_source(nodes)}",
            f"\n{_ALLOCATE}",
        ]
    )


_ALLOCATE = '''def allocate(statistics, sizes, sparsity):
    """Sparsity of each matrix, in steps of 1/256, such that all together lose `sparsity` of their weights.

    statistics: one number per matrix, by name, as in STATISTICS; sizes: (outputs, inputs) of each matrix.
    """
    budget = removed_count(sparsity, sum(outputs * inputs for outputs, inputs in sizes))
    requested = requested_sparsities(score(statistics, len(sizes)), SPREAD, sparsity)
    return [level / LEVELS for level in levels_at_budget(requested, sizes, budget)]


if __name__ == "__main__":
    print(json.dumps(dict(zip(NAMES, allocate(STATISTICS, SIZES, SPARSITY), strict=True)), indent=1))
'''


def _arguments_first(node: Expression) -> list[Expression]:
    return [*(below for arg in node.args for below in _arguments_first(arg)), node]


def _score_source(nodes: Sequence[Expression]) -> str:
    """One statement for each distinct node, arguments before what reads them."""
    names = {node: f"v{number}" for number, node in enumerate(nodes, 1)}
    lines = []
    for node in nodes:
        if node.head == CONSTANT:
            value = f"[{node.value!r}] * count"
        elif not node.args:
            value = f'[bounded(value) for value in statistics["{node.head}"]]'
        else:
            arguments = [names[arg] for arg in node.args] + ([] if node.value is None else [repr(node.value)])
            value = f"{_name(FUNCTIONS[node.head])}({', '.join(arguments)})"
        lines.append(f"    {names[node]} = {value}\n")
    text = '    """One number per matrix; high keeps more."""\n'
    return f"def score(statistics, count):\n{text}{''.join(lines)}    return {names[nodes[-1]]}\n"


def _name(function: Callable[..., Any]) -> str:
    return function.__name__


def _meanings(formula: AllocationFormula) -> str:
    lines = [f"{name}: {what}" for name, what in formula.meanings().items()]
    lines.append("S: sparsity of the whole model; squash(x): tanh(z / 2), z being x standardised over all matrices")
    return "\n".join(map(_plain, lines))


def _plain(text: str) -> str:
    """`text` on one line that cannot end a docstring."""
    line = "".join(character if character.isprintable() else " " for character in text)
    return line.replace("\\", "/").replace('"', "'").encode(errors="replace").decode()


def _listed(values: Sequence[Any]) -> str:
    rows = "".join(f"    {_literal(value)},\n" for value in values)
    return f"[\n{rows}]"


def _mapped(values: dict[str, list[float]]) -> str:
    rows = "".join(f'    "{name}": {json.dumps(numbers)},\n' for name, numbers in values.items())
    return f"{{\n{rows}}}"


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
