"""A metric as one Python file that needs nothing but torch.

The file carries the source of the operators that it uses, and the steps of the interpreter written out: the same
clamps, the same expansions, each distinct subexpression once. So it gives the interpreter's scores bit for bit on the
CPU. It ends with a self-test, and carries a seal over its own text, which tells an edited file from an exported one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from evoprune.metrics.criterion import Metric
from evoprune.metrics.emit_formula import to_text
from evoprune.metrics.emit_runtime import draw, keep_largest, removed_count
from evoprune.metrics.emit_score import WIDTH, distinct, score_source, wrapped
from evoprune.metrics.emit_selftest import ROWS, SelfTest, arguments, is_signed
from evoprune.metrics.expression import Expression
from evoprune.metrics.operators import BOUND, TINY
from evoprune.metrics.records import MaskRule
from evoprune.metrics.terminals import TERMINALS

FORMAT = "symbolic-metric/1"
_HEADER_VALUE = 300

_GROUP_WORDS = {
    "row": ("rows = scores", "every row loses floor(sparsity * in) weights"),
    "layer": ("rows = scores.reshape(1, -1)", "the matrix loses floor(sparsity * out * in) weights"),
    "global": (
        "rows = scores.reshape(1, -1)",
        "the matrix loses floor(sparsity * out * in) weights (to compare across matrices, join their scores first)",
    ),
}


def seal(text: str, value: str) -> str:
    """The text's seal: sha256 of `text` without the seal's own `value`, in hex."""
    return hashlib.sha256(text.replace(value, "").encode()).hexdigest()


def python_source(
    metric: Metric, rule: MaskRule, selftest: SelfTest, *, title: str, notes: Mapping[str, Any], json_hash: str
) -> str:
    """The file's text.

    Args:
        rule: what `mask` does when called without a sparsity or a pattern.
        title: one line for people.
        notes: what else the header says, one line each; values are plain data.
        json_hash: sha256 of the ``metric.json`` of the same export.

    Raises:
        OSError, TypeError: an operator's source is not to be found (one that was defined in an interactive session).
    """
    expression = metric.expression
    helpers = {node.operator.function for node in distinct(expression) if node.args}
    sources = [_source(function) for function in sorted(helpers, key=lambda helper: helper.__name__)]
    parts = [
        _header(metric, title, notes, json_hash),
        "import hashlib\nimport math\nimport sys\n\nimport torch\nfrom torch import Tensor\n",
        _constants(metric, any("TINY" in source for source in sources)),
        *[f"\n\n{source}" for source in sources],
        f"\n\n{score_source(expression)}",
        *[f"\n\n{_source(function)}" for function in (removed_count, keep_largest)],
        f"\n\n{_mask(metric, rule)}",
        f"\n\n{_source(draw)}",
        f"\n\n{_selftest(expression, selftest)}",
    ]
    text = "".join(parts)
    return text.replace('SEAL = ""', f'SEAL = "{seal(text, "")}"', 1)


def _source(function: Callable[..., Any]) -> str:
    return textwrap.dedent(inspect.getsource(function))


def _plain(value: Any) -> str:
    """`value` on one line that cannot end a docstring."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(character if character.isprintable() else " " for character in text[:_HEADER_VALUE])
    return text.replace("\\", "/").replace('"', "'").encode(errors="replace").decode()


def _header(metric: Metric, title: str, notes: Mapping[str, Any], json_hash: str) -> str:
    within = "each row" if metric.group == "row" else "the matrix"
    call = "".join(f", {name}={name}" for name in arguments(metric.expression) if name != "sparsity")
    lines = [
        _plain(title),
        "",
        f"score = {_plain(to_text(metric.expression))}   (compared within {within}, lowest removed first)",
        f"Use: keep = mask(layer.weight{call}). Run this file to test it.",
        *(f"{_plain(name)}: {_plain(value)}" for name, value in notes.items()),
        f"metric-json sha256: {json_hash}",
    ]
    return f'"""{wrapped(lines)}\n"""\n\n'


def _constants(metric: Metric, needs_tiny: bool) -> str:
    requires = "".join(f'"{name}", ' for name in arguments(metric.expression)).rstrip()
    requires = requires.rstrip(",") if requires.count(",") > 1 else requires
    lines = [
        f"FORMULA = {_literal(metric.expression.text)}",
        f"REQUIRES = ({requires})",
        f'GROUP = "{metric.group}"',
        f'FORMAT = "{FORMAT}"',
        'SEAL = ""',
        f"BOUND = {_number(BOUND)}",
        *([f"TINY = {_number(TINY)}"] if needs_tiny else []),
    ]
    return "\n" + "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return repr(value).replace("e+", "e")


def _literal(text: str) -> str:
    """A string of the expression language as Python source, over several lines if it is long."""
    if len(text) < WIDTH - 20:
        return f'"{text}"'
    pieces = [text[i : i + WIDTH - 10] for i in range(0, len(text), WIDTH - 10)]
    return "(\n" + "\n".join(f'    "{piece}"' for piece in pieces) + "\n)"


def _mask(metric: Metric, rule: MaskRule) -> str:
    rows, words = _GROUP_WORDS[metric.group]
    target = "sparsity=1 - nm[0] / nm[1] if nm else sparsity, " if "sparsity" in metric.expression.terminals else ""
    default = f"\n    if sparsity is None and nm is None:\n        nm = {rule.pattern}" if rule.pattern else ""
    return f'''def mask(W, sparsity={rule.sparsity!r}, nm=None, **stats):
    """True = keep, bool [out, in]: {words}.

    With nm=(n, m) every m consecutive columns of a row keep n instead. Of equal scores the lower column goes first.
    The statistics are those of `score`.
    """{default}
    scores = score(W, {target}**stats)
    if nm is not None:
        kept, width = nm
        if not 0 < kept < width or W.shape[1] % width:
            raise ValueError(f"{{kept}}:{{width}} needs 0 < N < M and a number of inputs that M divides")
        return keep_largest(scores.reshape(-1, width), width - kept).reshape(W.shape)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {{sparsity}} is outside [0, 1)")
    {rows}
    return keep_largest(rows, removed_count(sparsity, rows.shape[1])).reshape(W.shape)
'''


def _selftest(expression: Expression, test: SelfTest) -> str:
    def drawn(name: str) -> str:
        rows, columns = TERMINALS[name].type.shape(ROWS, test.columns)
        number = f"draw({test.seeds[name]}, {rows}, {columns})"
        return f"2 * {number} - 1" if is_signed(name) else number

    names = [name for name in arguments(expression) if name != "sparsity"]
    statistics = "".join(f'\n        "{name}": {drawn(name)},' for name in names)
    fraction = f"sparsity={test.rule.fraction!r}, " if "sparsity" in expression.terminals else ""
    options = f"sparsity={test.rule.sparsity!r}" if test.rule.pattern is None else f"nm={test.rule.pattern!r}"
    samples = "".join(f"\n        {_number(sample)}," for sample in test.samples)
    return f'''def _selftest(source=None):
    """Whether this file still computes what it did when it was exported, and, given its own text, is unchanged."""
    W = {drawn("W")}
    stats = {{{statistics}
    }}
    expected = [{samples}
    ]
    found = score(W, {fraction}**stats).flatten()[::{test.stride}][:{ROWS}].tolist()
    slack = 1e-6 * max(map(abs, expected))
    kept = mask(W, {options}, **stats).flatten().tolist()
    faults = []
    if not all(math.isclose(x, y, rel_tol=1e-5, abs_tol=slack) for x, y in zip(found, expected, strict=True)):
        faults.append("the scores are not those of the export")
    if hashlib.sha256(bytes(kept)).hexdigest() != "{test.mask_sha256}":
        faults.append("the mask is not that of the export")
    if source is not None and hashlib.sha256(source.replace(SEAL, "").encode()).hexdigest() != SEAL:
        faults.append("the file was edited after its export")
    print("self-test: " + ("; ".join(faults) or "passed"))
    return not faults


if __name__ == "__main__":
    with open(__file__, encoding="utf-8") as stream:
        sys.exit(0 if _selftest(stream.read()) else 1)
'''.replace("{\n    }", "{}")
