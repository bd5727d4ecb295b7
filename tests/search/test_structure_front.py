"""Whole searches for a front of shapes on a tiny random model, and the shapes between two budgets that they breed."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import optuna
import pytest

import evoprune
from evoprune.cli import main
from evoprune.fitness import structure_worker
from evoprune.fitness.latency_table import place_of, read_table
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.metrics.shape_file import read_shape
from evoprune.search.config import resolve_as
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.report import figures_front, write_report
from evoprune.search.report.front_data import StructureFrontData
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.spaces.structure_range import StructureRange
from evoprune.search.tables_front import front_head, front_rows
from evoprune.search.worker_session import Resources
from tests.search.html_page import Page
from tests.search.structure_runs import DENSE, dense_parameters, parameters
from tests.search.test_latency_run import planted_table
from tests.search.test_structure_space import cache, kept_parameters
from tests.search.test_structure_space import parameters as costs_of
from tests.search.whole_runs import history, lines_of, result_of, stopping_in, timeless, tiny_options

INLINE = Resources(executor="inline")
EVALUATIONS = 18


def config(world: Path, **changes: Any) -> StructureSearchConfig:
    options = {
        **tiny_options(world),
        "target.pareto": "parameters",
        "target.sparsity_range": (0.2, 0.7),
        "target.sparsity": 0.45,
        "searcher.windows": 10,
        "searcher.offspring": 8,
        "searcher.seeds": ["flap"],
        "searcher.methods": ["shortgpt"],
        "front.windows": 4,
        "front.members": 4,
        "evaluations": EVALUATIONS,
        **changes,
    }
    return resolve_as(StructureSearchConfig, overrides=options)


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    return start_search(config(world), INLINE, run_dir=world / "run")


@pytest.fixture(scope="module")
def timed(world: Path) -> RunDirectory:
    """A front of three axes, with times that are planted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure_worker, "latency_table", planted_table)
        return start_search(
            config(world, evaluations=14, **{"target.pareto": "latency"}), INLINE, run_dir=world / "timed"
        )


@pytest.mark.parametrize("heads", ["both", "groups"])
@pytest.mark.parametrize("drop", ["none", "parts"])
def test_no_operator_leaves_the_range_or_stays_at_a_budget(heads: Any, drop: Any) -> None:
    costs = costs_of(4, 8, 96)
    space = StructureRange(costs, (0.2, 0.6), heads=heads, drop=drop)
    rng = random.Random(0)
    genome = other = space.at(0.4).near(space.at(0.4).even(), rng)
    reached = []
    for _ in range(600):
        if (made := space.switched(genome, rng, space.spans)) is not None:
            assert made != genome
            other, genome = genome, made
        crossed = space.crossed(genome, other, rng)
        for found in (genome, *([] if crossed is None else [crossed])):
            removed = costs.dense - kept_parameters(space.shape(found), biased=False)
            assert removed == space.removed(found) and space.sparsity_of(found) == removed / costs.dense
            assert 0.2 * costs.dense <= removed <= 0.6 * costs.dense + space.tolerance
            reached.append(removed / costs.dense)
    assert min(reached) < 0.25 and max(reached) > 0.55


def test_shapes_of_one_budget_are_of_the_range_around_it() -> None:
    space = StructureRange(costs_of(4, 8, 96), (0.2, 0.6), drop="parts")
    for fraction in (0.2, 0.33, 0.6):
        one, rng = space.at(fraction), random.Random(1)
        found = one.near(one.even(), rng)
        assert one.budget <= space.removed(found) <= one.budget + one.tolerance and space.holds(found)
    few = StructureRange(cache(4, 8, 96), (0.3, 0.6), heads="groups")
    assert few.holds(few.at(0.3).near(few.at(0.3).even(), random.Random(0)))
    with pytest.raises(InvalidInput, match=r"cannot go: what may go makes up 0\.75"):
        StructureRange(cache(4, 8, 96), (0.3, 0.9), heads="groups")


def test_the_result_has_the_front(finished: RunDirectory) -> None:
    result, lines = result_of(finished), lines_of(finished)
    assert result["evaluations"] == EVALUATIONS == sum(line["counted"] for line in lines)
    assert result["pareto"] == {"cost": "parameters", "unit": "parameters", "dense": DENSE, "range": [0.2, 0.7]}
    front = result["front"]
    assert len(front) >= 3
    for better, row in itertools.pairwise(front):
        assert better["cost"] > row["cost"] and better["fitness"] < row["fitness"]
    finals = {line["birth"]: line for line in lines if line["stage"] == "final"}
    for row in front:
        assert row["fitness"] == finals[row["birth"]]["kl"]
        assert row["cost"] == parameters(row["shape"]) == DENSE - row["removed"]
        assert row["saved"] == round(100 * row["sparsity"]) and row["sparsity"] == row["removed"] / DENSE
    measured = [row for row in front if row["heldout"] is not None]
    assert 2 <= len(measured) <= 4 and result["best"] in measured
    assert any(row["uniform"] is not None for row in measured)
    distances = [abs(row["sparsity"] - 0.45) for row in front]
    assert result["best"] == front[distances.index(min(distances))]
    # Of two blocks, the smaller of the three budgets pay for none.
    names = ["dp"] * 3 + ["flap"] * 3 + ["flap alone"] * 3 + ["shortgpt method"] + ["uniform"] * 3
    assert sorted(row["name"] for row in result["baselines"]) == names
    for row in result["baselines"]:
        assert row["cost"] == parameters(row["shape"]) and row["sparsity"] == (DENSE - row["cost"]) / DENSE
    shared = json.dumps({name: result[name] for name in ("best", "front", "baselines", "dense")})
    assert "/" not in shared and "seconds" not in shared


def test_every_exported_member_prunes_to_what_was_measured(finished: RunDirectory, world: Path) -> None:
    result, folder = result_of(finished), finished.path / "export"
    assert {path.name for path in (folder / "front").iterdir()} == {f"{row['saved']}.json" for row in result["front"]}
    best = evoprune.Run(finished.path).export(world / "best.json")
    named = folder / "front" / f"{result['best']['saved']}.json"
    assert best.read_bytes() == named.read_bytes() == (folder / "shape.json").read_bytes()
    text = str(world / "text.txt")
    for row in (result["front"][0], result["front"][-1]):
        dense = evoprune.load_model(str(world / "model"))
        small = evoprune.prune_shape(dense, read_shape(folder / "front" / f"{row['saved']}.json"), form="compact")
        assert small.parameters == dense_parameters(dense) - row["removed"]
        found = evoprune.evaluate(small.language_model, data=text, window=32, tokens=8 * 32)
        assert found.loss == pytest.approx(row["heldout"]["loss"], rel=1e-5)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_the_same_run(finished: RunDirectory, world: Path) -> None:
    run = start_search(config(world), Resources(workers=2), run_dir=world / "ray")
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


def test_a_run_stopped_again_and_again_is_the_same_run(
    finished: RunDirectory, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world / "stopped"
    for phase, after in (("searching", 16), ("measuring on held-out text", 3)):
        monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, phase, after))
        with pytest.raises(Interrupted):
            if path.exists():
                resume_search(RunDirectory.open(path), INLINE)
            else:
                start_search(config(world), INLINE, run_dir=path)
        if phase == "searching":
            data = StructureFrontData(RunDirectory.open(path))
            assert data.best is not None and data.archive and not data.rows and figures_front.front(data) is None
    monkeypatch.undo()
    run = resume_search(RunDirectory.open(path), INLINE)
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


@pytest.mark.ray
@pytest.mark.slow
def test_two_ray_workers_share_one_table(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured for real, by one of them, before any candidate; whoever searches again by the table gets the same."""
    monkeypatch.setenv("EVOPRUNE_CACHE", str(world / "cache-of-two"))
    options = {"target.pareto": "latency", "target.sequence": 16, "evaluations": 12}
    run = start_search(config(world, **options), Resources(workers=2), run_dir=world / "ray-timed")
    table = read_table(run.path / "export" / "latency.json")
    assert table.place == place_of(evoprune.load_model(str(world / "model")), table.work)
    log = EvaluationLog(run.path / "evaluations.wal")
    assert [outcome.values for outcome in log.outcomes() if "costs" in outcome.values] == [table.to_json()]
    log.close()
    events = list(run.read_events())
    known = [event.get("phase", event["event"]) for event in events if event["event"] in ("phase", "worker_ready")]
    assert known.index("building the structured database") > max(
        at for at, name in enumerate(known) if name == "worker_ready"
    )
    assert len({event["worker"] for event in events if event["event"] == "worker_ready"}) == 2
    phases = [event["phase"] for event in events if event["event"] == "phase"]
    assert phases.index("measuring how long parts take") < phases.index("building the structured database")
    result = result_of(run)["pareto"]
    assert result["device"] == table.place["device"] and result["measured"]["dense"] > 0
    tabled = {**options, "target.table": str(run.path / "export" / "latency.json")}
    again = start_search(config(world, **tabled), INLINE, run_dir=world / "again-timed")
    assert history(again) == history(run)


def front_study(run: RunDirectory) -> optuna.Study:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(run.path / "optuna.log")))
    return optuna.load_study(study_name=f"{run.run_id}/front", storage=storage)


def test_time_is_a_third_axis(timed: RunDirectory) -> None:
    """The members are those that no other beats in all three, and their times are sums of the planted table."""
    result, lines = result_of(timed), lines_of(timed)
    (time,) = result["pareto"]["others"]
    scale = time["dense"] // 570  # 150 and twice 94 + 116 of the planted table
    assert time == {"cost": "latency", "unit": "ns", "dense": 570 * scale}
    values = [(row["fitness"], row["cost"], row["latency"]) for row in result["front"]]
    for one, other in itertools.permutations(values, 2):
        assert not all(a <= b for a, b in zip(one, other, strict=True))
    for row in result["front"]:
        parts = [
            (groups > 0) * (40 + 13 * groups + 7 * groups * each)
            + (neurons > 0) * (20 + 2 * neurons + 9 * (neurons == 24))
            for groups, each, neurons in row["shape"]
        ]
        # Between two numbers of neurons that were measured it is a straight line.
        assert row["latency"] / scale == pytest.approx(150 + sum(parts), abs=10)
        assert row["name"] == f"{row['saved']}-{round(100 * (1 - row['latency'] / time['dense']))}"
        assert (timed.path / "export" / "front" / f"{row['name']}.json").exists()
    taken = result["pareto"]["measured"]
    assert taken["dense"] > 0
    assert [time is None for time in taken["front"]] == [row["heldout"] is None for row in result["front"]]
    counted = [line for line in lines if line["counted"] and line["front"]]
    study = front_study(timed)
    assert study.metric_names == ["fitness", "parameters", "latency"]
    assert [trial.values for trial in study.trials] == [[line["kl"], line["cost"], line["latency"]] for line in counted]
    assert front_head(result)[:3] == ("saved", "time", "ms")
    assert {len(cells) for _, *cells in front_rows(result)} == {len(front_head(result))}


def test_the_board_and_the_tables_of_a_front(finished: RunDirectory) -> None:
    study = front_study(finished)
    counted = [line for line in lines_of(finished) if line["counted"] and line["front"]]
    assert study.metric_names == ["fitness", "parameters"]
    assert [trial.values for trial in study.trials] == [[line["kl"], line["cost"]] for line in counted]
    result = result_of(finished)
    dense, *rows = front_rows(result)
    assert dense[1:4] == ("dense", "8", "96")
    for row, saved, heads, neurons, *_ in rows:
        assert saved == f"{row['saved']}%"
        assert int(heads) == sum(groups * each for groups, each, _ in row["shape"])
        assert int(neurons) == sum(kept for _, _, kept in row["shape"])


def test_the_report_of_a_front(timed: RunDirectory) -> None:
    page = Page(write_report(timed).read_text())
    figures = {"front", "times", "kinds", "shape", "candidates"}
    assert {path.stem for path in (timed.path / "plots").iterdir()} == figures
    assert {f"figure-{name}" for name in figures} <= set(page.ids)
    for row in result_of(timed)["front"]:
        assert f"{row['saved']} %" in page.text and f"{row['name'].split('-')[1]} %" in page.text
    assert "Write a smaller model" in page.text


def test_a_front_of_keys_and_values_is_as_long_as_there_are_groups(world: Path, tmp_path: Path) -> None:
    """Four KV groups in all, of which a quarter to half may go; heads and neurons that cost nothing stay."""
    options = {"target.pareto": "kv_bytes", "target.sparsity_range": (0.25, 0.5), "target.heads": "groups"}
    changed = config(world, evaluations=8, **options, **{"front.budgets": 2, "target.drop": "none"})
    run = start_search(changed, INLINE, run_dir=tmp_path / "run")
    result = result_of(run)
    kept = [sum(groups for groups, _, _ in row["shape"]) for row in result["front"]]
    assert kept == sorted(set(kept), reverse=True) and set(kept) <= {3, 2}
    assert [row["saved"] for row in result["front"]] == [100 - 25 * count for count in kept]
    assert {neurons for row in result["front"] for _, _, neurons in row["shape"]} == {48}
    assert result["pareto"]["unit"] == "bytes"
    assert {row["name"] for row in result["baselines"]} == {"uniform", "dp", "shortgpt method"}


def test_a_search_may_start_from_a_member(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    row = result_of(finished)["front"][0]
    file = finished.path / "export" / "front" / f"{row['saved']}.json"
    changed = config(world, evaluations=5, seed_from=str(file), **{"front.budgets": 2})
    run = start_search(changed, INLINE, run_dir=tmp_path / "run")
    lines = lines_of(run)[:4]
    origins = [line["origin"] for line in lines]
    assert lines[2]["genome"] == [count for block in row["shape"] for count in block]  # at its own budget
    assert origins == ["seed:uniform@0.2", "seed:uniform@0.7", "seed:given", "seed:dp@0.2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--pareto parameters --sparsity-range 0.5 0.2", "is no range of sparsities"),
        ("--sparsity-range 0.2 0.5", "add --pareto parameters"),
        ("--pareto parameters --speedup 2", "a front has many speeds"),
        ("--pareto parameters --cost flops", "leave out --cost, or give --pareto flops"),
        ("--pareto parameters --sparsity 0.9", "it says which of the front is exported as the shape"),
        ("--pareto parameters --population 6", "give --population 8"),
        ("--pareto parameters --surrogate", "a surrogate chooses among switches at one budget"),
        ("--pareto flops --decode", "add --cost latency"),
        ("--pareto flops --merge", "fronts merge nothing yet: leave out --merge, or the front"),
    ],
)
def test_what_cannot_be(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "structure", "--dry-run", *words.split()]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_resolved_front_can_be_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "structure", "--dry-run", "--pareto", "latency"]) == 0
    first = capsys.readouterr().out
    assert "pareto: latency" in first and "cost: parameters" in first and "sparsity: 0.3" in first
    (tmp_path / "resolved.yaml").write_text(first)
    assert main(["search", "structure", "--dry-run", "--config", str(tmp_path / "resolved.yaml")]) == 0
    assert capsys.readouterr().out == first
