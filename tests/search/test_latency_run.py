"""Searches at a budget of time: measured once, met by sums of parts, kept by a run that is stopped, measured again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from evoprune.cli import main
from evoprune.fitness import structure_worker
from evoprune.fitness.latency_passes import Work
from evoprune.fitness.latency_table import LatencyTable, place_of, read_table
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.unit_costs import CostTable, UnitCosts, kept_by
from evoprune.fitness.units import BlockUnits
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.metrics.shape_file import read_shape
from evoprune.search.config import resolve_as
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.worker_session import Resources
from tests.search.whole_runs import history, result_of, stopping_in, tiny_options

INLINE = Resources(executor="inline")
SPEEDUP = 1.3
measured, refusals = itertools.count(), itertools.count()


def planted_table(
    language_model: LanguageModel, units: Sequence[BlockUnits], neurons: Sequence[Sequence[int]], work: Work
) -> LatencyTable:
    """Times that are another machine's every time, with widths that are slower than the next: 24 neurons."""
    slower = 1000 + next(measured)
    attention = CostTable(tuple(((k, q), slower * (40 + 13 * k + 7 * k * q)) for k in (1, 2) for q in (1, 2)))
    mlp = CostTable(tuple(((n,), slower * (20 + 2 * n + 9 * (n == 24))) for n in (*neurons[0], 48)))
    widths = tuple(block.widths for block in units)
    costs = UnitCosts("latency", slower * 150, widths, (attention,) * len(units), (mlp,) * len(units))
    return LatencyTable(place_of(language_model, work), costs)


@pytest.fixture(scope="module", autouse=True)
def planted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structure_worker, "latency_table", planted_table)
        yield


def config(world: Path, **changes: Any) -> StructureSearchConfig:
    options = {**tiny_options(world), "searcher.offspring": 6, "searcher.windows": 8, "evaluations": 24}
    del options["target.sparsity"]
    options["searcher.stages"] = [{"windows": 1, "survivors": 3}, {"windows": 4, "survivors": 1}]
    return resolve_as(StructureSearchConfig, overrides={**options, "target.speedup": SPEEDUP, **changes})


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    return start_search(config(world), INLINE, run_dir=world / "run")


def test_the_winner_meets_the_time_and_is_measured(finished: RunDirectory) -> None:
    result, table = result_of(finished), read_table(finished.path / "export" / "latency.json")
    costs, budget = table.costs, table.budget()
    whole = costs.rest + costs.dense
    assert 0.995 * whole / SPEEDUP <= budget.rest + result["best"]["cost"] <= whole / SPEEDUP
    kept = [(groups, heads, neurons) for groups, heads, neurons in result["best"]["shape"]]
    assert [kept_by(block) for block in read_shape(finished.path / "export" / "shape.json").blocks] == kept
    latency = result["latency"]
    assert latency["predicted"]["winner"] == costs.rest + costs.of(kept) and latency["predicted"]["dense"] == whole
    taken = latency["measured"]
    assert min(taken["dense"], taken["winner"]) > 0 and taken["speedup"] == taken["dense"] / taken["winner"]
    assert latency["gap"] == pytest.approx(taken["winner"] / latency["predicted"]["winner"] - 1)
    assert (latency["batch"], latency["sequence"], latency["decode"]) == (1, 64, False)  # all that the model reads
    assert result["speedup"] == SPEEDUP and result["cost"] == "latency"
    names = {row["name"] for row in result["baselines"]}
    assert {"uniform", "dp", "flap", "flap alone", "wanda-sp"} <= names
    shared = json.dumps({name: result[name] for name in ("best", "baselines", "dense", "front")})
    assert "measured" not in shared and "device" not in shared


def test_a_run_that_is_stopped_keeps_its_table(
    finished: RunDirectory, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world / "stopped"
    for phase, after in (("asking the criteria of units", 2), ("searching", 5), ("measuring on held-out text", 2)):
        monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, phase, after))
        with pytest.raises(Interrupted):
            if path.exists():
                resume_search(RunDirectory.open(path), INLINE)
            else:
                start_search(config(world), INLINE, run_dir=path)
        if phase == "asking the criteria of units":
            times = next(measured)
    monkeypatch.undo()
    run = resume_search(RunDirectory.open(path), INLINE)
    assert next(measured) == times + 1  # nobody has measured since
    again = start_search(config(world, **{"target.table": str(path / "export" / "latency.json")}), INLINE)
    assert history(again) == history(run)
    for name in ("best", "baselines", "dense"):
        assert result_of(again)[name] == result_of(run)[name]


def test_another_table_is_another_run(finished: RunDirectory, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, path = world / "latency.json", world / "changed"
    file.write_bytes((finished.path / "export" / "latency.json").read_bytes())
    monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, "searching", 3))
    with pytest.raises(Interrupted):
        start_search(config(world, **{"target.table": str(file)}), INLINE, run_dir=path)
    monkeypatch.undo()
    document = json.loads(file.read_text())
    document["costs"]["rest"] += 1
    file.write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match="the table of latencies changed since this run began"):
        resume_search(RunDirectory.open(path), INLINE)


def refusal(world: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a search says that is refused with exit code 2, in its last line."""
    common = [
        "--data",
        str(world / "text.txt"),
        "--executor",
        "inline",
        "--run-dir",
        str(world / f"refused-{next(refusals)}"),
    ]
    small = {"data.window": 32, "data.calibration_window": 32, "data.calibration_sequences": 8}
    settings = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    assert main(["search", "structure", str(world / "model"), *common, *settings, *words]) == 2
    done = capsys.readouterr()
    assert done.out == ""
    return done.err.splitlines()[-1]


def test_a_speedup_out_of_reach_names_the_nearest(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but a rest of 150 of 150 + 2 * (94 + 116) stays at 3.8; without drops 2 * (60 + 24) stays as well."""
    said = refusal(world, capsys, "--speedup", "4")
    assert said.startswith("error: a speedup of 4 cannot be: all that may go makes one of 3.8, so give that or less")
    said = refusal(world, capsys, "--speedup", "2", "--drop", "none")
    assert "a speedup of 2 cannot be: all that may go makes one of 1.792, so give that or less" in said


def test_a_table_of_elsewhere_is_refused(
    finished: RunDirectory, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((finished.path / "export" / "latency.json").read_text())
    document["place"]["device"] = "cuda Another"
    (world / "elsewhere.json").write_text(json.dumps(document))
    (world / "none.json").write_text("{}")
    elsewhere, none = (["--set", f"target.table={world / name}.json"] for name in ("elsewhere", "none"))
    said = refusal(world, capsys, "--speedup", "1.2", *elsewhere)
    assert "measured elsewhere: its device is 'cuda Another', and here it is 'cpu" in said
    assert "is no table of latencies" in refusal(world, capsys, "--speedup", "1.2", *none)
    assert "reads at most 64" in refusal(world, capsys, "--speedup", "1.2", "--set", "target.sequence=65")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--speedup 1.5 --sparsity 0.5", "give --sparsity or --speedup, one of the two"),
        ("--speedup 1.5 --cost flops", "a speedup is one of latency: leave out --cost flops"),
        ("--speedup 1", "greater than 1"),
        ("--decode", "add --cost latency"),
        ("--set target.table=x.json", "add --cost latency"),
        ("--speedup 1.5 --set target.table=x.json", "no file 'x.json'"),
    ],
)
def test_what_cannot_be(words: str, said: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(world, capsys, *words.split())


def test_a_resolved_speedup_can_be_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def resolved(*words: str) -> str:
        assert main(["search", "structure", "--dry-run", *words]) == 0
        return capsys.readouterr().out

    first = resolved("--speedup", "1.5")
    file = tmp_path / "resolved.yaml"
    file.write_text(first)
    assert resolved("--config", str(file)) == first and "sparsity: null" in first and "cost: latency" in first
    other = resolved("--config", str(file), "--sparsity", "0.4")
    assert "sparsity: 0.4" in other and "speedup: null" in other and "cost: latency" in other
