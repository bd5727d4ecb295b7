"""Whole allocation searches on a tiny random model: from a folder on disk to the exported winner."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import evoprune
from evoprune.fitness.adapters import list_sites
from evoprune.fitness.allocators import ALLOCATORS
from evoprune.fitness.level_evaluator import LevelEvaluator
from evoprune.fitness.parcels import require
from evoprune.fitness.statistics_passes import GRADIENT_NAMES
from evoprune.metrics.allocation_file import read_allocation, write_allocation
from evoprune.metrics.errors import Interrupted, InvalidCandidate, InvalidInput
from evoprune.metrics.records import Site
from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.engine.deadline import Deadline
from evoprune.search.engine.executor import Job
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.loop import Budget
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.spaces.levels import LevelSpace
from evoprune.search.worker_session import Resources
from tests.models import LAYERS, tiny_model
from tests.search.whole_runs import (
    history,
    installed_breeders,
    lines_of,
    result_of,
    stopping_in,
    study,
    timeless,
    tiny_options,
)

EVALUATIONS = 48
OFFSPRING = 8
WINDOWS = 13
STAGES = [{"windows": 2, "survivors": 3}, {"windows": 4, "survivors": 2}, {"windows": 8, "survivors": 1}]
INLINE = Resources(executor="inline")
# Asking one allocator is enough where what they ask for is not the point.
FEW = {"searcher.seeds": ["owl"]}


def config(world: Path, **changes: Any) -> AllocationSearchConfig:
    options = {
        **tiny_options(world),
        "searcher.windows": WINDOWS,
        "searcher.offspring": OFFSPRING,
        "searcher.stages": STAGES,
        "evaluations": EVALUATIONS,
        **changes,
    }
    return resolve_as(AllocationSearchConfig, overrides=options)


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    """The whole of it: every allocator is a seed, and several generations follow."""
    return start_search(config(world), INLINE, run_dir=world / "run")


@pytest.fixture(scope="module")
def sites() -> list[Site]:
    return [bound.site for bound in list_sites(tiny_model())]


def removed(allocation: Mapping[str, float], sites: list[Site]) -> int:
    """Weights that go, one row at a time; levels are exact in floating point."""
    assert set(allocation) == {site.name for site in sites}
    return sum(site.out_features * int(allocation[site.name] * site.in_features) for site in sites)


def test_the_result_has_what_scripts_rely_on(finished: RunDirectory, sites: list[Site]) -> None:
    result, lines = result_of(finished), lines_of(finished)
    assert finished.state == "finished"
    assert result["evaluations"] == EVALUATIONS == sum(line["counted"] for line in lines)
    assert result["births"] == len(lines)
    assert result["distinct"] == len({tuple(line["genome"]) for line in lines}) <= EVALUATIONS
    assert {row["name"] for row in result["baselines"]} == set(ALLOCATORS) - {"lpvit", "pmpq", "tdmpq"}
    for entry in (result["dense"], result["best"], *result["baselines"]):
        assert set(entry["heldout"]) == {"loss", "perplexity", "kl", "stderr", "tokens"}
        assert entry["heldout"]["tokens"] == 8 * 31
    assert result["dense"]["heldout"]["kl"] == pytest.approx(0, abs=1e-5)
    budget = sum(site.weights for site in sites) // 2
    for entry in (result["best"], *result["baselines"]):
        assert removed(entry["allocation"], sites) == budget
    assert result["best"]["removed"] == budget
    uniform = next(row for row in result["baselines"] if row["name"] == "uniform")
    assert set(uniform["allocation"].values()) == {0.5}
    assert (result["kind"], result["metric"], result["target"], result["front"]) == ("allocation", "wanda", "0.5", [])
    shared = json.dumps({name: result[name] for name in ("best", "front", "baselines", "dense")})
    assert "/" not in shared and "seconds" not in shared


def test_the_winner_is_no_worse_than_any_allocator_on_the_text_that_they_share(finished: RunDirectory) -> None:
    result, lines = result_of(finished), lines_of(finished)
    known = [row["fitness"] for row in result["baselines"]]
    assert None not in known
    assert result["best"]["fitness"] <= min(known)
    finals = [line for line in lines if line["stage"] == "final"]
    assert finals == lines[-len(finals) :]
    assert {tuple(line["windows"]) for line in finals} == {(0, WINDOWS)}
    assert result["best"]["fitness"] == min(line["kl"] for line in finals)
    assert result["generations"] == max(line["generation"] for line in lines if line["stage"] == 0) >= 4


def test_the_board_shows_every_evaluation(finished: RunDirectory) -> None:
    lines, trials = lines_of(finished), study(finished).trials
    counted = [line for line in lines if line["counted"]]
    assert [trial.user_attrs["levels"] for trial in trials] == [line["genome"] for line in counted]
    assert [trial.user_attrs["birth"] for trial in trials] == [line["birth"] for line in counted]
    measured = {
        (line["generation"], tuple(line["genome"]), line["stage"]): line["kl"]
        for line in lines
        if isinstance(line["stage"], int)
    }
    for trial, line in zip(trials, counted, strict=True):
        if line["stage"] == "seeds":
            assert trial.value == line["kl"]
            continue
        stages = [measured.get((line["generation"], tuple(line["genome"]), stage)) for stage in range(len(STAGES))]
        assert list(trial.intermediate_values.values()) == [value for value in stages if value is not None]
        assert (trial.state.name == "COMPLETE") == (stages[-1] is not None)
        if trial.state.name == "COMPLETE":
            assert trial.value == stages[-1]


def test_the_same_seed_gives_the_same_run(finished: RunDirectory, world: Path) -> None:
    again = start_search(config(world), INLINE, run_dir=world / "again")
    assert history(again) == history(finished)
    assert timeless(again.result) == timeless(finished.result)
    assert (again.path / "export/allocation.txt").read_bytes() == (finished.path / "export/allocation.txt").read_bytes()
    other = start_search(config(world, seed=1, evaluations=12, **FEW), INLINE, run_dir=world / "other")
    assert lines_of(other)[-1] != lines_of(finished)[-1]


@pytest.mark.ray
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ray_gives_the_same_run_with_any_number_of_workers(finished: RunDirectory, world: Path, workers: int) -> None:
    run = start_search(config(world), Resources(workers=workers), run_dir=world / f"ray-{workers}")
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


def stopping_after(polls: int) -> Callable[[], Any]:
    """In place of `stop_on_signals`: the user stops a session when it has asked so many times."""
    asked = itertools.count()
    return lambda: nullcontext(lambda: next(asked) >= polls)


def test_a_run_stopped_again_and_again_is_the_same_run(
    finished: RunDirectory, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While allocators are asked, in seeds, in generations, and on held-out text."""
    path = world / "stopped"
    asking, searching, measuring = "asking the allocators", "searching", "measuring on held-out text"
    for phase, after in ((asking, 3), (searching, 5), (searching, 90), (measuring, 3)):
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
    logged = [json.loads(line.partition(b" ")[2])["k"] for line in _wal(run)]
    assert max(Counter(logged).values()) == 1
    assert [trial.user_attrs for trial in study(run).trials] == [trial.user_attrs for trial in study(finished).trials]


@pytest.mark.parametrize("name", sorted(set(installed_breeders()) - {"evolution"}))
def test_a_run_of_any_searcher_goes_on_where_it_was_stopped(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sampler knows is not stored: it is told again, and goes on to ask what it would have asked."""
    options = {"searcher.name": name, "searcher.offspring": 4, "evaluations": 18, "window": 3, **FEW}
    options["searcher.stages"] = [{"windows": 2, "survivors": 2}, {"windows": 4, "survivors": 1}]
    whole = start_search(config(world, **options), INLINE, run_dir=tmp_path / "whole")
    path = tmp_path / "stopped"
    for after in (9, 4, 7):
        monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, "searching", after))
        with pytest.raises(Interrupted):
            if path.exists():
                resume_search(RunDirectory.open(path), INLINE)
            else:
                start_search(config(world, **options), INLINE, run_dir=path)
    monkeypatch.undo()
    run = resume_search(RunDirectory.open(path), INLINE)
    assert history(run) == history(whole)
    assert timeless(run.result) == timeless(whole.result)


def _wal(run: RunDirectory) -> list[bytes]:
    return (run.path / "evaluations.wal").read_bytes().splitlines()


def test_the_deadline_of_an_evaluation_follows_its_stage(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Job] = []

    class Watched(InlineExecutor):
        def submit(self, jobs: Iterable[Job]) -> None:
            jobs = list(jobs)
            given.extend(jobs)
            super().submit(jobs)

    monkeypatch.setattr("evoprune.search.worker_session.InlineExecutor", Watched)
    monkeypatch.setattr("evoprune.search.engine.deadline.SHORTEST", 0.0)
    monkeypatch.setattr(Deadline, "observe", lambda *_: None)
    start_search(config(world, evaluations=12, **FEW), INLINE, run_dir=tmp_path / "run")
    by_windows: dict[int, set[float]] = {}
    for job in given:
        if job.kind == "levels":
            assert job.deadline is not None
            windows = job.payload["last"] - job.payload["first"]
            by_windows.setdefault(windows, set()).add(round(job.deadline / windows, 9))
    assert len(by_windows) > 1
    assert len(set.union(*by_windows.values())) == 1


@pytest.mark.parametrize("asked", [8, 15])
def test_time_that_is_over_leads_to_finals(asked: int, world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Among children, and in a later stage: what was begun is finished, and no more begins."""
    calls = itertools.count()

    def budget(evaluations: int | None, *, expired: Any, stopping: Any) -> Budget:
        assert evaluations is None
        return Budget(None, expired=lambda: next(calls) >= asked, stopping=stopping)

    monkeypatch.setattr("evoprune.search.search_run.Budget", budget)
    run = start_search(config(world, evaluations=None, minutes=1, window=2, **FEW), INLINE, run_dir=tmp_path / "run")
    result, lines = result_of(run), lines_of(run)
    finals = [line for line in lines if line["stage"] == "final"]
    assert finals and finals == lines[-len(finals) :]
    assert result["best"]["fitness"] == min(line["kl"] for line in finals)
    children, further = (
        [line for line in lines if line["stage"] == stage and line["origin"] != "parent"] for stage in (0, 1)
    )
    least, most = {8: (1, OFFSPRING - 1), 15: (OFFSPRING, OFFSPRING)}[asked]
    assert least <= len(children) <= most and bool(further) == (asked == 15)
    assert not [line for line in lines if line["stage"] == 2]
    assert result["evaluations"] == len(study(run).trials) == 2 + len(children)


def test_minutes_alone_end_a_search(world: Path, tmp_path: Path) -> None:
    run = start_search(config(world, evaluations=None, minutes=1e-9, **FEW), INLINE, run_dir=tmp_path / "run")
    assert result_of(run)["evaluations"] == 2
    assert [line["stage"] for line in lines_of(run)] == ["seeds", "seeds", "final"]
    assert (run.path / "export" / "allocation.json").exists()


@pytest.mark.parametrize("source", ["run", "run/export/allocation.json"])
def test_a_search_may_start_from_what_another_found(
    source: str, finished: RunDirectory, world: Path, tmp_path: Path, sites: list[Site]
) -> None:
    run = start_search(
        config(world, evaluations=3, seed_from=str(world / source), **FEW), INLINE, run_dir=tmp_path / "run"
    )
    best, lines = result_of(finished)["best"], lines_of(run)
    assert [line["origin"] for line in lines[:3]] == ["seed:uniform", "seed:given", "seed:owl"]
    assert lines[1]["genome"] == [256 * best["allocation"][site.name] for site in sites]
    given = next(row for row in result_of(run)["baselines"] if row["name"] == "given")
    assert (given["allocation"], given["heldout"]) == (best["allocation"], best["heldout"])


def test_an_allocation_of_another_budget_is_moved_to_this_one(
    finished: RunDirectory, world: Path, tmp_path: Path, sites: list[Site]
) -> None:
    run = start_search(
        config(world, evaluations=3, seed_from=str(finished.path), **FEW, **{"target.sparsity": 0.7}),
        INLINE,
        run_dir=tmp_path / "run",
    )
    rows = {row["name"]: row["allocation"] for row in result_of(run)["baselines"]}
    step = min(site.out_features for site in sites)
    for allocation in rows.values():
        assert abs(removed(allocation, sites) - 0.7 * sum(site.weights for site in sites)) <= step
    source = result_of(finished)["best"]["allocation"]
    shifts = [rows["given"][name] - sparsity for name, sparsity in source.items() if 0 < rows["given"][name] < 0.9]
    assert max(shifts) - min(shifts) < 0.15


def test_by_default_searches_start_from_what_forward_passes_answer() -> None:
    config = resolve_as(AllocationSearchConfig)
    assert not GRADIENT_NAMES & set(config.context().statistics)
    assert {"owl", "dp", "atp"} <= set(config.seeds)
    assert not {"lpvit", "tdmpq", "pmpq"} & set(config.seeds)


def test_a_budget_too_small_for_all_seeds_is_kept(world: Path, tmp_path: Path) -> None:
    run = start_search(
        config(world, evaluations=2, **{"searcher.seeds": ["erk", "lamp", "owl"]}), INLINE, run_dir=tmp_path / "run"
    )
    result = result_of(run)
    assert result["evaluations"] == len(study(run).trials) == 2
    rows = {row["name"]: row["fitness"] is None for row in result["baselines"]}
    assert rows == {"uniform": False, "erk": False, "lamp": True, "owl": True}


def test_a_fork_with_more_evaluations_does_none_again(
    finished: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        finished.path, fork=True, settings={"evaluations": 64}, executor="inline", run_dir=tmp_path / "f", quiet=True
    )
    known = EvaluationLog(finished.path / "evaluations.wal")
    assert asked and not [key for key in asked if key in known]
    known.close()
    result = more.result
    assert result is not None and result["evaluations"] == 64
    old, new = lines_of(finished), lines_of(more.directory)
    last = max(line["generation"] for line in old if line["stage"] == 0)
    whole = [line for line in old if line["generation"] < last]
    assert new[: len(whole)] == whole
    assert result["best"]["fitness"] <= min(row["fitness"] for row in result["baselines"])


def ranks_of(run: RunDirectory) -> dict[str, torch.Tensor]:
    """The rank bytes that a run worked with, by site name."""
    return load_file(require(run.identity["database"]) / "ranks.safetensors")


@pytest.mark.parametrize(
    ("metric", "options"),
    [
        ("wanda", {}),
        ("add(abs(W),mul(sparsity,X_l2))", {}),
        ("magnitude", {"target.drop": "parts"}),
        ("magnitude", {"target.drop": "parts", "target.drop_only": True, "target.sparsity": 0.4}),
    ],
)
def test_the_exported_winner_prunes_to_the_winner(
    metric: str, options: dict[str, Any], finished: RunDirectory, world: Path, tmp_path: Path
) -> None:
    """The file and `prune` give the masks of the winner's levels bit for bit, and `evaluate` its held-out loss."""
    run = finished
    if metric != "wanda":
        options = {**options, **FEW, "evaluations": 14, "target.metric": metric}
        run = start_search(config(world, **options), INLINE, run_dir=tmp_path / "run")
    best, text = result_of(run)["best"], str(world / "text.txt")
    assert len(set(best["allocation"].values())) > 1
    dense = evoprune.load_model(str(world / "model"))
    pruned = evoprune.prune(
        dense,
        metric=metric,
        allocation=run.path / "export" / "allocation.json",
        calibration=text,
        calibration_sequences=8,
        calibration_window=32,
    )
    assert pruned.removed == best["removed"]
    # EvoPress's text says the same; what only drops needs no budget and no step.
    budget = {} if options.get("target.drop_only") else {"sparsity": 0.5, "step": 1}
    model: dict[str, Any] = {"model": "LlamaForCausalLM", "sites": [bound.site for bound in dense.sites]}
    text_form = read_allocation(run.path / "export" / "allocation.txt", **model, **budget)
    assert [site.removed for site in text_form.sites] == [
        site.removed for site in read_allocation(run.path / "export" / "allocation.json").sites
    ]
    ranks = ranks_of(run)
    for bound in pruned.language_model.sites:
        level = best["allocation"][bound.site.name] * 256
        assert level == int(level)
        assert torch.equal(bound.weight() != 0, ranks[bound.site.name].int() >= int(level))
    found = evoprune.evaluate(pruned.language_model, dense=dense, data=text, window=32, tokens=8 * 32)
    assert found.loss == pytest.approx(best["heldout"]["loss"], rel=1e-6)
    assert found.kl == pytest.approx(best["heldout"]["kl"], rel=1e-4)
    assert found.held_out.tokens == best["heldout"]["tokens"]


def test_evopress_text_reads_back_to_the_same_budget(finished: RunDirectory, sites: list[Site]) -> None:
    folder = finished.path / "export"
    ours = read_allocation(folder / "allocation.json")
    theirs = read_allocation(folder / "allocation.txt", model=ours.model, sites=sites, sparsity=0.5, step=1)
    assert ours.model == "LlamaForCausalLM" and ours.sparsity == 0.5 and ours.allocator == "evolution"
    assert [site.removed for site in theirs.sites] == [site.removed for site in ours.sites]
    assert theirs.removed == result_of(finished)["best"]["removed"]


@pytest.mark.parametrize("granularity", ["block", "kind"])
def test_groups_of_matrices_share_a_sparsity(
    granularity: str, world: Path, tmp_path: Path, sites: list[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FEW, "evaluations": 20, "target.granularity": granularity}
    monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_after(40))
    with pytest.raises(Interrupted):
        start_search(config(world, **options), INLINE, run_dir=tmp_path / "run")
    unfinished = evoprune.Run(tmp_path / "run").best
    assert unfinished is not None
    monkeypatch.undo()
    run = resume_search(RunDirectory.open(tmp_path / "run"), INLINE)
    result = result_of(run)
    group = {site.name: site.block if granularity == "block" else site.kind for site in sites}
    for entry in (unfinished, result["best"], *result["baselines"]):
        assert set(entry["allocation"]) == set(group)
        pairs = {(group[name], sparsity) for name, sparsity in entry["allocation"].items()}
        assert len(pairs) == len(set(group.values())) == (LAYERS if granularity == "block" else 7)
    space = LevelSpace(sites, 0.5, granularity)  # type: ignore[arg-type]
    assert abs(removed(result["best"]["allocation"], sites) - space.budget) <= space.tolerance
    assert read_allocation(run.path / "export" / "allocation.json").by_name() == result["best"]["allocation"]


def failing(monkeypatch: pytest.MonkeyPatch, hopeless: Callable[[Mapping[str, int], int], bool]) -> None:
    """From now on some level vectors have no loss; `hopeless` is told the levels and the number of windows."""

    def watched(name: str) -> None:
        measure = getattr(LevelEvaluator, name)

        def measured(self: LevelEvaluator, levels: Mapping[str, int], first: int, last: int) -> Any:
            if hopeless(levels, last - first):
                raise InvalidCandidate("NONFINITE", "the pruned model's loss is not finite")
            return measure(self, levels, first, last)

        monkeypatch.setattr(LevelEvaluator, name, measured)

    watched("evaluate")
    watched("adopt")


def test_a_seed_without_a_fitness_neither_wins_nor_stops_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda levels, windows: set(levels.values()) == {128})
    run = start_search(config(world, evaluations=20, **FEW), INLINE, run_dir=tmp_path / "run")
    result, lines = result_of(run), lines_of(run)
    assert (lines[0]["origin"], lines[0]["kl"], lines[0]["reason"]) == ("seed:uniform", None, "NONFINITE")
    assert result["reasons"] == {"NONFINITE": 1}
    assert {row["name"]: row["fitness"] is None for row in result["baselines"]} == {"uniform": True, "owl": False}
    assert set(result["best"]["allocation"].values()) != {0.5}
    assert study(run).trials[0].state.name == "FAIL"


@pytest.mark.parametrize(("stage", "unseen"), [(0, 2), (2, 4)])
def test_children_without_a_fitness_cost_evaluations_only(
    stage: int, unseen: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stage they fail in, in every generation, the parent's too; the finals still come."""
    failing(monkeypatch, lambda levels, windows: windows == unseen)
    # Of each pool another number of windows is new, so that one of them can be told to fail.
    stages = [{"windows": 2, "survivors": 3}, {"windows": 5, "survivors": 2}, {"windows": 9, "survivors": 1}]
    options = {"evaluations": 20, "searcher.stages": stages, **FEW}
    run = start_search(config(world, **options), INLINE, run_dir=tmp_path / "run")
    result, lines = result_of(run), lines_of(run)
    assert result["evaluations"] == 20 == len(study(run).trials)
    assert result["best"]["generation"] == 0 and result["generations"] == 3
    assert lines[-1]["stage"] == "final"
    failed = [line for line in lines if line["stage"] == stage]
    assert "parent" in {line["origin"] for line in failed}
    assert {line["reason"] for line in failed} == {"NONFINITE"}
    reasons = Counter(trial.user_attrs["reason"] for trial in study(run).trials)
    assert reasons["NONFINITE"] == sum(line["origin"] == "switch" for line in failed) > 0


def test_a_run_without_any_fitness_fails(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda levels, windows: True)
    with pytest.raises(InvalidInput, match="no candidate could be evaluated"):
        start_search(config(world, **FEW), INLINE, run_dir=tmp_path / "run")
    run = evoprune.Run(tmp_path / "run")
    assert (run.state, run.best, run.summary["evaluations"]) == ("failed", None, 2)


def test_an_allocator_that_fails_is_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise InvalidInput("no such luck")

    monkeypatch.setattr(type(ALLOCATORS["owl"]), "request", broken)
    run = start_search(config(world, evaluations=3, **FEW), INLINE, run_dir=tmp_path / "run")
    assert [row["name"] for row in result_of(run)["baselines"]] == ["uniform"]
    assert "warning: no seed by owl: " in capsys.readouterr().err


def test_what_cannot_be_started_from_costs_nothing(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    """Refused before an allocator works; a door that finds the log empty removes the folder."""
    source = read_allocation(finished.path / "export" / "allocation.json")
    for name, change, said in (
        ("class", {"model": "MistralForCausalLM"}, "of another model, MistralForCausalLM and not this Llama"),
        ("fewer", {"sites": source.sites[:-1], "sparsity": 0.5}, "gives model.layers.1.mlp.down_proj no sparsity"),
    ):
        file = tmp_path / f"{name}.json"
        document = {**{field: getattr(source, field) for field in source.__slots__}, **change}
        changed = type(source)(**document)
        changed = type(source)(**{**document, "sparsity": changed.removed / changed.weights})
        write_allocation(changed, file)
        with pytest.raises(InvalidInput, match=said):
            start_search(config(world, seed_from=str(file), **FEW), INLINE, run_dir=tmp_path / name)
        assert not _wal(RunDirectory.open(tmp_path / name))
