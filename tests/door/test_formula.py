"""Formulas at the command line: from a search to another model, and files that are no formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evoprune.metrics.allocation_formula import formula_document
from evoprune.metrics.formula_library import FORMULAS
from tests.door.conftest import Run


@pytest.fixture
def formula(tmp_path: Path) -> Path:
    file = tmp_path / "formula.json"
    file.write_text(json.dumps(formula_document(FORMULAS["depth"].formula, {})))
    return file


def test_a_search_and_what_it_leaves(run: Run, tiny: Path, levels: Path, place: Path, without_report: None) -> None:
    words = ("search", "allocation", tiny, "--config", levels, "--searcher", "formula", "--executor", "inline")
    done = run(*words, "--set", "searcher.terminals=[position,share,outliers]", "--run-dir", "run")
    assert done.code == 0, done.err
    assert "squash(" in done.err
    shown = run("show", "run", "--json").json
    assert shown["kind"] == "allocation" and shown["best"]["allocation"]
    assert run("export", "run", "--to", "mine.py").code == 0
    assert "def allocate(statistics, sizes, sparsity):" in (place / "mine.py").read_text()


def test_a_formula_prunes(run: Run, tiny: Path, formula: Path) -> None:
    done = run(
        "prune", tiny, "--metric", "magnitude", "--allocation", formula, "--sparsity", 0.7, "--out", "out", "--json"
    )
    assert done.code == 0, done.err
    document = done.json
    assert document["allocation"] == {
        "allocator": "formula",
        "parameters": {"expression": "neg(position)", "spread": 0.2},
        "sparsity": 0.7,
    }
    first, last = (
        [layer["sparsity"] for layer in document["layers"] if f"layers.{block}." in layer["name"]] for block in (0, 1)
    )
    assert max(first) < min(last)
    assert document["removed"] == pytest.approx(0.7 * document["prunable"], abs=16)


def test_what_is_no_formula_is_refused(refused: Callable[..., str], tiny: Path, formula: Path, tmp_path: Path) -> None:
    def prune(file: Path, *more: object) -> str:
        return refused("prune", tiny, "--allocation", file, "--out", "out", *more)

    document = json.loads(formula.read_text())
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(document | {"spread": 0.9}))
    assert "was edited" in prune(edited, "--sparsity", 0.7)
    hostile = tmp_path / "hostile.json"
    hostile.write_text(json.dumps(formula_document(FORMULAS["depth"].formula, {}) | {"expr": "__import__('os')"}))
    assert "hostile.json" in prune(hostile, "--sparsity", 0.7)
    assert "not both" in prune(formula, "--pattern", "2:4")
    assert "budgets of groups need an allocator" in prune(formula, "--budget", "*.mlp.*=0.5")


def test_searcher_options_that_do_not_fit(refused: Callable[..., str], tiny: Path) -> None:
    words = ("search", "allocation", tiny, "--searcher", "formula")
    assert "leave --granularity at matrix" in refused(*words, "--granularity", "block")
    assert "did you mean 'position'" in refused(*words, "--set", "searcher.terminals=[postion]")


def test_runs_of_other_searches_have_no_formula(refused: Callable[..., str], allocated: Path) -> None:
    assert "--searcher formula" in refused("export", allocated, "--to", "mine.py")
