"""`search allocation --pareto` from the command line: what it prints and leaves, and what is refused."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import evoprune
from evoprune.metrics.allocation_file import read_allocation
from tests.door.conftest import Run

pytestmark = pytest.mark.usefixtures("without_report")

FRONT = "front: {windows: 4, members: 4}\n"


@pytest.fixture
def front_config(levels: Path) -> Path:
    text = levels.read_text().replace("offspring: 6", "offspring: 8").replace("evaluations: 20", "evaluations: 24")
    levels.write_text(text + FRONT)
    return levels


def test_a_front_from_the_command_line(run: Run, tiny: Path, story: Path, front_config: Path, place: Path) -> None:
    """And a member of it, pruned and measured as its row says."""
    words = ("search", "allocation", tiny, "--pareto", "parameters", "--sparsity-range", 0.4, 0.7)
    done = run(*words, "--sparsity", 0.5, "--config", front_config, "--executor", "inline")
    assert done.code == 0, done.err
    folder = Path(done.out.strip())
    result = json.loads((folder / "result.json").read_text())
    told = " ".join(done.err.split())
    for text in ("a front from 40% to 70% removed by wanda", "minus uniform's", "24 evaluations in", "nearest to a",
                 f"front/{result['best']['saved']}.json"):  # fmt: skip
        assert text in told, text
    shown = run("show", folder)
    assert shown.code == 0
    measured = [row for row in result["front"] if row["heldout"] is not None]
    for row in measured:
        assert f"{row['saved']}%" in shown.out and f"{row['heldout']['loss']:.4f} " in shown.out
    document = run("show", folder, "--json").json
    assert document["front"] == result["front"] and document["best"] == result["best"]
    assert document["best"] == min(document["front"], key=lambda row: abs(row["sparsity"] - 0.5))
    budgets = [row["sparsity"] for row in document["baselines"] if row["name"] == "owl"]
    assert budgets == pytest.approx([0.4, 0.55, 0.7], abs=0.01)

    (command,) = [line for line in done.err.splitlines() if line.startswith("prune ")]
    member = folder / "export" / "front" / f"{measured[-1]['saved']}.json"
    words_of_prune = command.partition("evoprune ")[2].replace("DIR", "out")
    pruned = run(
        *shlex.split(words_of_prune.replace(str(folder / "export" / "allocation.json"), str(member))), "--json"
    )
    assert pruned.code == 0, pruned.err
    assert pruned.json["removed"] == measured[-1]["removed"]
    found = run("eval", "out", "--dense", tiny, "--data", story, "--window", 32, "--tokens", 4 * 32, "--json").json
    assert found["loss"] == pytest.approx(measured[-1]["heldout"]["loss"], rel=1e-6)

    done = run("export", folder, "--to", "mine.json")
    assert done.code == 0 and read_allocation("mine.json").by_name() == result["best"]["allocation"]
    assert "matrices from" in " ".join(run("runs").out.split())
    assert run("resume", folder, "--executor", "inline", "--json").json == document


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(
    width: int, run: Run, tiny: Path, front_config: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("search", "allocation", tiny, "--pareto", "flops", "--drop", "parts", "--drop-only", "--run-dir", "run")
    done = run(*words, "--config", front_config, "--executor", "inline", "--set", "evaluations=12")
    assert done.code == 0, done.err
    monkeypatch.setenv("COLUMNS", str(width))
    table = run("show", "run").out.partition("\nfront ")[0]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= width
    assert "…" not in table and "from 10% to 50% dropped as parts" in " ".join(table.split())
    assert "dense kernels save none for single zeros" in " ".join(table.split())
    assert "minus that of parts dropped at random at the same cost" in " ".join(table.split())


def test_a_front_in_python(tiny: Path, front_config: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = evoprune.search_allocation(
        str(tiny),
        pareto="parameters",
        sparsity_range=(0.3, 0.6),
        config=front_config,
        executor="inline",
        quiet=True,
        evaluations=14,
        metric="magnitude",
    )
    assert capfd.readouterr() == ("", "")
    assert run.front and run.best in run.front
    assert all(0.29 < row["sparsity"] < 0.61 for row in run.front)
    assert run.table().row_count == 1 + sum(row["heldout"] is not None for row in run.front)
    for row in run.front:
        file = run.path / "export" / "front" / f"{row['saved']}.json"
        pruned: Any = evoprune.prune(str(tiny), metric="magnitude", allocation=file)
        assert pruned.removed == row["removed"]


def test_a_resolved_front_can_be_used_again(run: Run, place: Path) -> None:
    first = run("search", "allocation", "--dry-run", "--pareto", "latency", "--drop", "blocks", "--drop-only")
    (place / "resolved.yaml").write_text(first.out)
    assert run("search", "allocation", "--dry-run", "--config", "resolved.yaml").out == first.out
    target = run("search", "allocation", "--dry-run", "--config", "resolved.yaml", "--json").json["target"]
    assert (target["pareto"], target["sparsity_range"], target["sparsity"]) == ("latency", [0.1, 0.5], 0.3)
    plain = run("search", "allocation", "--dry-run", "--pareto", "flops", "--json").json["target"]
    assert (plain["sparsity_range"], plain["sparsity"]) == ([0.4, 0.7], 0.55)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--pareto parameters --surrogate", "a surrogate chooses among level switches at one budget"),
        ("--searcher random --surrogate", "a surrogate chooses among level switches at one budget"),
        ("--pareto parameters --sparsity-range 0.7 0.4", "the lower first"),
        ("--pareto parameters --sparsity-range 0.5 0.5", "two different ones between 0 and 1"),
        ("--pareto parameters --sparsity-range 0 0.4", "between 0 and 1"),
        ("--pareto parameters --sparsity-range 0.4 1", "between 0 and 1"),
        ("--pareto parameters --sparsity-range 0.4 nan", "between 0 and 1"),
        ("--pareto parameters --sparsity-range=-0.4 0.5", "between 0 and 1"),
        ("--pareto parameters --sparsity-range 40 70", "such as 0.4 0.7"),
        ("--pareto parameters --sparsity-range 0.4", "requires 2 arguments"),
        ("--pareto parameters --set target.sparsity_range=0.4", "target.sparsity_range"),
        ("--pareto parameters --set target.sparsity_range=[a,b]", "target.sparsity_range"),
        ("--pareto parameters --set target.sparsity_range=[0.4,0.5,0.6]", "target.sparsity_range"),
        ("--pareto parameters --sparsity 0.8", "is outside the range 0.4 to 0.7"),
        ("--sparsity-range 0.4 0.7", "add --pareto parameters"),
        ("--pareto memory", "'memory' is not one of 'parameters', 'flops', 'latency'"),
        ("--set target.pareto=memory", "target.pareto"),
        ("--pareto latency", "masks have no latency: add --drop parts or --drop blocks"),
        ("--pareto flops --drop-only", "give --drop parts or --drop blocks"),
        ("--pareto flops --searcher tpe", "bred by NSGA-II"),
        ("--pareto flops --population 30", "give --population 32"),
        ("--pareto flops --set front.windows=200", "want 200 windows, there are 192"),
        ("--pareto flops --set front.budgets=1", "front.budgets"),
        ("--pareto flops --set front.archive=1", "front.archive: no such option"),
    ],
)
def test_what_cannot_be(words: str, said: str, refused: Callable[..., str], tiny: Path) -> None:
    assert said in refused("search", "allocation", tiny, *words.split())


def test_a_range_that_the_model_cannot_meet_leaves_no_run(
    run: Run, tiny: Path, front_config: Path, place: Path
) -> None:
    words = (
        "--pareto",
        "parameters",
        "--sparsity-range",
        0.9,
        0.9999,
        "--config",
        front_config,
        "--executor",
        "inline",
    )
    done = run("search", "allocation", tiny, *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith("error: ") and "weights cannot go" in done.err.splitlines()[-1]
    assert not list(place.rglob("run.json"))
