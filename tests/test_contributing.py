"""The recipes of CONTRIBUTING.md: each is carried out, and its own test runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evoprune.fitness.adapters import ADAPTERS
from evoprune.fitness.adapters.multimodal import MULTIMODAL
from evoprune.fitness.allocators import ALLOCATORS
from evoprune.fitness.compressors import COMPRESSORS
from evoprune.fitness.methods import METHODS
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.recoveries import RECOVERIES
from evoprune.fitness.unit_criteria import UNIT_CRITERIA
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit_formula import latex, to_text
from evoprune.metrics.expression import parse
from evoprune.metrics.operators import OPERATORS
from evoprune.search.breeders import BREEDERS
from evoprune.search.estimators import ESTIMATORS
from evoprune.search.learners import LEARNERS
from evoprune.search.policies import POLICIES
from evoprune.search.racing import RACING_RULES
from evoprune.search.searchers import SEARCHERS
from evoprune.search.spaces import SPACES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"^`([^`\n]+)`:\n\n```\w+\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL))
RECIPES = {
    "metrics/library/wanda_l1.py": "tests/metrics/test_wanda_l1.py",
    "metrics/operators/hypotenuse.py": "tests/metrics/test_hypotenuse.py",
    "fitness/allocators/first_block.py": "tests/fitness/test_first_block.py",
    "fitness/compressors/rescaled.py": "tests/fitness/test_rescaled.py",
    "fitness/methods/last_blocks.py": "tests/fitness/test_last_blocks.py",
    "fitness/recoveries/biases.py": "tests/fitness/test_biases.py",
    "fitness/unit_criteria/column_length.py": "tests/fitness/test_column_length.py",
    "search/estimators/median.py": "tests/search/estimators/test_median.py",
    "fitness/adapters/gpt_neox.py": "tests/fitness/test_gpt_neox.py",
}


@pytest.fixture(autouse=True)
def _registries_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = (CRITERIA, OPERATORS, ADAPTERS, ALLOCATORS, COMPRESSORS, METHODS, RECOVERIES, UNIT_CRITERIA, ESTIMATORS)
    for registry in changed:
        assert len(registry) > 0  # read, so that what a recipe adds comes on top
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def run_file(path: str, folder: Path) -> dict[str, object]:
    """Write one file of the document into `folder`, import it, and return what it defines."""
    file = folder / Path(path).name
    file.write_text(FILES[path])
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does: dataclasses look their module up
    spec.loader.exec_module(module)
    return vars(module)


def test_every_file_shown_is_tested() -> None:
    assert set(FILES) == {*RECIPES, *RECIPES.values(), "pyproject.toml"}


@pytest.mark.parametrize("source", RECIPES)
def test_a_recipe_works(source: str, tmp_path: Path) -> None:
    assert (ROOT / source).parent.joinpath("__init__.py").is_file()
    assert not (ROOT / source).exists(), "the example of CONTRIBUTING.md is there already: choose another"
    run_file(source, tmp_path)
    tests = {name: test for name, test in run_file(RECIPES[source], tmp_path).items() if name.startswith("test_")}
    assert tests
    for test in tests.values():
        assert callable(test)
        test()


@pytest.mark.parametrize("path", [path for path in FILES if path.endswith(".py")])
@pytest.mark.parametrize("check", [("check", "--quiet"), ("format", "--check", "--quiet")], ids=lambda words: words[0])
def test_a_recipe_is_in_house_style(path: str, check: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "ruff", *check, "--stdin-filename", path, "-"]
    done = subprocess.run(command, input=FILES[path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_recipe_operator_reaches_every_export(tmp_path: Path) -> None:
    run_file("metrics/operators/hypotenuse.py", tmp_path)
    expression = parse("hypot(mul(W,X_l2),G_l2)")
    assert "hypot" in latex(expression)
    assert to_text(expression).startswith("hypot(")
    assert Metric(expression).needs == {"X_l2", "G_l2"}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder as pip would leave it after installing the document's example package."""
    group, entry = re.findall(r'^\[project\.entry-points\."(.+)"\]\n(.+)$', FILES["pyproject.toml"], re.MULTILINE)[0]
    (tmp_path / "my_criteria").mkdir()
    (tmp_path / "my_criteria" / "__init__.py").touch()
    (tmp_path / "my_criteria" / "wanda_l1.py").write_text(FILES["metrics/library/wanda_l1.py"])
    info = tmp_path / "my_criteria-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-criteria\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    return tmp_path


def test_the_groups_named_are_those_that_are_read() -> None:
    section = TEXT.partition("## From your own package")[2].partition("```")[0]
    registries = (CRITERIA, OPERATORS, ALLOCATORS, COMPRESSORS, UNIT_CRITERIA, ADAPTERS, MULTIMODAL, OBJECTIVES)
    registries += (METHODS, RACING_RULES, SEARCHERS, BREEDERS, RECOVERIES, POLICIES, ESTIMATORS, LEARNERS)
    assert set(re.findall(r"`(evoprune\.\w+)`", section)) == {registry.group for registry in registries}
    assert SPACES.group is None


def test_another_package_adds_a_criterion(installed: Path) -> None:
    code = "from evoprune.metrics.criterion import CRITERIA; print('wanda-l1' in CRITERIA, 'wanda' in CRITERIA)"
    done = subprocess.run([sys.executable, "-c", code], cwd=installed, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done.stderr
