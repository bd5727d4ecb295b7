"""The source of an exported metric's ``score``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

from evoprune.metrics.emit_selftest import DERIVED, arguments
from evoprune.metrics.expression import CONSTANT, Expression
from evoprune.metrics.terminals import TERMINALS
from evoprune.metrics.types import Type

WIDTH = 110
_LONGEST_NAME = 24
_SHAPES = {
    Type.MAT: "[out, in]",
    Type.INVEC: "[in] or [1, in]",
    Type.OUTVEC: "[out] or [out, 1]",
    Type.SCAL: "a number",
}


def wrapped(lines: Iterable[str], indent: str = "") -> str:
    """Lines for people, folded to the width of an exported file."""
    return "\n".join(
        textwrap.fill(line, WIDTH, initial_indent=indent, subsequent_indent=indent + "    ") for line in lines
    )


def _signature(names: Iterable[str]) -> str:
    keywords = ", ".join(names)
    return f"W, *, {keywords}" if keywords else "W"


def score_source(expression: Expression) -> str:
    """The source of ``score``: clamps, expansions and operators as in the interpreter, one statement a node."""
    names = arguments(expression)
    lines = ["W [out, in]: signed weight, of any float dtype."]
    for name in names:
        terminal = TERMINALS[name]
        lines.append(f"{name} {_SHAPES[terminal.type]}: {terminal.meaning}.")
    body = "\n".join(f"    {line}" for line in _steps(expression))
    return (
        f"@torch.no_grad()\ndef score({_signature(names)}):\n"
        '    """float32 [out, in], low = removed first; finite for finite inputs.\n\n'
        f'{wrapped(lines, "    ")}\n    """\n{body}\n'
    )


def _steps(expression: Expression) -> list[str]:
    """The statements of `score`: one for each distinct node, in the interpreter's order."""
    lines: list[str] = []
    names: dict[Expression, str] = {}
    for node in distinct(expression):
        if node.head == CONSTANT:
            names[node] = f"c{sum(other.head == CONSTANT for other in names) + 1}"
            lines.append(f"{names[node]} = {_scalar(repr(node.value))}")
        elif not node.args:
            names[node] = node.head
            lines.append(f"{node.head} = {_read(node.head)}")
        else:
            reads = [names[arg] for arg in node.args]
            if node.operator.kind not in ("elementwise", "power"):
                # A reduction of a vector is that of the matrix it broadcasts to.
                reads = [read if node.args[0].type is Type.MAT else f"{read}.expand(W.shape)" for read in reads]
            if node.value is not None:
                reads.append(repr(node.value))
            names[node] = _name(node, names)
            lines.append(f"{names[node]} = {node.operator.function.__name__}({', '.join(reads)})")
    return [*lines, f"return {names[expression]}.expand(W.shape)"]


def distinct(expression: Expression) -> list[Expression]:
    """Every distinct node once, arguments before what reads them."""
    order: dict[Expression, None] = {}

    def visit(node: Expression) -> None:
        if node not in order:
            for arg in node.args:
                visit(arg)
            order[node] = None

    visit(expression)
    return list(order)


def _name(node: Expression, names: Mapping[Expression, str]) -> str:
    """A name for a result: from operator and argument if that is short and new, else the operator and a number."""
    name = f"{node.head}_{names[node.args[0]]}"
    if len(node.args) > 1 or len(name) > _LONGEST_NAME or name in names.values():
        name = f"{node.head}_{len(names) + 1}"
    return name


def _scalar(value: str) -> str:
    return f"torch.full((1, 1), {value}, dtype=torch.float32, device=W.device)"


def _read(name: str) -> str:
    if name in DERIVED:
        return _scalar(f"math.log(W.shape[{1 if name == 'n_in' else 0}])")
    shape = TERMINALS[name].type
    if shape is Type.SCAL:
        return _scalar(f"float({name})")
    reshape = {Type.INVEC: ".reshape(1, -1)", Type.OUTVEC: ".reshape(-1, 1)"}.get(shape, "")
    return f"{name}.float(){reshape}.clamp(-BOUND, BOUND)"
