"""Shell completion: installed and asked as a shell does it, with the words that it should offer, and lightly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evoprune import completion
from evoprune.fitness.allocators import ALLOCATORS
from evoprune.fitness.compressors import COMPRESSORS
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.registry import Registry
from evoprune.search.searchers import SEARCHERS

HEAVY = {"torch", "transformers", "ray", "optuna", "deap", "sympy"}
BASH = shutil.which("bash")


@pytest.mark.parametrize(
    ("package", "registry"),
    [
        ("evoprune.metrics.library", CRITERIA),
        ("evoprune.fitness.allocators", ALLOCATORS),
        ("evoprune.fitness.compressors", COMPRESSORS),
        ("evoprune.fitness.objectives", OBJECTIVES),
        ("evoprune.search.searchers", SEARCHERS),
    ],
)
def test_plugins_are_read_from_the_sources_as_the_registry_has_them(package: str, registry: Registry[object]) -> None:
    assert completion.plugins(package)("") == list(registry)
    assert completion.plugins("evoprune.nothing")("") == []


@pytest.fixture
def run_folders(place: Path) -> list[str]:
    """Two runs, and a folder that is none."""
    names = ["20260101-000000-metric-aaaa", "20260102-000000-metric-bbbb"]
    for name in names:
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "run.json").write_text("{}")
    (place / "runs" / "notes").mkdir()
    return names


def test_runs(run_folders: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completion.runs("") == ["latest", *run_folders]
    assert completion.runs("20260102") == run_folders[1:]
    assert completion.runs("runs/") == []  # a path, which the shell completes itself
    monkeypatch.setenv("EVOPRUNE_RUNS", str(place / "elsewhere"))
    assert completion.runs("") == ["latest"]


def test_models(place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "config.json").write_text("{}")
    (place / "notes").mkdir()
    assert completion.models("") == ["reference", "mine"]
    assert completion.models("m") == ["mine"]


Asked = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ask(run_folders: list[str]) -> Asked:
    """Ask for the completions of a line as bash does; the last word may be unfinished."""

    def call(*line: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        words = {
            "_EVOPRUNE_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("evoprune", *line)),
            "COMP_CWORD": str(len(line)),
        }
        command = [sys.executable, *python, "-m", "evoprune"]
        return subprocess.run(command, env=os.environ | words, capture_output=True, text=True, timeout=120, check=False)

    return call


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (("pr",), {"prune"}),
        (("search", ""), {"metric", "allocation", "joint", "structure", "policy", "experts"}),
        (("show", "20260101"), {"20260101-000000-metric-aaaa"}),
        (("show", "la"), {"latest"}),
        (("prune", "ref"), {"reference"}),
        (("prune", "reference", "--metric", "wand"), {"wanda", "wanda++"}),
        (("prune", "reference", "--gro"), {"--group"}),
        (("search", "metric", "--searcher", "e"), {"evolution"}),
        (("search", "metric", "--seed-from", "lat"), {"latest"}),
        (("list", "crit"), {"criteria"}),
        (("show", "runs/x"), set()),
    ],
    ids=lambda words: " ".join(sorted(words) if isinstance(words, set) else words),
)
def test_what_a_shell_is_offered(line: tuple[str, ...], expected: set[str], ask: Asked) -> None:
    done = ask(*line)
    assert set(done.stdout.split()) == expected
    assert done.stderr == ""


@pytest.mark.parametrize("line", [("prune", "reference", "--metric", ""), ("show", "")], ids=" ".join)
def test_an_answer_loads_nothing_heavy(line: tuple[str, ...], ask: Asked) -> None:
    done = ask(*line, python=("-X", "importtime"))
    assert len(done.stdout.split()) > 2
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "evoprune.completion" in loaded
    assert not HEAVY & loaded


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_it_installs_itself_and_bash_completes(place: Path, tmp_path: Path) -> None:
    """As a user does it: one command, then a new shell."""
    home, bin_folder = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    bin_folder.mkdir()
    launcher = bin_folder / "evoprune"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m evoprune "$@"\n')
    launcher.chmod(0o755)
    environment = os.environ | {"HOME": str(home), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}

    def bash(script: str) -> str:
        done = subprocess.run(
            [str(BASH), "--norc", "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # A second command keeps bash from handing its own process over to the only one.
    assert "bash completion installed" in bash("evoprune --install-completion; code=$?; exit $code")
    assert "complete -o default -F _evoprune_completion evoprune" in bash("evoprune --show-completion; exit $?")
    offered = bash(
        "source ~/.bashrc; COMP_WORDS=(evoprune ex); COMP_CWORD=1; _evoprune_completion evoprune ex evoprune;"
        'echo "${COMPREPLY[@]}"'
    )
    assert offered.split() == ["export"]
