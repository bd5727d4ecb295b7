"""Find the criterion that a user means: a name, an expression, or an exported file. Files are read, never executed.

A ``.py`` is trusted no further than its seal: the sha256 of its own text says that neither the formula nor a helper
was edited since the export, and only the formula and the group are taken from it, through the syntax tree. A ``.json``
carries the sha256 of its own content. Neither proves who wrote a file, and neither needs to: what is read is data of
the language.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path
from typing import Any

from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.emit_json import DIALECT
from evoprune.metrics.emit_python import FORMAT, seal
from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.expression import from_json, parse
from evoprune.metrics.files import content_hash
from evoprune.metrics.pruner_zero import PrunerZeroMetric
from evoprune.metrics.pruner_zero import from_json as tree_from_json
from evoprune.metrics.records import GROUPS, Group
from evoprune.metrics.terminals import TERMINALS

MAX_BYTES = 1_000_000
_SEAL = re.compile(r'^SEAL = "([0-9a-f]{64})"$', re.MULTILINE)
_CONSTANTS = ("FORMULA", "GROUP", "FORMAT")


def load_metric(reference: str) -> Criterion:
    """The criterion that `reference` names.

    Args:
        reference: a name of `CRITERIA`, an expression such as ``mul(abs(W),X_l2)``, or the path of an exported
            ``.json`` or ``.py``, or of a ``.json`` that Pruner-Zero released.

    Raises:
        InvalidInput: none of these; no such file; a file that was edited, is of another format version, too large, or
            does not hold a metric of the language.
    """
    reference = reference.strip()
    if reference in CRITERIA:
        return CRITERIA[reference]
    if reference.endswith((".json", ".py")):
        return load_metric_file(Path(reference))
    if "(" in reference or reference in TERMINALS:
        return Metric(parse(reference))
    if not reference or not re.fullmatch(r"[\w+.-]{1,80}", reference):
        raise InvalidInput(
            f"{reference[:60]!r} is no metric: give a name of the criteria, an expression such as mul(abs(W),X_l2), "
            "or an exported .json or .py"
        )
    raise UnknownName("criterion", reference, CRITERIA)


def load_metric_file(path: Path) -> Criterion:
    """The criterion that an exported ``.json`` or ``.py`` holds.

    Raises:
        InvalidInput: see `load_metric`.
    """
    text = _read(path)
    name = path.name[:80]
    try:
        return _from_python(text, name) if path.suffix == ".py" else _from_json_text(text, name)
    except InvalidInput as error:
        raise InvalidInput(f"{name!r}: {error}") from None
    except RecursionError:
        raise InvalidInput(f"{name!r} is nested too deeply to be an exported metric") from None


def _read(path: Path) -> str:
    shown = repr(str(path)[:200])
    try:
        if not path.is_file():
            raise InvalidInput(f"no file {shown}; give the path of an exported .json or .py")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {shown}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{shown} is larger than {MAX_BYTES // 1000} kB, so it is no exported metric")
    if not data.strip():
        raise InvalidInput(f"{shown} is empty; give an exported .json or .py")
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise InvalidInput(f"{shown} is no text file; give an exported .json or .py") from None


def _from_json_text(text: str, name: str) -> Criterion:
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, MemoryError):
        raise InvalidInput("not a JSON document of an exported metric") from None
    if isinstance(document, dict) and "data" in document:
        return PrunerZeroMetric(tree_from_json(document))
    if not isinstance(document, dict) or "format" not in document:
        raise InvalidInput('not an exported metric: it has neither a "format" nor the "data" of a Pruner-Zero tree')
    _check_format(document["format"])
    if document.get("dialect") != DIALECT:
        raise InvalidInput(f"dialect {str(document.get('dialect'))[:40]!r}; only {DIALECT!r} is read")
    if not _is_sealed(document):
        raise InvalidInput(
            "its content does not match its sha256: it was edited; export it again or give the expression"
        )
    return Metric(from_json(document.get("expr")), _group(document.get("group")), str(document.get("source", "")))


def _is_sealed(document: dict[str, Any]) -> bool:
    """Whether the document's hash is that of its content."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    try:
        return content_hash(content) == document.get("sha256")
    except (ValueError, RecursionError):
        return False


def _from_python(text: str, name: str) -> Metric:
    found = _SEAL.findall(text)
    if not found:
        raise InvalidInput("not an exported metric: it has no seal")
    if len(found) > 1 or seal(text, found[0]) != found[0]:
        raise InvalidInput("its text does not match its seal: it was edited; export it again or give the expression")
    constants = _module_constants(text)
    _check_format(constants.get("FORMAT"))
    if "FORMULA" not in constants:
        raise InvalidInput("not an exported metric: it has no FORMULA")
    return Metric(parse(constants["FORMULA"]), _group(constants.get("GROUP")), f"exported file {name}")


def _module_constants(text: str) -> dict[str, str]:
    """The string constants that an exported file assigns at its top level, each once."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InvalidInput("not an exported metric: it is no Python file") from None
    constants: dict[str, str] = {}
    for statement in body:
        if not isinstance(statement, ast.Assign):
            continue
        for target in statement.targets:
            if isinstance(target, ast.Name) and target.id in _CONSTANTS:
                value = statement.value
                if target.id in constants or not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
                    raise InvalidInput(f"{target.id} must be one string, assigned once")
                constants[target.id] = value.value
    return constants


def _check_format(value: Any) -> None:
    if value != FORMAT:
        raise InvalidInput(f"format {str(value)[:40]!r} is not known; this version reads {FORMAT!r}")


def _group(value: Any) -> Group:
    for group in GROUPS:
        if value == group:
            return group
    raise InvalidInput(f"no group {str(value)[:40]!r}; the groups are {', '.join(GROUPS)}")


def _refuse_constant(literal: str) -> float:
    raise ValueError(f"{literal} is no JSON number")
