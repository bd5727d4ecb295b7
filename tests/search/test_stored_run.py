"""Whole searches under a compressor that changes weights, on a tiny random model, and the checkpoint at their end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import evoprune
from evoprune.fitness import stored_levels
from evoprune.fitness.parcels import require
from evoprune.metrics.allocation_file import read_allocation
from evoprune.metrics.errors import Interrupted
from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.report import allocation_page, front_page
from evoprune.search.report.allocation_data import AllocationData
from evoprune.search.report.front_data import FrontData
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.worker_session import Resources
from tests.search.whole_runs import history, result_of, stopping_in, timeless, tiny_options

INLINE = Resources(executor="inline")


def config(world: Path, **changes: Any) -> AllocationSearchConfig:
    options = {
        **tiny_options(world),
        "target.compressor": "sparsegpt",
        "searcher.windows": 8,
        "searcher.offspring": 6,
        "searcher.stages": [{"windows": 2, "survivors": 2}, {"windows": 4, "survivors": 1}],
        "searcher.seeds": ["owl", "erk"],
        "evaluations": 27,
        **changes,
    }
    return resolve_as(AllocationSearchConfig, overrides=options)


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    return start_search(config(world), INLINE, run_dir=world / "stored")


def test_only_stored_levels_are_tried_and_the_budget_holds(finished: RunDirectory, world: Path) -> None:
    result, target = result_of(finished), config(world).target
    assert target.stored is not None
    lines = [json.loads(line) for line in history(finished).splitlines()]
    assert {level for line in lines for level in line["genome"]} <= {0, *target.stored}
    assert len({tuple(line["genome"]) for line in lines}) > 15
    assert (result["compressor"], result["stored_levels"]) == ("sparsegpt", list(target.stored))
    shapes = {site.name: site.shape for site in read_allocation(finished.path / "export" / "allocation.json").sites}
    # Half of a step of 10 levels of the smallest matrix, which has 16 rows of 32 columns.
    for entry in (result["best"], *result["baselines"]):
        removed = sum(shapes[name][0] * int(shapes[name][1] * share) for name, share in entry["allocation"].items())
        assert abs(removed - result["prunable"] // 2) <= 16
    finals = [line["kl"] for line in lines if line["stage"] == "final"]
    assert result["best"]["fitness"] == min(finals)


def test_prune_writes_the_weights_that_were_measured(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    file, out = finished.path / "export" / "allocation.json", tmp_path / "out"
    allocation = read_allocation(file)
    assert allocation.parameters["compressor"] == "sparsegpt"
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        pruned = evoprune.prune(
            str(world / "model"),
            allocation=file,
            out=out,
            calibration=str(world / "text.txt"),
            calibration_sequences=8,
            calibration_window=32,
        )
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert (pruned.compressor, pruned.criterion, pruned.removed) == ("sparsegpt", None, allocation.removed)
    database = require(finished.identity["database"])
    loaded = AutoModelForCausalLM.from_pretrained(out)
    dense = AutoModelForCausalLM.from_pretrained(world / "model")
    for at, site in enumerate(allocation.sites):
        level, weight = round(256 * site.sparsity), loaded.get_submodule(site.name).weight
        with stored_levels.safe_open(database / f"matrix-{at:05d}.safetensors", framework="pt") as stored:
            expected = stored.get_tensor(str(level)) if level else dense.get_submodule(site.name).weight
        assert torch.equal(weight, expected)
        assert int((weight == 0).sum()) == site.removed
    measured = evoprune.evaluate(
        str(out), dense=str(world / "model"), data=str(world / "text.txt"), window=32, tokens=8 * 32
    )
    heldout = result_of(finished)["best"]["heldout"]
    assert measured.loss == pytest.approx(heldout["loss"], abs=1e-6)
    assert measured.kl == pytest.approx(heldout["kl"], abs=1e-6)


def test_the_winner_replayed_is_what_prune_makes_block_by_block(finished: RunDirectory, world: Path) -> None:
    text = str(world / "text.txt")
    pruned = evoprune.prune(
        str(world / "model"),
        allocation=finished.path / "export" / "allocation.json",
        accumulation="path",
        calibration=text,
        calibration_sequences=8,
        calibration_window=32,
    )
    measured = evoprune.evaluate(pruned.language_model, data=text, window=32, tokens=8 * 32)
    best = result_of(finished)["best"]
    assert measured.loss == pytest.approx(best["replayed"]["loss"], abs=1e-6)
    assert measured.loss != pytest.approx(best["heldout"]["loss"], abs=1e-6)
    assert best["winner_minus_replayed"]["loss"] == pytest.approx(best["heldout"]["loss"] - measured.loss, abs=1e-6)


def test_the_report_says_who_made_the_weights(finished: RunDirectory) -> None:
    page = allocation_page.render(AllocationData(finished), {})
    assert "<code>sparsegpt</code> chooses what goes; each matrix has a sparsity of its own, out of 17 at which" in page
    assert "50 % of all prunable weights (sparsegpt)" in page
    assert "--compressor sparsegpt --allocation" in page
    assert "--metric" not in page


def test_the_same_seed_gives_the_same_run_however_often_it_is_stopped(
    finished: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stopped"
    for phase, after in (("building the level database", 0), ("searching", 4), ("searching", 9)):
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


@pytest.mark.slow
@pytest.mark.ray
def test_ray_gives_the_same_run(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    run = start_search(config(world), Resources(workers=2), run_dir=tmp_path / "ray")
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


@pytest.mark.parametrize("drop", ["none", "parts"])
def test_a_front_of_stored_levels(drop: str, world: Path, tmp_path: Path) -> None:
    options = {"target.pareto": "parameters", "target.drop": drop, "target.sparsity_range": [0.4, 0.6]}
    changes = {"searcher.offspring": 8, "front.windows": 2, "evaluations": 24, **options}
    asked = config(world, **changes)
    run = start_search(asked, INLINE, run_dir=tmp_path / "front")
    page = front_page.render(FrontData(run), {})
    assert "<code>sparsegpt</code> chooses what goes" in page and "--compressor sparsegpt --allocation" in page
    members, stored = result_of(run)["front"], asked.target.stored
    assert len(members) > 3 and stored is not None
    for member in members:
        levels = {round(256 * sparsity) for sparsity in member["allocation"].values()}
        assert levels <= {0, *stored, 256}
        exported = read_allocation(run.path / "export" / "front" / f"{member['saved']}.json")
        assert exported.parameters["compressor"] == "sparsegpt"


def test_a_start_from_another_run_is_rounded_to_the_grid(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    grid = (64, 128, 192)
    changes = {"seed_from": str(finished.path), "target.grid": list(grid), "evaluations": 3}
    run = start_search(config(world, **changes), INLINE, run_dir=tmp_path / "again")
    rows = {row["name"]: row["allocation"] for row in result_of(run)["baselines"]}
    assert {round(256 * sparsity) for row in rows.values() for sparsity in row.values()} <= {0, *grid}
    assert set(rows["uniform"].values()) == {0.5}
    given, source = rows["given"], result_of(finished)["best"]["allocation"]
    assert sum(abs(given[name] - source[name]) for name in source) / len(source) < 0.13
