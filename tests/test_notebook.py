"""The quick-start notebook: what is committed was run, says nothing of a machine, and runs again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from tools.run_notebook import QUICKSTART, run


def outputs(notebook: NotebookNode) -> list[list[str]]:
    """By code cell, what its outputs are: ``stdout``, or the forms that a value is shown in."""
    return [
        [output.get("name") or " ".join(sorted(output["data"])) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_was_run_from_top_to_bottom(committed: NotebookNode) -> None:
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    # A table, a formula and a figure; an error would have no data.
    kinds = {kind for cell in outputs(committed) for kind in cell}
    assert kinds == {"stdout", "text/plain", "text/html text/plain", "text/latex text/plain", "image/png text/plain"}
    assert all(cell.outputs for cell in cells)


def test_it_says_nothing_of_a_machine(committed: NotebookNode) -> None:
    text = json.dumps(committed)
    assert re.findall(r"(?:/tmp|/home|/root|/Users|/work|site-packages)\b[^\"\s]*", text) == []
    assert set(committed.metadata) == {"kernelspec", "language_info"}
    assert all(set(cell.metadata) == set() for cell in committed.cells)


@pytest.mark.slow
def test_it_runs(committed: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("EVOPRUNE_RUNS", raising=False)
    again = run(QUICKSTART, tmp_path)
    assert outputs(again) == outputs(committed)
    (found,) = (tmp_path / "runs").iterdir()
    assert (found / "result.json").is_file() and (found / "report.html").is_file()
    assert (tmp_path / "metric.py").is_file()
    assert (tmp_path / "pruned" / "model.safetensors").is_file()
