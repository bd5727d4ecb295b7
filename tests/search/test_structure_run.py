"""Whole structure searches on a tiny random model: from a folder on disk to the exported winner."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import evoprune
from evoprune.configuration import check_names
from evoprune.fitness.allocators import ALLOCATORS
from evoprune.fitness.structure_evaluator import StructureEvaluator
from evoprune.fitness.unit_costs import Kept
from evoprune.fitness.unit_criteria import UNIT_CRITERIA
from evoprune.fitness.units import BlockUnits
from evoprune.metrics.errors import Interrupted, InvalidCandidate, InvalidInput
from evoprune.search.config_structure import DEFAULT_SEEDS
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.publishing import rebuild_board
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.structure_result import ALONE
from evoprune.search.tables_structure import removed_text
from evoprune.search.worker_session import Resources
from tests.models import save_tiny
from tests.search.structure_runs import (
    DENSE,
    EVALUATIONS,
    FEW,
    INLINE,
    NEURON,
    WINDOWS,
    check_export,
    config,
    parameters,
)
from tests.search.whole_runs import history, lines_of, result_of, stopping_in, study, timeless


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    """The whole of it: every criterion is a seed, and several generations follow."""
    return start_search(config(world), INLINE, run_dir=world / "run")


def test_the_result_has_what_scripts_rely_on(finished: RunDirectory) -> None:
    result, lines = result_of(finished), lines_of(finished)
    assert finished.state == "finished"
    assert result["evaluations"] == EVALUATIONS == sum(line["counted"] for line in lines)
    assert (result["births"], result["distinct"]) == (len(lines), len({tuple(line["genome"]) for line in lines}))
    names = ["uniform", "dp", *DEFAULT_SEEDS, *(f"{name}{ALONE}" for name in DEFAULT_SEEDS)]
    assert [row["name"] for row in result["baselines"]] == names
    for entry in (result["dense"], result["best"], *result["baselines"]):
        assert set(entry["heldout"]) == {"loss", "perplexity", "kl", "stderr", "tokens"}
        assert entry["heldout"]["tokens"] == 8 * 31
    assert result["dense"]["heldout"]["kl"] == pytest.approx(0, abs=1e-5)
    assert (result["kind"], result["cost"], result["target"], result["front"]) == (
        "structure", "parameters", "0.5", [],
    )  # fmt: skip
    assert result["widths"] == finished.identity["widths"] == [[2, 4, 48]] * 2
    shared = json.dumps({name: result[name] for name in ("best", "front", "baselines", "dense")})
    assert "/" not in shared and "seconds" not in shared


def test_the_budget_is_met_to_a_neuron(finished: RunDirectory) -> None:
    """Whoever is compared, criteria as published included, and every candidate."""
    result, lines = result_of(finished), lines_of(finished)
    assert result["dense_cost"] == DENSE
    assert result["dense_cost"] + result["rest_cost"] == finished.identity["parameters"]
    shapes = [entry["shape"] for entry in (result["best"], *result["baselines"])]
    for entry in (result["best"], *result["baselines"]):
        assert entry["cost"] == parameters(entry["shape"])
    for line in lines:
        genome = line["genome"]
        shapes.append([genome[at : at + 3] for at in range(0, len(genome), 3)])
    for shape in shapes:
        assert DENSE // 2 - NEURON < parameters(shape) <= DENSE // 2


def test_the_winner_is_no_worse_than_any_seed_on_the_text_that_they_share(finished: RunDirectory) -> None:
    result, lines = result_of(finished), lines_of(finished)
    known = {row["name"]: row["fitness"] for row in result["baselines"] if not row["name"].endswith(ALONE)}
    assert None not in known.values()
    assert all(row["fitness"] is None for row in result["baselines"] if row["name"] not in known)
    finals = [line for line in lines if line["stage"] == "final"]
    assert finals == lines[-len(finals) :]
    assert {tuple(line["windows"]) for line in finals} == {(0, WINDOWS)}
    assert result["best"]["fitness"] == min(line["kl"] for line in finals)
    seeds = {tuple(line["genome"]): line["kl"] for line in lines if line["stage"] == "seeds"}
    # The best seed is a finalist, so all seeds are beaten on the text where they were measured, or on all of it.
    assert min(seeds, key=lambda genome: seeds[genome]) in {tuple(line["genome"]) for line in finals}
    assert set(known.values()) == set(seeds.values())
    assert result["generations"] >= 4


def test_the_board_shows_every_evaluation_and_can_be_rebuilt(finished: RunDirectory, tmp_path: Path) -> None:
    counted = [line for line in lines_of(finished) if line["counted"]]
    before = study(finished).trials
    assert [trial.user_attrs["shape"] for trial in before] == [line["genome"] for line in counted]
    for trial, line in zip(before, counted, strict=True):
        groups, each, neurons = line["genome"][::3], line["genome"][1::3], line["genome"][2::3]
        assert trial.params["query heads"] == sum(a * b for a, b in zip(groups, each, strict=True))
        assert trial.params["neurons"] == sum(neurons)
        assert trial.params["parts dropped"] == [*groups, *neurons].count(0)
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    (folder / "optuna.log").unlink()
    rebuild_board(RunDirectory(folder), None)
    after = study(RunDirectory(folder)).trials
    for name in ("number", "state", "value", "intermediate_values", "user_attrs", "params", "datetime_start"):
        assert [getattr(trial, name) for trial in after] == [getattr(trial, name) for trial in before], name


def test_the_same_seed_gives_the_same_run(finished: RunDirectory, world: Path) -> None:
    again = start_search(config(world), INLINE, run_dir=world / "again")
    assert history(again) == history(finished)
    assert timeless(again.result) == timeless(finished.result)
    shapes = [json.loads((run.path / "export/shape.json").read_text()) for run in (again, finished)]
    assert {**shapes[0], "target": {}} == {**shapes[1], "target": {}}
    other = start_search(config(world, seed=1, evaluations=12, **FEW), INLINE, run_dir=world / "other")
    assert lines_of(other)[-1] != lines_of(finished)[-1]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_run_with_two_workers(finished: RunDirectory, world: Path) -> None:
    run = start_search(config(world), Resources(workers=2), run_dir=world / "ray")
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


def test_a_run_stopped_again_and_again_is_the_same_run(
    finished: RunDirectory, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While criteria are asked, in seeds, in generations, and on held-out text."""
    path = world / "stopped"
    asking, searching, measuring = "asking the criteria of units", "searching", "measuring on held-out text"
    for phase, after in ((asking, 2), (searching, 2), (searching, 40), (measuring, 3)):
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
    logged = [json.loads(line.partition(b" ")[2])["k"] for line in wal(run)]
    assert max(Counter(logged).values()) == 1
    assert [trial.user_attrs for trial in study(run).trials] == [trial.user_attrs for trial in study(finished).trials]


def wal(run: RunDirectory) -> list[bytes]:
    return (run.path / "evaluations.wal").read_bytes().splitlines()


def test_a_fork_with_more_evaluations_does_none_again(
    finished: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Watched(InlineExecutor):
        def submit(self, jobs: Any) -> None:
            jobs = list(jobs)
            asked.extend(job.key for job in jobs if job.kind not in ("prepare", "database"))
            super().submit(jobs)

    monkeypatch.setattr("evoprune.search.worker_session.InlineExecutor", Watched)
    monkeypatch.setattr("evoprune.sessions.write_report", lambda run: None)
    more = evoprune.resume(
        finished.path, fork=True, settings={"evaluations": 52}, executor="inline", run_dir=tmp_path / "f", quiet=True
    )
    known = EvaluationLog(finished.path / "evaluations.wal")
    assert asked and not [key for key in asked if key in known]
    known.close()
    assert more.result is not None and more.result["evaluations"] == 52


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target.accumulation": "dense", "target.heads": "balanced", "target.drop": "none"},
        {"target.sparsity": 0.7, "target.cost": "flops", "target.sequence": 32},
    ],
    ids=["default", "dense", "flops"],
)
@pytest.mark.parametrize("form", ["compact", "masked"])
def test_the_exported_shape_prunes_to_the_winner(
    form: str, options: dict[str, Any], finished: RunDirectory, world: Path
) -> None:
    """The database is built again from what the file says, and gives the held-out loss that was measured."""
    run, name = finished, "-".join(map(str, options.values()))
    if options:
        path = world / f"run-{name}"
        changed = config(world, evaluations=14, **FEW, **options)
        run = RunDirectory(path) if path.exists() else start_search(changed, INLINE, run_dir=path)
    check_export(run, world, form)


@pytest.mark.parametrize("source", ["run", "run/export/shape.json"])
def test_a_search_may_start_from_what_another_found(
    source: str, finished: RunDirectory, world: Path, tmp_path: Path
) -> None:
    options = {"evaluations": 4, "seed_from": str(world / source), **FEW}
    run = start_search(config(world, **options), INLINE, run_dir=tmp_path / "run")
    best, lines = result_of(finished)["best"], lines_of(run)
    assert [line["origin"] for line in lines[:4]] == ["seed:uniform", "seed:given", "seed:dp", "seed:flap"]
    assert lines[1]["genome"] == [count for block in best["shape"] for count in block]
    given = next(row for row in result_of(run)["baselines"] if row["name"] == "given")
    assert (given["shape"], given["heldout"]) == (best["shape"], best["heldout"])


def test_a_shape_of_another_budget_is_moved_to_this_one(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    options = {"evaluations": 3, "seed_from": str(finished.path), "target.sparsity": 0.25, **FEW}
    run = start_search(config(world, **options), INLINE, run_dir=tmp_path / "run")
    given = next(row for row in result_of(run)["baselines"] if row["name"] == "given")
    assert 0.75 * DENSE - NEURON < given["cost"] <= 0.75 * DENSE


def test_keys_and_values_have_a_budget_of_their_own(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where 40 % are asked for, half of the four KV groups go, which is said; whatever else costs nothing stays."""
    options = {"target.cost": "kv_bytes", "target.sparsity": 0.4, "evaluations": 6}
    run = start_search(config(world, **options), INLINE, run_dir=tmp_path / "run")
    result = result_of(run)
    assert [row["name"] for row in result["baselines"]] == ["uniform", "dp"]
    # A key and a value of 8 float32 numbers for each group and token.
    assert (result["dense_cost"], result["rest_cost"]) == (2 * 2 * 2 * 8 * 4, 0)
    for entry in (result["best"], *result["baselines"]):
        assert sum(groups for groups, _, _ in entry["shape"]) == 2
        assert {neurons for _, _, neurons in entry["shape"]} == {48}
    assert result["best"]["removed"] == result["dense_cost"] // 2
    said = capsys.readouterr().err
    assert "no seeds by criteria of units" in said
    assert "warning: steps are coarse here: 0.5 of the bytes of keys and values" in said
    assert removed_text(result) == (
        "50.000% of the bytes of keys and values of heads and MLPs, where 40.000% was asked for"
    )


def test_a_criterion_that_fails_is_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any, block: BlockUnits, evidence: Any) -> Any:
        raise InvalidInput("no such luck")

    monkeypatch.setattr(type(UNIT_CRITERIA["flap"]), "scores", broken)
    run = start_search(config(world, evaluations=3, **FEW), INLINE, run_dir=tmp_path / "run")
    assert [row["name"] for row in result_of(run)["baselines"]] == ["uniform", "dp"]
    assert "warning: no seed by flap: " in capsys.readouterr().err


def test_candidates_without_a_fitness_neither_win_nor_stop_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever drops a part, and the seed by dynamic programming."""

    def watched(name: str) -> None:
        measure = getattr(StructureEvaluator, name)

        def measured(self: StructureEvaluator, given: Any, first: int, last: int) -> Any:
            whole = tuple(planned[:3] for planned in self.complete(given))
            if whole == best_by_errors or any(0 in kept for kept in whole):
                raise InvalidCandidate("NONFINITE", "the pruned model's loss is not finite")
            return measure(self, given, first, last)

        monkeypatch.setattr(StructureEvaluator, name, measured)

    plain = start_search(config(world, evaluations=3, **FEW), INLINE, run_dir=tmp_path / "plain")
    by_errors: Mapping[str, Any] = next(row for row in result_of(plain)["baselines"] if row["name"] == "dp")
    best_by_errors: tuple[Kept, ...] = tuple((groups, each, neurons) for groups, each, neurons in by_errors["shape"])
    watched("evaluate")
    watched("adopt")
    run = start_search(config(world, evaluations=20, **FEW), INLINE, run_dir=tmp_path / "run")
    result, lines = result_of(run), lines_of(run)
    assert (lines[1]["origin"], lines[1]["kl"], lines[1]["reason"]) == ("seed:dp", None, "NONFINITE")
    assert result["reasons"] == {"NONFINITE": sum(line["reason"] is not None for line in lines)}
    assert all(0 not in block for block in result["best"]["shape"])
    assert {row["name"]: row["fitness"] is None for row in result["baselines"]} == {
        "uniform": False, "dp": True, "flap": False, f"flap{ALONE}": True,
    }  # fmt: skip


def test_what_cannot_be_started_from_costs_nothing(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    """Refused before the database is built."""
    file = finished.path / "export" / "shape.json"
    wide, qwen = save_tiny(tmp_path / "wide", intermediate_size=64), save_tiny(tmp_path / "qwen", "qwen2")
    for model, said in ((wide, "block 0 has .* 48 neurons there and .* 64"), (qwen, "the classes differ")):
        options = {"model.name": str(model), "seed_from": str(file), **FEW}
        path = tmp_path / f"run-{model.name}"
        with pytest.raises(InvalidInput, match=f"{file}: the shape is of another .*: {said}"):
            start_search(config(world, **options), INLINE, run_dir=path)
        phases = [event["phase"] for event in RunDirectory.open(path).read_events() if event["event"] == "phase"]
        assert "building the structured database" not in phases


def test_a_shape_of_other_weights_is_taken_with_a_warning(
    finished: RunDirectory, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sibling = save_tiny(tmp_path / "sibling", seed=1)
    for model, warned in ((world / "model", False), (sibling, True)):
        options = {"model.name": str(model), "seed_from": str(finished.path), "evaluations": 2, **FEW}
        start_search(config(world, **options), INLINE, run_dir=tmp_path / f"run-{warned}")
        assert ("warning: the shape was found on other weights" in capsys.readouterr().err) == warned


def test_spdy_is_a_seed_within_the_budget(
    finished: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its candidates count, none is measured twice, its best has a row, and a stopped run goes on alike."""
    options = {"searcher.spdy": 11, "evaluations": 20, **FEW}
    run = start_search(config(world, **options), INLINE, run_dir=tmp_path / "run")
    result, lines = result_of(run), lines_of(run)
    assert result["evaluations"] == 20 == sum(line["counted"] for line in lines)
    asked = [line for line in lines if line["origin"] == "seed:spdy" and line["stage"] == "seeds"]
    assert len(asked) == 11 and all(line["counted"] and line["windows"] == [0, 4] for line in asked)
    assert [line["birth"] for line in asked] == list(range(3, 14))  # after uniform, dp and flap
    genomes = [tuple(line["genome"]) for line in lines if line["stage"] == "seeds"]
    assert len(set(genomes)) == len(genomes)
    rows = {row["name"]: row for row in result["baselines"]}
    known = {tuple(line["genome"]): line["kl"] for line in lines if line["stage"] == "seeds"}
    best = tuple(count for block in rows["spdy"]["shape"] for count in block)
    assert rows["spdy"]["fitness"] == known[best]
    mine = min(line["kl"] for line in asked)
    assert rows["spdy"]["fitness"] <= min(mine, rows["dp"]["fitness"])
    first = next(line for line in lines if line["stage"] == 0)
    by_birth = {line["birth"]: line for line in lines}
    assert by_birth[first["parents"][0]]["kl"] == min(known.values())
    path = tmp_path / "stopped"
    monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, "searching", 7))
    with pytest.raises(Interrupted):
        start_search(config(world, **options), INLINE, run_dir=path)
    assert 3 < len(lines_of(RunDirectory.open(path))) < 14
    monkeypatch.undo()
    again = resume_search(RunDirectory.open(path), INLINE)
    assert history(again) == history(run) and timeless(again.result) == timeless(run.result)


def test_allocators_are_seeds_as_well(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wants MLPs to lose all that goes has all heads, and by hand 15 of 96 neurons; nobody stands alone."""

    def mlps_only(self: Any, evidence: Any) -> list[float]:
        return [0.9 * ("mlp" in site.kind) for site in evidence.sites]

    monkeypatch.setattr(type(ALLOCATORS["owl"]), "request", mlps_only)
    options = {"searcher.seeds": ["flap", "atp", "owl"], "evaluations": 5}
    run = start_search(config(world, **options), INLINE, run_dir=tmp_path / "run")
    result = result_of(run)
    assert [row["name"] for row in result["baselines"]] == ["uniform", "dp", "flap", "atp", "owl", "flap alone"]
    rows = {row["name"]: row for row in result["baselines"]}
    assert all((groups, each) == (2, 2) for groups, each, _ in rows["owl"]["shape"])
    assert sum(neurons for _, _, neurons in rows["owl"]["shape"]) == 15
    assert rows["atp"]["fitness"] is not None
    for names, said in (
        (["nobody"], "no unit criterion or allocator 'nobody'"),
        (["dp"], "dp is a seed of every structure search"),
    ):
        with pytest.raises(InvalidInput, match=said):
            check_names(config(world, **{"searcher.seeds": names}))
