"""Whole searches for a front on a tiny random model: from a folder on disk to a file for each member."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest

import evoprune
from evoprune.fitness.adapters import list_sites
from evoprune.metrics.allocation_file import read_allocation
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.metrics.records import Site
from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.front_result import spread
from evoprune.search.report import write_report
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.tables_front import front_head, front_rows
from evoprune.search.worker_session import Resources
from tests.models import tiny_model
from tests.search.html_page import Page
from tests.search.whole_runs import history, lines_of, result_of, stopping_in, timeless, tiny_options

EVALUATIONS = 60
INLINE = Resources(executor="inline")
DROPPED = {"target.drop": "parts", "target.drop_only": True, "target.sparsity_range": (0.2, 0.8), "evaluations": 30}


def config(world: Path, **changes: Any) -> AllocationSearchConfig:
    options = {
        **tiny_options(world),
        "target.pareto": "parameters",
        "target.sparsity_range": (0.3, 0.7),
        "searcher.windows": 12,
        "searcher.offspring": 12,
        "searcher.seeds": ["owl", "erk"],
        "front.windows": 4,
        "front.members": 5,
        "evaluations": EVALUATIONS,
        **changes,
    }
    return resolve_as(AllocationSearchConfig, overrides=options)


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    return start_search(config(world), INLINE, run_dir=world / "run")


@pytest.fixture(scope="module")
def sites() -> list[Site]:
    return [bound.site for bound in list_sites(tiny_model())]


def test_the_result_has_the_front(finished: RunDirectory, sites: list[Site]) -> None:
    result, lines = result_of(finished), lines_of(finished)
    assert result["evaluations"] == EVALUATIONS == sum(line["counted"] for line in lines)
    dense = sum(site.weights for site in sites)
    assert result["pareto"] == {"cost": "parameters", "unit": "weights", "dense": dense, "range": [0.3, 0.7]}
    front = result["front"]
    assert len(front) >= 3
    for better, row in itertools.pairwise(front):  # the dearest first: it costs more, and loses less
        assert better["cost"] > row["cost"] and better["fitness"] < row["fitness"]
    finals = [line for line in lines if line["stage"] == "final"]
    by_birth = {line["birth"]: line for line in finals}
    for row in front:
        line = by_birth[row["birth"]]
        assert (row["fitness"], row["cost"]) == (line["kl"], line["cost"])
        removed = sum(
            site.out_features * int(row["allocation"][site.name] * site.in_features) for site in sites
        )  # exact in floating point
        assert row["removed"] == removed == dense - row["cost"]
        assert row["sparsity"] == removed / dense and row["saved"] == round(100 * removed / dense)
    measured = [row for row in front if row["heldout"] is not None]
    assert 2 <= len(measured) <= 5 and front[0] in measured and front[-1] in measured and result["best"] in measured
    for row in measured:
        assert set(row["heldout"]) == {"loss", "perplexity", "kl", "stderr", "tokens"}
        if row["uniform"] is not None:
            assert abs(row["uniform"]["cost"] - row["cost"]) <= dense / 100
            difference = row["heldout"]["loss"] - row["uniform"]["heldout"]["loss"]
            assert row["uniform"]["member_minus_this"]["loss"] == pytest.approx(difference, abs=1e-9)
    assert sum(row["uniform"] is not None for row in measured) > len(measured) / 2
    distances = [abs(row["sparsity"] - 0.5) for row in front]
    assert result["best"] == front[distances.index(min(distances))]
    names = sorted(row["name"] for row in result["baselines"])
    assert names == ["erk"] * 3 + ["owl"] * 3 + ["uniform"] * 3
    shared = json.dumps({name: result[name] for name in ("best", "front", "baselines", "dense")})
    assert "/" not in shared and "seconds" not in shared


def test_every_exported_member_prunes_to_what_was_measured(finished: RunDirectory, world: Path) -> None:
    """`prune` with its file leaves as many weights as its cost says, and the loss that the result says."""
    result, folder = result_of(finished), finished.path / "export"
    assert {path.name for path in (folder / "front").iterdir()} == {f"{row['saved']}.json" for row in result["front"]}
    chosen = read_allocation(folder / "allocation.json")
    assert chosen.by_name() == result["best"]["allocation"] and chosen.allocator == "nsga2"
    text = str(world / "text.txt")
    for row in (result["front"][0], result["front"][-1]):
        dense = evoprune.load_model(str(world / "model"))
        pruned = evoprune.prune(
            dense,
            allocation=folder / "front" / f"{row['saved']}.json",
            calibration=text,
            calibration_sequences=8,
            calibration_window=32,
        )
        assert sum(int((bound.weight() != 0).sum()) for bound in pruned.language_model.sites) == row["cost"]
        found = evoprune.evaluate(pruned.language_model, data=text, window=32, tokens=8 * 32)
        assert found.loss == pytest.approx(row["heldout"]["loss"], rel=1e-6)


def test_the_same_seed_gives_the_same_run(finished: RunDirectory, world: Path) -> None:
    again = start_search(config(world), INLINE, run_dir=world / "again")
    assert history(again) == history(finished)
    assert timeless(again.result) == timeless(finished.result)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_run(finished: RunDirectory, world: Path) -> None:
    run = start_search(config(world), Resources(workers=2), run_dir=world / "ray")
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


def stopped_again_and_again(
    configuration: AllocationSearchConfig, path: Path, stops: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> RunDirectory:
    for phase, after in stops:
        monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, phase, after))
        with pytest.raises(Interrupted):
            if path.exists():
                resume_search(RunDirectory.open(path), INLINE)
            else:
                start_search(configuration, INLINE, run_dir=path)
    monkeypatch.undo()
    return resume_search(RunDirectory.open(path), INLINE)


def test_a_run_stopped_again_and_again_is_the_same_run(
    finished: RunDirectory, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = [("asking the allocators", 3), ("searching", 5), ("searching", 30), ("measuring on held-out text", 3)]
    run = stopped_again_and_again(config(world), world / "stopped", stops, monkeypatch)
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)
    for name in ("allocation.txt", f"front/{result_of(run)['best']['saved']}.json"):
        ours, theirs = ((one.path / "export" / name).read_text() for one in (run, finished))
        assert ours.replace(run.run_id, "") == theirs.replace(finished.run_id, "")


def test_a_resumed_run_keeps_the_latencies_that_it_began_with(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another measurement would give other costs: here a thousand times the first."""
    calls = itertools.count()

    def measured(model: Any, parts: list[list[int]], window: int) -> tuple[int, list[int]]:
        scale = 1000 ** next(calls)
        return 100 * scale, [(10 + at) * scale for at in range(len(parts))]

    def whole(model: Any, absent: list[list[list[int]]], window: int) -> list[int]:
        return [1000 - len(parts) for parts in absent]

    monkeypatch.setattr("evoprune.fitness.allocation_worker.part_latencies", measured)
    monkeypatch.setattr("evoprune.fitness.allocation_worker.whole_latencies", whole)
    options = {**DROPPED, "target.pareto": "latency"}
    first = start_search(config(world, **options), INLINE, run_dir=tmp_path / "whole")
    assert next(calls) == 1
    calls = itertools.count()
    path = tmp_path / "stopped"
    monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, "searching", 9))
    with pytest.raises(Interrupted):
        start_search(config(world, **options), INLINE, run_dir=path)
    monkeypatch.setattr("evoprune.search.session.stop_on_signals", lambda: nullcontext(lambda: False))
    run = resume_search(RunDirectory.open(path), INLINE)
    assert next(calls) == 1
    assert history(run) == history(first)
    assert timeless(run.result) == timeless(first.result)
    told = result_of(run)["pareto"]
    assert (told["dense"], told["rest"], told["unit"]) == (100 + 10 + 11 + 12 + 13, 100, "ns")
    names = [f"block {block} {part}" for block in (0, 1) for part in ("attention", "mlp")]
    assert told["parts"] == dict(zip(names, (10, 11, 12, 13), strict=True))
    assert told["measured"]["dense"] == 1000
    assert front_head(result_of(run))[1] == "ms"
    assert {cells[2] for cells in front_rows(result_of(run))} == {"0.00"}  # a thousand nanoseconds
    for row, taken in zip(result_of(run)["front"], told["measured"]["front"], strict=True):
        gone = {name.rpartition(".")[0] for name, share in row["allocation"].items() if share == 1}
        assert taken == (None if row["heldout"] is None else 1000 - len(gone))


@pytest.mark.parametrize(
    "options",
    [
        {"target.pareto": "flops", **DROPPED},
        {"target.pareto": "flops", "target.drop": "parts", "evaluations": 30},
        {"target.granularity": "block", "evaluations": 30},
        {"target.drop": "blocks", "target.drop_only": True, "evaluations": 20},
    ],
)
def test_fronts_of_every_space(options: dict[str, Any], world: Path, tmp_path: Path, sites: list[Site]) -> None:
    run = start_search(config(world, **options), INLINE, run_dir=tmp_path / "run")
    result = result_of(run)
    assert result["front"] and result["best"] in result["front"]
    for row in result["front"]:
        if options.get("target.drop_only"):
            assert set(row["allocation"].values()) <= {0.0, 1.0}
        if options.get("target.pareto") == "flops":
            alive = {(s.block, "attn" in s.kind) for s in sites if row["allocation"][s.name] < 1}
            products = sum(2 * 32 * 32 * 32 for _, attention in alive if attention)
            assert row["cost"] == 32 * (sum(s.weights for s in sites) - row["removed"]) + products
        assert (run.path / "export" / "front" / f"{row['saved']}.json").exists()
    if "target.pareto" not in options:  # figures take a while
        assert "The front" in Page(write_report(run).read_text()).text


def test_the_board_shows_every_evaluation_and_the_front(finished: RunDirectory) -> None:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(finished.path / "optuna.log"))
    )
    study = optuna.load_study(study_name=finished.run_id, storage=storage)
    counted = [line for line in lines_of(finished) if line["counted"]]
    assert [trial.user_attrs["levels"] for trial in study.trials] == [line["genome"] for line in counted]
    assert [trial.value for trial in study.trials] == [line["kl"] for line in counted]
    front = optuna.load_study(study_name=f"{finished.run_id}/front", storage=storage)
    assert front.metric_names == ["fitness", "parameters"]
    assert [trial.values for trial in front.trials] == [[line["kl"], line["cost"]] for line in counted if line["front"]]


def test_the_report_of_a_run(finished: RunDirectory) -> None:
    page = Page(write_report(finished).read_text())
    result = result_of(finished)
    assert {path.stem for path in (finished.path / "plots").iterdir()} == {"front", "kinds", "allocation", "candidates"}
    assert {f"figure-{name}" for name in ("front", "kinds", "allocation", "candidates")} <= set(page.ids)
    for row in result["front"]:
        assert f"{row['saved']} %" in page.text
    assert write_report(finished).read_bytes() == (finished.path / "report.html").read_bytes()


def test_the_report_of_an_unfinished_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(tmp_path / "run", "searching", 30))
    with pytest.raises(Interrupted):
        start_search(config(world), INLINE, run_dir=tmp_path / "run")
    run = evoprune.Run(tmp_path / "run")
    assert run.best is not None and run.front == []
    page = Page(run.report().read_text())
    assert "not finished" in page.text and "Not beaten so far" in page.text


def test_a_search_may_start_from_a_member_of_a_front(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    row = result_of(finished)["front"][0]
    file = finished.path / "export" / "front" / f"{row['saved']}.json"
    run = start_search(config(world, evaluations=5, seed_from=str(file)), INLINE, run_dir=tmp_path / "run")
    lines = lines_of(run)
    assert [line["origin"] for line in lines[:5]] == [
        "seed:uniform@0.3", "seed:uniform@0.5", "seed:uniform@0.7", "seed:given", "seed:erk@0.3",
    ]  # fmt: skip
    assert lines[3]["cost"] == row["cost"]


def test_a_range_that_nothing_meets_is_refused(world: Path, tmp_path: Path) -> None:
    beyond = {"target.sparsity_range": (0.9, 0.9999), "target.sparsity": 0.95}
    with pytest.raises(InvalidInput, match="weights cannot go"):
        start_search(config(world, **beyond), INLINE, run_dir=tmp_path / "run")


def test_held_out_text_is_spread_over_the_front() -> None:
    assert spread(4, 12, 2) == [0, 1, 2, 3]
    for count, most, always in itertools.product((5, 13, 40), (2, 3, 5), (0, 3, 4)):
        chosen = spread(count, most, always)
        assert chosen == sorted(set(chosen)) and always in chosen and len(chosen) == min(count, most)
        if most > 2:
            assert (chosen[0], chosen[-1]) == (0, count - 1)
