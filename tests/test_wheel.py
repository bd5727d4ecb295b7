"""The wheel in a stranger's hands: what is in it, and that it works in an environment without this repository.

It is installed without its dependencies into an
environment of its own that borrows those of this one. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.door.conftest import CONFIG
from tests.models import save_tiny
from tests.test_house import HEAVY, MODULES, ROOT, package_of, run_python, source_files
from tests.wheels import build_wheel

pytestmark = pytest.mark.slow

HELP_SECONDS = 5.0  # a second where nothing else runs; see benchmarks/startup.py


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel in it, and a folder to work in."""

    folder: Path
    place: Path

    @property
    def package(self) -> Path:
        """Where the installed package must be."""
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)})) / "evoprune"

    def python(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run its interpreter where the repository is not, with nothing of this process's set-up."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EVOPRUNE_"))}
        command = [str(self.folder / "bin" / "python"), *map(str, words)]
        environment = kept | {"EVOPRUNE_CACHE": str(self.place / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, cwd=self.place, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    def evoprune(self, *words: str | Path) -> Any:
        """What the installed command prints as JSON."""
        return json.loads(self.python(self.folder / "bin" / "evoprune", *words, "--json").stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("stranger")
    environment = Environment(folder / "venv", folder / "place")
    environment.place.mkdir()
    run_python("-m", "venv", "--without-pip", str(environment.folder), cwd=folder)
    pip = (
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "--python",
        str(environment.folder / "bin" / "python"),
    )
    run_python(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    # A folder that a .pth file names is searched, but its own .pth files are not read: the dependencies are found, and
    # the hook of the editable install, which would find in the repository what the wheel lacks, is not.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (environment.package.parent / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return environment


def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"{package_of(p.parent).replace('.', '/')}/{p.name}" for p in source_files(ROOT)}
    assert packed == expected
    for name in (
        "py.typed", "search/report/page.html.jinja", "search/report/page.css", "search/report/script.js.jinja",
        "fitness/reference/model.safetensors", "fitness/reference/tokenizer.json", "fitness/reference/README.md",
    ):  # fmt: skip
        assert f"evoprune/{name}" in packed


def test_every_module_is_the_wheels_own(installed: Environment) -> None:
    names = [m.name for m in MODULES if not m.name.endswith("__main__")]
    code = f"import importlib\nprint(*(importlib.import_module(name).__file__ for name in {names}), sep='\\n')"
    files = installed.python("-c", code).stdout.splitlines()
    assert [file for file in files if not Path(file).is_relative_to(installed.package)] == []
    assert len(files) == len(names)


def test_help_comes_at_once_and_loads_nothing_heavy(installed: Environment) -> None:
    started = monotonic()
    done = installed.python("-X", "importtime", installed.folder / "bin" / "evoprune", "--help")
    seconds = monotonic() - started
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "Usage: evoprune" in done.stdout and "evoprune.cli" in loaded
    assert not HEAVY & loaded
    assert seconds < HELP_SECONDS


def test_a_search_outside_the_repository(installed: Environment) -> None:
    """From a model folder to a winner, its report, and its file, which runs with nothing but torch."""
    save_tiny(installed.place / "tiny")
    (installed.place / "small.yaml").write_text(CONFIG)
    words = ("search", "metric", "tiny", "--config", "small.yaml", "--executor", "inline", "--run-dir", "run")
    document = installed.evoprune(*words)
    assert (document["state"], document["evaluations"]) == ("finished", 24)
    run = installed.place / "run"
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")

    code = (
        "import runpy, sys\n"
        "sys.modules['evoprune'] = None\n"
        "try: runpy.run_path('run/export/metric.py', run_name='__main__')\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = set(installed.python("-c", code).stdout.split())
    assert "torch" in loaded
    assert not (HEAVY - {"torch", "sympy"}) & loaded  # torch itself may load sympy


def test_the_reference_model_is_found_and_measured(installed: Environment) -> None:
    document = installed.evoprune("eval", "reference", "--tokens", "512")
    assert document["tokens"] == 510
    assert 1 < document["perplexity"] < 200
