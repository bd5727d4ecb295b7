"""What every command line must do: help, version, usage errors, lists, doctor, completion."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import evoprune
from evoprune.checks import EXTRAS
from evoprune.cli import ORDER, app, explain, one_line
from evoprune.console import StepProgress
from evoprune.listing import rows_of
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import InvalidInput, NoCapacity
from evoprune.metrics.operators import OPERATORS
from evoprune.search.config import resolve
from evoprune.search.estimators import ESTIMATORS
from evoprune.search.learners import LEARNERS, configured
from evoprune.search.policies import POLICIES
from tests.door.conftest import Run

COMMANDS = [
    *([name] for name in ORDER if name != "search"),
    ["search"],
    *(["search", kind] for kind in ("metric", "allocation", "joint", "structure", "policy", "experts")),
]
KINDS = (
    "criteria", "operators", "terminals", "allocators", "compressors", "methods", "unit-criteria", "objectives",
    "spaces", "searchers", "learners", "estimators", "policies", "recoveries",
)  # fmt: skip


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"evoprune {evoprune.__version__}\n", "")


def test_without_words_there_is_help(run: Run) -> None:
    done = run()
    assert done.code == 0
    assert "Usage: evoprune" in done.out
    assert run("--help").out.strip() == done.out.strip()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words: list[str], run: Run) -> None:
    done = run(*words, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: evoprune {' '.join(words)}" in done.out


def test_help_fits_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    assert max(map(len, run("search", "metric", "--help").out.splitlines())) <= 80


def test_all_commands_have_their_place_in_the_help() -> None:
    group = typer.main.get_command(app)
    assert set(ORDER) == set(group.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["search"], "Missing command"),
        (["prune"], "Missing option '--out'"),
        (["export"], "Missing option '--to'"),
        (["eval", "reference", "--nope"], "No such option: --nope"),
        (["eval", "reference", "--tokens", "many"], "Invalid value for '--tokens'"),
        (["list", "nope"], "'nope' is not one of 'criteria'"),
        (["search", "metric", "--executor", "threads"], "'threads' is not one of 'ray', 'inline'"),
        (["search", "structure", "--cost", "weights"], "'weights' is not one of 'parameters', 'flops', 'kv_bytes'"),
        (["search", "allocation", "--granularity", "row"], "'row' is not one of 'matrix', 'block', 'kind'"),
        (["search", "allocation", "--pattern", "2:4"], "No such option: --pattern"),
        (["search", "experts"], "`evoprune search experts` has not landed yet"),
        (["eval", "reference", "--shots", "1"], "shots goes with tasks: name some by --tasks"),
        (["eval", "reference", "--tasks", ","], "no task is named"),
        (["eval", "reference", "--sample-tokens", "4"], "sample_tokens goes with samples"),
        (["prune", "reference", "--out", "x", "--allocation", "a.json"], "no file 'a.json'"),
        (["prune", "reference", "--out", "x", "--form", "compact"], "--form compact goes with --shape"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line(words: list[str], message: str, run: Run) -> None:
    done = run(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_lists(kind: str, run: Run) -> None:
    done = run("list", kind, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json == json.loads(json.dumps(rows_of(kind)))
    shown = run("list", kind)
    assert shown.code == 0
    assert all(row["name"] in shown.out for row in done.json)
    assert shown.out or f"no {kind} yet" in shown.err


def test_criteria_are_those_of_the_registry(run: Run) -> None:
    rows = {row["name"]: row for row in run("list", "criteria", "--json").json}
    assert set(rows) == set(CRITERIA)
    wanda = CRITERIA["wanda"]
    assert isinstance(wanda, Metric)
    assert rows["wanda"] == {
        "name": "wanda",
        "group": "row",
        "needs": ["X_l2"],
        "expression": wanda.expression.text,
        "formula": "|W|·‖X‖₂",
        "source": wanda.source,
    }
    assert rows["random"]["expression"] is None
    assert {row["name"] for row in run("list", "operators", "--json").json} == set(OPERATORS)
    rows = {row["name"]: row for row in run("list", "compressors", "--json").json}
    assert (rows["obq"]["cost"], rows["obq"]["parameters"][0]) == ("cubic by row", "bits=4")
    assert all("arXiv" in row["source"] for name, row in rows.items() if name != "mask")


def test_what_is_listed_says_what_it_is(run: Run) -> None:
    whats = {row["name"]: row["what"] for row in run("list", "objectives", "--json").json}
    assert whats["kl"].startswith("KL divergence from the dense")
    one_per = {row["name"]: row["one_per"] for row in run("list", "terminals", "--json").json}
    assert (one_per["W"], one_per["X_l2"], one_per["Y_l2"], one_per["depth"]) == ("weight", "input", "output", "matrix")


def test_what_moves_mask_policies_is_listed_with_its_options(run: Run) -> None:
    learners = {row["name"]: row for row in run("list", "learners", "--json").json}
    assert learners.keys() == set(LEARNERS)
    for name, row in learners.items():
        given = dict(option.split("=", 1) for option in row["options"])
        # `auto` stands where a learner decides itself, and a policy search may give it too.
        assert configured(name, given) == LEARNERS[name]
        assert (row["what"], row["gradients"]) == (LEARNERS[name].what, LEARNERS[name].gradients)
    found = [row["name"] for row in run("list", "searchers", "--json").json if row["search"] == "policy"]
    assert found == [*LEARNERS]
    budgets = {row["name"]: row["budgets"] for row in run("list", "policies", "--json").json}
    assert budgets.keys() == set(POLICIES) and budgets["pl-knapsack"] == ["costs"]
    alone = {row["name"] for row in run("list", "estimators", "--json").json if row["independent_units"]}
    assert alone == {name for name in ESTIMATORS if ESTIMATORS[name].independent} >= {"arm", "disarm"}


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("evoprune.checks.ESSENTIAL", ("numpy",))
    done = run("doctor", "--json")
    checks = {check["name"]: check for check in done.json["checks"]}
    assert (done.code, done.json["ok"]) == (0, True)
    assert {"evoprune", "python", "numpy", "devices", "reference model", "runs folder", "cache folder"} <= set(checks)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVOPRUNE_RUNS", str(tmp_path / "file" / "runs"))
    monkeypatch.setattr("evoprune.checks.EXTRAS", {"no-such-extra": ("no_such_extra", "nothing")})
    broken = run("doctor", "--json")
    checks = {check["name"]: check["status"] for check in broken.json["checks"]}
    assert (broken.code, broken.json["ok"]) == (1, False)
    assert (checks["runs folder"], checks["no-such-extra"]) == ("broken", "absent")
    assert run("doctor").code == 1


def test_doctor_looks_for_every_extra() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    named = {extra for _, purpose in EXTRAS.values() for extra in re.findall(r"evoprune\[([\w-]+)\]", purpose)}
    assert named == set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)) - {"dev"}


def test_criteria_that_a_search_leaves_out_are_told(run: Run) -> None:
    done = run("list", "criteria")
    asked = done.err.partition("--set '")[2].partition("'")[0]
    assert "starts from all of these that are formulas but moe-pruner, sparsegpt-score, wanda++:" in done.err
    readable = resolve(assignments=[asked]).terminals
    assert all(readable >= CRITERIA[name].needs for name in ("moe-pruner", "sparsegpt-score", "wanda++"))


def test_debug_adds_the_traceback(run: Run) -> None:
    done = run("show", "nowhere", "--debug")
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("error: no run 'nowhere'")


def test_completion_knows_the_commands() -> None:
    words = {"_EVOPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "evoprune pr", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "evoprune"], env=words, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["prune"]


def test_a_plain_line_is_written_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long is told once where nothing changes, and again where it has got further."""
    monkeypatch.setattr("evoprune.console.PLAIN_SECONDS", -1.0)
    progress = StepProgress()
    for what, done, total in (("loading", 0, 1), ("measuring", 0, 1), ("measuring", 1, 1), ("pruning", 1, 2)):
        progress.step(what, done, total)
    assert capsys.readouterr().err == "measuring\npruning: 1 of 2\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m evoprune list operators | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""


def test_errors_become_a_line_and_a_code() -> None:
    assert explain(InvalidInput("a\n  b")) == ("a b", 2)
    assert explain(NoCapacity("none")) == ("none", 75)
    assert explain(ValueError("odd")) == ("ValueError: odd (--debug shows where)", 1)
    assert explain(OSError(28, "No space left on device", "x/y"))[1] == 2
    assert explain(PermissionError(13, "Permission denied", "x/y"))[0].startswith("cannot write x/y: permission denied")
    assert explain(FileNotFoundError(2, "No such file"))[1] == 1
    assert explain(RuntimeError("I/O error: No space left on device (os error 28)"))[1] == 2
    trace = "the worker failed: Traceback (most recent call last):\n  File x\nRuntimeError: it broke"
    assert one_line(trace) == "the worker failed: RuntimeError: it broke"
