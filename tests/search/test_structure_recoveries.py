"""Structure searches whose candidates recover before they are measured, or whose database follows the best so far."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import evoprune
from evoprune.fitness.prepare import Prepared, calibration_windows
from evoprune.fitness.structure_build import build_structure_database
from evoprune.fitness.structure_evaluator import StructureEvaluator
from evoprune.fitness.structure_worker import StructureWorker
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.metrics.shape import BlockShape
from evoprune.metrics.shape_file import read_shape, to_rows
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.publishing import rebuild_board
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.structure_result import ALONE
from evoprune.search.tables_structure import selection_text
from evoprune.search.worker_session import Resources
from tests.search.structure_runs import (
    FEW,
    INLINE,
    STAGES,
    check_export,
    config,
)
from tests.search.whole_runs import history, lines_of, result_of, stopping_in, study, timeless

TRAINED = {
    "searcher.selection": "training-aware",
    "searcher.training.tokens": 256,
    "searcher.training.batch_tokens": 64,
}
RECOVERIES: dict[str, dict[str, Any]] = {"path-refit": {"searcher.selection": "path-refit"}, "training-aware": TRAINED}


@pytest.fixture(scope="module", params=["training-aware", pytest.param("path-refit", marks=pytest.mark.slow)])
def recovering(request: pytest.FixtureRequest, world: Path) -> RunDirectory:
    """A search whose last stage measures what candidates recover."""
    changed = config(world, evaluations=16, **FEW, **RECOVERIES[request.param])
    return start_search(changed, INLINE, run_dir=world / f"run-{request.param}")


def test_what_candidates_recover_is_measured_once_and_of_the_last_few_only(recovering: RunDirectory) -> None:
    lines, result = lines_of(recovering), result_of(recovering)
    after = [line for line in lines if line["stage"] in ("seeds", len(STAGES) - 1, "final")]
    assert all(("recovered" in line) == (line in after) for line in lines)
    assert {line["stage"] for line in lines} == {"seeds", 0, 1, 2, "final"}
    by_genome: dict[tuple[int, ...], set[float]] = {}
    for line in after:
        by_genome.setdefault(tuple(line["genome"]), set()).add(line["recovered"])
    assert max(map(len, by_genome.values())) == 1
    log = EvaluationLog(recovering.path / "evaluations.wal")
    outcomes = [outcome.values for outcome in log.outcomes() if "recovered" in outcome.values]
    log.close()
    assert len(outcomes) == len(by_genome) == result["recovered"]["candidates"]
    # A pool reads its own windows of what is known of all, and the finals read all.
    known = {values["recovered"]: values["kl"] for values in outcomes}
    for line in after:
        first, last = line["windows"]
        assert line["kl"] == pytest.approx(sum(known[line["recovered"]][first:last]) / (last - first), abs=1e-12)
    finals = {line["kl"] for line in lines if line["stage"] == "final"}
    assert result["best"]["fitness"] == min(finals)
    parents = [line for line in after if line["stage"] == 2 and line["origin"] == "parent"]
    assert len({tuple(line["windows"]) for line in parents}) > 1


def test_recoveries_are_counted_and_said(recovering: RunDirectory) -> None:
    result = result_of(recovering)
    said = selection_text(result)
    assert f"of {result['recovered']['candidates']} candidates" in said
    assert result["dense"]["heldout"]["kl"] == pytest.approx(0, abs=1e-5)
    shapes = [entry for entry in (result["best"], *result["baselines"]) if ALONE not in entry.get("name", "")]
    if result["selection"] == "path-refit":
        assert set(result["recovered"]) == {"candidates"}
        assert not any("trained" in entry for entry in shapes)
        return
    count = result["recovered"]["candidates"]
    assert result["recovered"] == {"candidates": count, "tokens_each": 256, "tokens": 256 * count}
    assert f"({256 * count:,} tokens in all)" in said
    for entry in shapes:
        assert set(entry["trained"]) == {"loss", "perplexity", "kl", "stderr", "tokens"}
        assert entry["trained"]["kl"] != entry["heldout"]["kl"]
    # What was trained is thrown away: the file has the weights of the database.
    weights = read_shape(recovering.path / "export" / "shape.json").weights
    assert weights["method"] == "database"


@pytest.mark.slow
def test_a_search_with_recoveries_that_is_stopped_is_the_same_run(
    recovering: RunDirectory, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = result_of(recovering)["selection"]
    path = world / f"stopped-{method}"
    for after in (1, 22):
        monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, "searching", after))
        with pytest.raises(Interrupted):
            if path.exists():
                resume_search(RunDirectory.open(path), INLINE)
            else:
                start_search(config(world, evaluations=16, **FEW, **RECOVERIES[method]), INLINE, run_dir=path)
    monkeypatch.undo()
    run = resume_search(RunDirectory.open(path), INLINE)
    assert history(run) == history(recovering)
    assert timeless(run.result) == timeless(recovering.result)
    rebuild_board(run, None)
    trials = [study(each).trials for each in (run, recovering)]
    assert [trial.user_attrs for trial in trials[0]] == [trial.user_attrs for trial in trials[1]]
    assert all(trial.datetime_start is not None for trial in trials[0])


REBUILDING = {
    "target.accumulation": "path", "searcher.rebuild": 1, "evaluations": 26, **FEW, **RECOVERIES["training-aware"],
}  # fmt: skip


@pytest.fixture(scope="module")
def rebuilding(world: Path) -> RunDirectory:
    """A search that rebuilds its database after every generation, and trains who is in the last stage."""
    return start_search(config(world, **REBUILDING), INLINE, run_dir=world / "run-rebuilding")


def test_the_parent_is_measured_again_on_the_database_around_it(rebuilding: RunDirectory, world: Path) -> None:
    lines = lines_of(rebuilding)
    rebuilds = [at for at, line in enumerate(lines) if line["stage"] == "rebuild"]
    assert len(rebuilds) == result_of(rebuilding)["rebuilds"] == result_of(rebuilding)["generations"] - 1 >= 2
    language_model = evoprune.load_model(str(world / "model"))
    units = find_units(language_model)
    state = rebuilding.peek()
    assert state is not None
    windows = calibration_windows(language_model, config(world).context())
    database = build_structure_database(language_model, units, windows)
    for at in rebuilds:
        rebuild, (last, again) = lines[at], (lines[at - 1], lines[at + 1])
        assert (rebuild["kl"], rebuild["counted"], rebuild["reason"]) == (None, False, None)
        assert (last["generation"], again["generation"]) == (rebuild["generation"], rebuild["generation"] + 1)
        assert (again["origin"], again["stage"], again["genome"]) == ("parent", 0, rebuild["genome"])
        # Around the units that the last database kept of it, and measured on what this gives.
        kept = [tuple(rebuild["genome"][place : place + 3]) for place in range(0, len(rebuild["genome"]), 3)]
        path = [
            BlockShape(*database.kept_heads(block, groups, each), database.kept_neurons(block, neurons))
            for block, (groups, each, neurons) in enumerate(kept)
        ]
        database = build_structure_database(language_model, units, windows, mode="path", path=path)
        assert state["search"]["rebuilds"][rebuilds.index(at)] == {"database": database.name, "path": to_rows(path)}
        text, teacher = Prepared.open(rebuilding.identity["files"]).text("search")
        evaluator = StructureEvaluator(language_model, units, database, text, teacher)
        losses = evaluator.evaluate(kept, *again["windows"])
        evaluator.restore()
        assert losses.kl is not None and losses.kl.mean().item() == pytest.approx(again["kl"], rel=1e-5)


def test_a_search_that_rebuilds_is_the_same_run_however_it_is_stopped(
    rebuilding: RunDirectory, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what it had built, too: that is built again."""
    path = world / "stopped-rebuilding"
    monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, "searching", 45))
    with pytest.raises(Interrupted):
        start_search(config(world, **REBUILDING), INLINE, run_dir=path)
    monkeypatch.undo()
    state = RunDirectory.open(path).peek()
    assert state is not None and state["search"]["rebuilds"]
    names = [rebuild["database"] for rebuild in state["search"]["rebuilds"]]
    built = list((world / "cache").rglob("structure-*"))
    assert set(names) <= {folder.name for folder in built}
    for folder in built:
        shutil.rmtree(folder)
    run = resume_search(RunDirectory.open(path), INLINE)
    assert history(run) == history(rebuilding)
    assert timeless(run.result) == timeless(rebuilding.result)
    rebuild_board(run, None)
    assert [trial.value for trial in study(run).trials] == [trial.value for trial in study(rebuilding).trials]


@pytest.mark.slow
def test_a_database_that_cannot_be_rebuilt_stays_as_it_is(
    rebuilding: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: StructureWorker, payload: dict[str, Any]) -> dict[str, Any]:
        raise InvalidInput("no such luck")

    monkeypatch.setattr(StructureWorker, "_rebuilt", broken)
    run = start_search(config(world, **REBUILDING), INLINE, run_dir=tmp_path / "run")
    result, lines = result_of(run), lines_of(run)
    assert (result["rebuilds"], result["reasons"]) == (0, {"ERROR": result["generations"] - 1})
    assert {line["reason"] for line in lines if line["stage"] == "rebuild"} == {"ERROR"}
    first = next(at for at, line in enumerate(lines) if line["stage"] == "rebuild")
    assert lines[:first] == lines_of(rebuilding)[:first]
    assert read_shape(run.path / "export" / "shape.json").weights["accumulation"] == "expectation"


@pytest.mark.ray
@pytest.mark.slow
def test_ray_rebuilds_the_same_with_two_workers(rebuilding: RunDirectory, world: Path) -> None:
    run = start_search(config(world, **REBUILDING), Resources(workers=2), run_dir=world / "ray-rebuilding")
    assert history(run) == history(rebuilding)
    assert timeless(run.result) == timeless(rebuilding.result)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_recoveries_with_two_workers(recovering: RunDirectory, world: Path) -> None:
    method = result_of(recovering)["selection"]
    changed = config(world, evaluations=16, **FEW, **RECOVERIES[method])
    run = start_search(changed, Resources(workers=2), run_dir=world / f"ray-{method}")
    assert history(run) == history(recovering)
    assert timeless(run.result) == timeless(recovering.result)


def test_a_text_too_short_for_the_training_is_refused_before_the_database(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(InvalidInput, match="text too short: side A of"):
        changed = config(world, **FEW, **(RECOVERIES["training-aware"] | {"searcher.training.tokens": 10**8}))
        start_search(changed, INLINE, run_dir=path)
    phases = [event["phase"] for event in RunDirectory.open(path).read_events() if event["event"] == "phase"]
    assert "building the structured database" not in phases


@pytest.mark.parametrize("form", ["compact", pytest.param("masked", marks=pytest.mark.slow)])
def test_exported_shapes_say_along_which_path_they_were_refitted(
    form: str, rebuilding: RunDirectory, world: Path
) -> None:
    """The database of the last round, and in another run a path refit, are made again from what the files say."""
    assert read_shape(rebuilding.path / "export" / "shape.json").weights["path"]
    check_export(rebuilding, world, form)
    path = world / "run-refitted"
    changed = config(world, evaluations=3, **FEW, **RECOVERIES["path-refit"])
    run = RunDirectory(path) if path.exists() else start_search(changed, INLINE, run_dir=path)
    assert read_shape(path / "export" / "shape.json").weights["method"] == "path-refit"
    check_export(run, world, form)
