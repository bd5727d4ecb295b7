"""What a shell completes beside commands and options: runs, models, names of plug-ins.

A shell asks on every press of a key, so nothing is loaded for an answer: runs and models are folders, and the names of
plug-ins are read from the sources that register them. Those of other packages, found by entry point, are left out.
Where nothing fits, bash and zsh go on to complete files.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

Completion = Callable[[str], list[str]]
"""Gives the words that begin with what is typed so far."""


def runs(incomplete: str) -> list[str]:
    """`latest` and the ids of runs, oldest first."""
    from evoprune.search.rundir import runs_folder

    known = sorted(file.parent.name for file in runs_folder().glob("*/run.json"))
    return _beginning(incomplete, ["latest", *known])


def models(incomplete: str) -> list[str]:
    """`reference` and the folders here that hold a model."""
    folders = sorted(file.parent.name for file in Path().glob("*/config.json"))
    return _beginning(incomplete, ["reference", *folders])


def plugins(package: str) -> Completion:
    """The completion of names that the modules of a package register, such as ``evoprune.metrics.library``."""
    return lambda incomplete: _beginning(incomplete, sorted(_registered(package)))


def _registered(package: str) -> Iterator[str]:
    """First arguments of ``REGISTRY.add("name", ...)`` and ``@REGISTRY.register("name")`` in a package's modules."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return
    for path in Path(spec.origin).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("add", "register")
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id.isupper()
                and node.args
                and isinstance(node.args[0], ast.Constant)
                and isinstance(node.args[0].value, str)
            ):
                yield node.args[0].value


def _beginning(incomplete: str, words: list[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
