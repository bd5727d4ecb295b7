"""The rules of the house: which layer may import what, what is packaged, and what no file may call."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = ("metrics", "fitness", "search")
# From the bottom up: a layer may import itself and those before it. The door (`evoprune` itself) may import all.
LAYERS = ("evoprune.metrics", "evoprune.fitness", "evoprune.search", "evoprune")
HEAVY = {"torch", "transformers", "ray", "optuna", "deap", "sympy"}
# These modules alone may import the package.
ONLY_IN = {
    "ray": {"evoprune.search.engine.ray", "evoprune.search.engine.librarian"},
    "optuna": {
        *(f"evoprune.search.engine.board_{part}" for part in ("server", "storage", "studies")),
        "evoprune.search.breeders.profiles",  # for its samplers
    },
}
# What the metrics must work without: an exported metric needs no model, no cluster and no search.
NOT_IN_METRICS = {"transformers", "ray", "deap", "optuna"}
# Text becomes code or objects through these; every parser here is our own or returns plain data.
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr"}
FORBIDDEN_METHODS = {
    "sympify", "parse_expr", "from_string", "builtins.eval", "builtins.exec", "gp.compile", "pickle.load",
    "pickle.loads", "torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
}  # fmt: skip
# Extras that cannot be installed beside the others; see pyproject.toml.
APART = {"llmcompressor"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


@dataclass(frozen=True)
class Module:
    """One source file under its name in the installed package."""

    name: str
    path: Path
    tree: ast.Module


def package_of(folder: Path) -> str:
    """The package that a source folder is mapped to, such as ``evoprune.search.engine``; ``evoprune`` for the door."""
    parts = folder.relative_to(ROOT).parts
    return ".".join(("evoprune", *parts)) if parts != ("search", "_root") else "evoprune"


def modules() -> Iterator[Module]:
    """Every source file of the three folders."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            package = package_of(path.parent)
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            yield Module(name, path, ast.parse(path.read_text(), filename=str(path)))


MODULES = list(modules())


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it: deferred, type-checking and `import_module` ones too.

    `from package import name` gives both ``package`` and ``package.name``, since `name` may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{'.' * node.level}{node.module or ''}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.level == 0)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            words = (word.value for word in node.args if isinstance(word, ast.Constant))
            yield from (word for word in words if isinstance(word, str))


def layer(name: str) -> int:
    """Height of the layer that a module name of ours belongs to."""
    return next(i for i, package in enumerate(LAYERS) if name == package or name.startswith(f"{package}."))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def faulty_imports(module: Module) -> list[str]:
    """What a module imports against the rules."""
    faults = []
    # `from evoprune import metrics` names the bottom layer, not the door.
    for name in {n for n in imported(module.tree) if n != "evoprune" or module.name == "evoprune"}:
        ours = within(name, "evoprune")
        top = name.partition(".")[0]
        if (
            name.startswith(".")
            or top in FOLDERS
            or within(name, "evoprune.search._root")
            or (ours and layer(name) > layer(module.name))
            or (top in ONLY_IN and module.name not in ONLY_IN[top])
            or (top in NOT_IN_METRICS and within(module.name, "evoprune.metrics"))
        ):
            faults.append(name)
    return sorted(faults)


def forbidden_calls(tree: ast.Module) -> list[str]:
    """Calls and imports that could turn text into code or objects."""
    found = [name for name in imported(tree) if name.partition(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last_two = ".".join(called.split(".")[-2:])
            # torch unpickles nothing but tensors when it is told so.
            if called == "torch.load" and "weights_only=True" in ast.unparse(node):
                continue
            # Another function by the same last two names: a safetensors file holds a header and numbers.
            if called == "safetensors.torch.load":
                continue
            if called in FORBIDDEN_NAMES or FORBIDDEN_METHODS & {last_two, called.rpartition(".")[2]}:
                found.append(f"{called} in line {node.lineno}")
    return found


def test_imports_point_down() -> None:
    assert {m.name: faults for m in MODULES if (faults := faulty_imports(m))} == {}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("evoprune.metrics.mask", "import evoprune.fitness.models"),
        ("evoprune.metrics.mask", "def f():\n    from evoprune import search"),
        ("evoprune.metrics.mask", "from transformers import AutoModel"),
        ("evoprune.fitness.models", "if TYPE_CHECKING:\n    from evoprune.search.rundir import RunDirectory"),
        ("evoprune.fitness.models", "importlib.import_module('evoprune.search')"),
        ("evoprune.search.loop", "from evoprune.cli import main"),
        ("evoprune.search.loop", "import ray.exceptions"),
        ("evoprune.search.loop", "import optuna"),
        ("evoprune.search.loop", "from evoprune.search._root import cli"),
        ("evoprune.search.loop", "from search import engine"),
        ("evoprune.search.loop", "from . import engine"),
    ],
)
def test_a_faulty_import_is_seen(name: str, source: str) -> None:
    assert faulty_imports(Module(name, ROOT, ast.parse(source)))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("evoprune.cli", "from evoprune.search import rundir"),
        ("evoprune.search.loop", "from evoprune import metrics"),
        ("evoprune.search.engine.ray", "import ray"),
        ("evoprune.metrics.errors", "import torch"),
    ],
)
def test_a_right_import_is_left_alone(name: str, source: str) -> None:
    assert faulty_imports(Module(name, ROOT, ast.parse(source))) == []


def test_no_text_becomes_code() -> None:
    assert {m.name: found for m in MODULES if (found := forbidden_calls(m.tree))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "exec(text)", "sympy.sympify(text)", "parse_expr(text)", "import pickle", "torch.load(path)",
        "yaml.load(text)", "gp.PrimitiveTree.from_string(text, pset)", "deap.gp.compile(tree)", "__import__(name)",
    ],
)  # fmt: skip
def test_a_forbidden_call_is_seen(source: str) -> None:
    assert forbidden_calls(ast.parse(source))


def test_a_harmless_call_is_left_alone() -> None:
    assert forbidden_calls(ast.parse("model.eval(); re.compile(p); ast.literal_eval(t); yaml.safe_load(t)")) == []
    assert forbidden_calls(ast.parse("safetensors.torch.load(data); torch.load(f, weights_only=True)")) == []


def test_every_package_is_listed() -> None:
    found = {package_of(init.parent) for folder in FOLDERS for init in (ROOT / folder).rglob("__init__.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_packages_are_mapped_to_their_folders() -> None:
    assert SETUPTOOLS["package-dir"] == {"evoprune": "search/_root", **{f"evoprune.{f}": f for f in FOLDERS}}


def test_every_folder_with_sources_is_a_package() -> None:
    missing = {p.parent for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")}
    assert [str(folder) for folder in sorted(missing) if not (folder / "__init__.py").is_file()] == []


def run_python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_every_module_imports_under_its_own_name_only() -> None:
    """Started in the repository root, where a bare `import search` would succeed as a second copy."""
    names = [m.name for m in MODULES if not m.name.endswith("__main__")]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = set(run_python("-c", code, cwd=ROOT).stdout.split())
    assert set(names) <= loaded
    assert not {*FOLDERS, "evoprune.search._root"} & loaded


@pytest.mark.parametrize("words", [("-c", "import evoprune"), ("-m", "evoprune", "--help")])
def test_the_door_opens_without_heavy_imports(words: tuple[str, ...], tmp_path: Path) -> None:
    log = run_python("-X", "importtime", *words, cwd=tmp_path).stderr
    loaded = {line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")}
    assert "evoprune" in loaded
    assert not HEAVY & loaded


def source_files(folder: Path) -> Iterator[Path]:
    """Files that belong to the packages: everything in their folders but caches."""
    for name in FOLDERS:
        yield from (p for p in (folder / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts)


# A beta, too: OpenTelemetry's exporters have never had anything else.
PIN = r'[a-z0-9-]+==[0-9.]+(b[0-9]+)?(; python_version (<|>=) "3\.\d+")?'


def test_constraints_are_plain_pins() -> None:
    """One pinned version a line for every direct dependency; no local suffix such as +cpu, no path, no address."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [p for p in pins if not re.fullmatch(PIN, p)] == []
    together = PYPROJECT["project"]["optional-dependencies"].keys() - APART
    assert declared(*together) - {pin.partition("==")[0] for pin in pins} == set()


def declared(*extras: str) -> set[str]:
    """Names of the distributions that an installation with these extras brings."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(d for extra in extras for d in project["optional-dependencies"][extra])]
    return {re.split(r"[>=;\[ ]", line)[0].lower() for line in lines}


def distributions(names: Iterable[str]) -> set[str]:
    """The distributions that third-party module names come from."""
    tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"evoprune"}
    return {{"yaml": "pyyaml", "PIL": "pillow"}.get(top, top.replace("_", "-")) for top in tops}


def test_every_import_is_a_declared_dependency() -> None:
    """What an extra brings is imported where it is used, so the rest works without it."""
    for module in MODULES:
        extras = ("dashboard", "data", "diffusion", "llmcompressor", "recovery", "tasks", "torch-pruning")
        assert distributions(imported(module.tree)) <= declared(*extras), module.name
        top_level = ast.Module([n for n in module.tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        assert distributions(imported(top_level)) <= declared(), module.name


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("interpreter", "message"),
    [
        (None, "not found; install Python 3.10 or newer"),
        ('[ "$1" = -V ] && echo Python 3.9.2; [ "$1" = -V ]', "needs Python 3.10 or newer and"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "apt install python3-venv"),
    ],
    ids=["absent", "too old", "without venv"],
)
def test_make_says_what_python_lacks(interpreter: str | None, message: str, tmp_path: Path) -> None:
    python = tmp_path / "python3"
    if interpreter is not None:
        python.write_text(f"#!/bin/sh\n{interpreter}\n")
        python.chmod(0o755)
    command = ["make", "search", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    # A make that runs these tests would tell its child that it is a child.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ") and message in line]
    assert not (tmp_path / "venv").exists()
