"""Whole searches of an allocation's formula on a tiny random model, and what they leave behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import evoprune
from evoprune.metrics.allocation_formula import AllocationFormula, read_formula
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.worker_session import Resources
from tests.models import save_tiny
from tests.search.whole_runs import history, lines_of, result_of, stopping_in, timeless, tiny_options

INLINE = Resources(executor="inline")
TERMINALS = ["position", "attention", "share", "outliers_block", "tail", "error", "diversity", "influence"]


def config(world: Path, **changes: Any) -> AllocationSearchConfig:
    options = {
        **tiny_options(world),
        "searcher.name": "formula",
        "searcher.terminals": TERMINALS,
        "searcher.seeds": ["owl"],
        "searcher.windows": 8,
        "searcher.offspring": 8,
        "searcher.stages": [{"windows": 2, "survivors": 3}, {"windows": 4, "survivors": 1}],
        "evaluations": 34,
        **changes,
    }
    return resolve_as(AllocationSearchConfig, overrides=options)


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    return start_search(config(world), INLINE, run_dir=world / "run")


def test_the_result_has_the_best_formula(finished: RunDirectory) -> None:
    result, lines = result_of(finished), lines_of(finished)
    found = result["formula"]
    formula = AllocationFormula.from_text(found["expression"], found["spread"])
    assert (found["text"], found["latex"], found["reads"]) == (formula.text, formula.latex, formula.meanings())
    assert set(formula.reads) <= set(TERMINALS)
    finals = [line for line in lines if line["stage"] == "final" and "formula" in line]
    best = min(finals, key=lambda line: line["kl"])
    assert (found["fitness"], found["stderr"]) == (best["kl"], best["stderr"])
    assert best["formula"]["expression"] == found["expression"]
    levels = dict(zip(finished.identity["matrices"], best["genome"], strict=True))
    assert found["allocation"] == {name: level / 256 for name, level in levels.items()}
    assert found["wins"] == (result["best"]["allocation"] == found["allocation"])
    assert result["best"]["fitness"] <= found["fitness"]
    if found["wins"]:
        assert (found["heldout"], found["winner_minus_this"]["loss"]) == (result["best"]["heldout"], 0)


def test_every_child_is_a_formula_and_none_is_measured_twice(finished: RunDirectory) -> None:
    counted = [line for line in lines_of(finished) if line["counted"] and line["stage"] == 0]
    assert len(counted) == 32
    assert all("formula" in line and line["origin"] == "formula" for line in counted)
    assert len({tuple(line["genome"]) for line in counted}) == len(counted)
    # One text for all generations: what a breeder is told can be compared.
    assert {tuple(line["windows"]) for line in counted} == {(0, 2)}
    assert any(line["formula"]["how"].startswith(("mutate", "crossover")) for line in counted)


def test_a_run_stopped_again_and_again_is_the_same_run(
    finished: RunDirectory, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world / "stopped"
    for phase, after in (("measuring the matrices", 0), ("searching", 6), ("searching", 40)):
        monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, phase, after))
        with pytest.raises(Interrupted):
            if path.exists():
                resume_search(RunDirectory.open(path), INLINE)
            else:
                start_search(config(world), INLINE, run_dir=path)
    monkeypatch.undo()
    run = resume_search(RunDirectory.open(path), INLINE)
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)
    for name in ("allocation.txt", "allocation.py"):
        assert (run.path / "export" / name).read_bytes() == (finished.path / "export" / name).read_bytes()


@pytest.mark.ray
@pytest.mark.slow
def test_workers_change_nothing(finished: RunDirectory, world: Path) -> None:
    run = start_search(config(world), Resources(workers=2), run_dir=world / "ray")
    assert history(run) == history(finished)


def test_the_exported_files_give_the_allocation_that_was_measured(finished: RunDirectory) -> None:
    found, folder = result_of(finished)["formula"], finished.path / "export"
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(folder / "allocation.py")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == found["allocation"]
    assert read_formula(folder / "formula.json") == AllocationFormula.from_text(found["expression"], found["spread"])
    shared = (folder / "allocation.py").read_text() + (folder / "formula.json").read_text()
    assert str(finished.path.parent) not in shared


def test_the_formula_prunes_its_own_model_as_the_run_did(finished: RunDirectory, world: Path) -> None:
    """Measured anew, on the same text: the same levels."""
    text = {"calibration": str(world / "text.txt"), "calibration_sequences": 8, "calibration_window": 32}
    model = evoprune.load_model(str(world / "model"))
    formula = finished.path / "export" / "formula.json"
    pruned = evoprune.prune(model, allocation=formula, sparsity=0.5, **text)
    assert pruned.allocation is not None
    assert pruned.allocation.by_name() == result_of(finished)["formula"]["allocation"]
    weights = {bound.site.name: bound.weight() for bound in pruned.language_model.sites}
    for site in pruned.allocation.sites:
        assert int((weights[site.name] == 0).sum()) == site.removed


def test_the_formula_prunes_another_model(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    """Another family, other shapes, another sparsity; from a copy of the file alone."""
    shutil.copy(finished.path / "export" / "formula.json", tmp_path / "formula.json")
    save_tiny(tmp_path / "gpt2", "gpt2")
    pruned = evoprune.prune(
        str(tmp_path / "gpt2"),
        allocation=str(tmp_path / "formula.json"),
        sparsity=0.7,
        out=tmp_path / "out",
        calibration=str(world / "text.txt"),
        calibration_sequences=4,
        calibration_window=32,
    )
    assert pruned.removed == pytest.approx(0.7 * pruned.prunable, abs=24)
    assert pruned.allocation is not None and len({site.sparsity for site in pruned.allocation.sites}) > 1
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_exported_file_that_was_edited_is_not_exported_again(finished: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished.path, folder)
    run = evoprune.Run(folder)
    assert run.export(tmp_path / "mine.py").read_bytes() == (folder / "export" / "allocation.py").read_bytes()
    with (folder / "export" / "allocation.py").open("a") as stream:
        stream.write("\n# a line more\n")
    with pytest.raises(InvalidInput, match="was changed"):
        run.export(tmp_path / "other.py")


def test_report_and_terminal_show_the_formula(finished: RunDirectory) -> None:
    from rich.console import Console

    from evoprune.search.kinds import kind_of

    page = evoprune.Run(finished.path).report().read_text()
    result = result_of(finished)
    assert "The formula" in page and result["formula"]["expression"].replace(",", "") in page.replace(
        "<wbr>", ""
    ).replace(",", "")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(*kind_of("allocation").result_view(result, finished.path))
    shown = console.export_text()
    assert "squash" in shown and "formula.json" in shown
    losing = {**result, "formula": {**result["formula"], "wins": False}}
    console.print(*kind_of("allocation").result_view(losing, finished.path))
    assert "no formula won" in console.export_text()


@pytest.mark.parametrize("source", ["run", "run/export/formula.json"])
def test_a_search_may_start_from_a_formula(source: str, finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    run = start_search(config(world, evaluations=11, seed_from=str(world / source)), INLINE, run_dir=tmp_path / "run")
    first = next(line for line in lines_of(run) if line["stage"] == 0 and line["origin"] != "parent")
    found = result_of(finished)["formula"]
    assert first["formula"] == {"expression": found["expression"], "spread": found["spread"], "how": "given"} or (
        # Where it is the parent already, it is no child.
        source == "run" and found["wins"]
    )


def test_a_formula_is_nothing_for_other_searchers_to_start_from(
    finished: RunDirectory, world: Path, tmp_path: Path
) -> None:
    changes = {"seed_from": str(finished.path / "export" / "formula.json"), "searcher.name": "evolution"}
    with pytest.raises(InvalidInput, match="add --searcher formula"):
        start_search(config(world, **changes), INLINE, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target.granularity": "block"}, "gives each matrix a level"),
        ({"target.drop": "parts"}, "gives each matrix a level"),
        ({"searcher.terminals": ["positoin"]}, "did you mean 'position'"),
        ({"searcher.terminals": []}, "may read nothing"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(
    changes: dict[str, Any], said: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=said):
        start_search(config(world, **changes), INLINE, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_terminal_that_this_model_lacks_is_read_by_no_formula(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("evoprune.fitness.allocating.ModelEvidence.influence", lambda self: [float("nan"), 1.0])
    run = start_search(config(world, evaluations=12), INLINE, run_dir=tmp_path / "run")
    assert "warning: no formula reads influence" in capsys.readouterr().err
    assert not [line for line in lines_of(run) if "influence" in line.get("formula", {}).get("expression", "")]


def test_deap_draws_from_its_own(world: Path, tmp_path: Path) -> None:
    import random

    random.seed(5)
    expected = random.Random(5).random()
    start_search(config(world, evaluations=12), INLINE, run_dir=tmp_path / "run")
    assert random.random() == expected
    assert torch.get_num_threads() == 1
