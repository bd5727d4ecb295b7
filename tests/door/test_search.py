"""`search metric` from the command line to the files it leaves, and everything that reads them."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import evoprune
from evoprune.configuration import KEYS, metric_config
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.registry import Registry
from evoprune.search.breeders import BREEDERS
from evoprune.search.config import MetricSearchConfig
from evoprune.search.racing import RACING_RULES
from evoprune.search.searchers import SEARCHERS
from tests.door.conftest import Run

SHOWN = [
    "run", "kind", "state", "seed", "evaluations", "distinct", "seconds", "best", "baselines", "dense", "front",
]  # fmt: skip
HELDOUT = {"loss", "perplexity", "kl", "stderr", "tokens"}


def test_a_search_from_the_command_line(run: Run, tiny: Path, small: Path, place: Path) -> None:
    done = run("search", "metric", tiny, "--config", small, "--executor", "inline", "--evaluations", 20)
    assert done.code == 0, done.err
    folder = Path(done.out.strip())
    assert folder.parent == Path("runs") and folder.name.endswith(tuple("0123456789abcdef"))
    for name in ("config.yaml", "run.json", "history.jsonl", "evaluations.wal", "optuna.log", "result.json"):
        assert (folder / name).is_file(), name
    for text in (
        "dense",
        "evolved winner",
        "wanda",
        "needed no forward pass",
        "had an evolved parent",
        "export/metric.py",
        "report.html",
    ):
        assert text in done.err
    assert json.loads((folder / "run.json").read_text())["argv"][0] == "evoprune"

    listed = run("runs", "--json").json
    assert [set(row) for row in listed] == [{"run", "kind", "state", "best", "seconds"}]
    assert (listed[0]["run"], listed[0]["kind"], listed[0]["state"]) == (folder.name, "metric", "finished")
    assert folder.name[:15] in run("runs").out
    shown = run("show", "--json")
    assert shown.json["run"] == folder.name
    assert run("show", folder.name, "--json").out == run("show", folder, "--json").out == shown.out
    again = run("resume", folder, "--executor", "inline", "--json")
    assert again.json == shown.json


@pytest.mark.usefixtures("without_report")
def test_one_seed_gives_one_result(run: Run, tiny: Path, small: Path, finished: Path, place: Path) -> None:
    done = run("search", "metric", tiny, "--config", small, "--executor", "inline", "--seed", 1, "--json")
    assert done.code == 0
    document = done.json
    first = run("show", finished, "--json").json
    for name in ("best", "front", "baselines", "dense", "evaluations", "distinct", "seed"):
        assert document[name] == first[name]
    (again,) = (place / "runs").iterdir()
    assert (again / "history.jsonl").read_bytes() == (finished / "history.jsonl").read_bytes()


def test_show_as_json(run: Run, finished: Path) -> None:
    document = run("show", finished, "--json").json
    assert list(document) == SHOWN
    assert (document["kind"], document["state"], document["seed"]) == ("metric", "finished", 1)
    assert document["evaluations"] == 24
    assert set(document["best"]["heldout"]) == set(document["dense"]["heldout"]) == HELDOUT
    assert document["best"]["expression"] and document["best"]["fitness"] > 0
    names = [row["name"] for row in document["baselines"]]
    assert {"random", "magnitude", "wanda", "ria", "gblm", "gblm-gradient", "pruner-zero", "power"} == set(names)
    for row in document["baselines"]:
        assert (set(row), set(row["heldout"])) == ({"name", "expression", "fitness", "heldout"}, HELDOUT)
    assert set(document["dense"]) == {"heldout"}
    assert {"expression", "fitness", "heldout"} <= set(document["best"])
    text = json.dumps([document[name] for name in ("best", "front", "baselines", "dense")])
    assert str(finished) not in text


@pytest.mark.parametrize("width", [80, 120])
def test_show_for_people(width: int, run: Run, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = run("show", finished)
    assert (done.code, done.err) == (0, "")
    table, _, rest = done.out.partition("\nwinner ")
    assert max(len(line.rstrip()) for line in table.splitlines()) <= width
    losses = [float(loss) for loss in re.findall(r"\d\.\d\d +(\d+\.\d{4}) ± ", table)]
    assert losses == sorted(losses) and len(losses) == 10
    assert "124 predicted tokens of corpus (text C), windows of 32" in " ".join(table.split())
    assert f"evoprune show {finished}" in rest


PLUGIN = """
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.objectives.perplexity import NegativeLogLikelihood
from evoprune.search.breeders import BREEDERS
from evoprune.search.racing import RACING_RULES
from evoprune.search.racing.halving import SuccessiveHalving
from evoprune.search.searchers import SEARCHERS
from evoprune.search.searchers.random_search import RandomSearch

OBJECTIVES.add("mine", NegativeLogLikelihood())
RACING_RULES.add("mine", SuccessiveHalving)
SEARCHERS.add("mine", RandomSearch)
BREEDERS.add("mine", BREEDERS["random"])
"""


@pytest.mark.usefixtures("without_report")
def test_another_package_adds_what_options_name(
    run: Run, tiny: Path, small: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registries: tuple[Registry[Any], ...] = (OBJECTIVES, RACING_RULES, SEARCHERS, BREEDERS)
    packages = tmp_path / "packages"
    (info := packages / "mine-1.0.dist-info").mkdir(parents=True)
    (packages / "mine.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{registry.group}]\nmine = mine\n" for registry in registries))
    monkeypatch.syspath_prepend(packages)
    for registry in registries:
        assert len(registry) > 0
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_loaded", False)
    done = run(
        "search", "metric", tiny, "--config", small, "--executor", "inline", "--run-dir", "run",
        "--objective", "mine", "--searcher", "mine", "--set", "racing.rule=mine", "--evaluations", 10,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads((place / "run" / "result.json").read_text())["objective"] == "mine"
    resolved = run("search", "allocation", tiny, "--searcher", "mine", "--dry-run").out
    assert yaml.safe_load(resolved)["searcher"]["name"] == "mine"


def test_show_gives_the_power_product_to_copy(run: Run, finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    (power,) = (row["expression"] for row in result["baselines"] if row["name"] == "power")
    shown = "".join(run("show", finished).out.split())
    assert (f"power{power}" in shown) == (power != result["best"]["expression"])


def test_export(run: Run, finished: Path, place: Path) -> None:
    winner = run("show", finished, "--json").json["best"]["expression"]
    for suffix in ("py", "json", "tex"):
        done = run("export", finished, "--to", f"mine.{suffix}")
        assert (done.code, done.out) == (0, f"mine.{suffix}\n")
    assert str(load_metric("mine.py").expression) == str(load_metric("mine.json").expression) == winner  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("mine.py", run_name="__main__")
    assert not ended.value.code
    assert run("export", finished, "--to", "mine.pkl").code == 2
    assert run("export", finished, "--to", "nowhere/mine.py").code == 2
    assert not (place / "nowhere").exists()


def test_report(run: Run, finished: Path) -> None:
    done = run("report", finished, "--json")
    assert done.code == 0
    assert Path(done.json["report"]).read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("without_report")
def test_a_fork_reuses_evaluations(run: Run, finished: Path, place: Path) -> None:
    assert run("resume", finished, "--set", "evaluations=30").code == 2
    words = ("resume", finished, "--fork", "--executor", "inline", "--set", "evaluations=30", "--run-dir", "fork")
    done = run(*words, "--json")
    assert done.code == 0
    assert done.json["evaluations"] == 30
    record = json.loads((place / "fork" / "run.json").read_text())
    assert record["forked_from"] == json.loads((finished / "run.json").read_text())["run"]
    old = (finished / "evaluations.wal").read_bytes()
    assert (place / "fork" / "evaluations.wal").read_bytes().startswith(old)
    assert (place / "fork" / "history.jsonl").read_bytes().startswith((finished / "history.jsonl").read_bytes()[:2000])


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize(("code", "reused"), [("search", True), ("evaluation", False)])
def test_a_fork_reuses_what_the_code_that_measures_has_not_changed(
    code: str, reused: bool, run: Run, finished: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"search": "code_hash", "evaluation": "evaluation_code_hash"}
    monkeypatch.setattr(f"evoprune.search.worker_session.{names[code]}", lambda: "another")
    done = run("resume", finished, "--fork", "--executor", "inline", "--run-dir", "fork", "--json")
    assert done.code == 0, done.err
    assert (place / "fork" / "history.jsonl").read_bytes() == (finished / "history.jsonl").read_bytes()
    old, new = (len((path / "evaluations.wal").read_bytes().splitlines()) for path in (finished, place / "fork"))
    assert new == (old if reused else 2 * old)


@pytest.mark.usefixtures("without_report")
def test_an_interrupted_run(
    run: Run, tiny: Path, small: Path, place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two births, looked at, and continued to the same history."""

    class Stop:
        polls = 0

        def __call__(self) -> bool:
            Stop.polls += 1
            return Stop.polls > 12

    from contextlib import nullcontext

    with monkeypatch.context() as patch:
        patch.setattr("evoprune.search.session.stop_on_signals", lambda: nullcontext(Stop()))
        done = run(
            "search", "metric", tiny, "--config", small, "--executor", "inline", "--seed", 1, "--run-dir", "stopped"
        )
    assert (done.code, done.out) == (130, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("interrupted: ") and last.endswith("continue with `evoprune resume stopped`")
    shown = run("show", "stopped", "--json").json
    assert (shown["state"], shown["dense"], shown["baselines"]) == ("interrupted", {"heldout": None}, [])
    assert 0 < shown["evaluations"] < 24
    view = run("show", "stopped").out
    assert "evoprune resume stopped" in view
    assert "answered without a forward pass" in view and re.search(r"by rung +\d+ → \d+ → \d+", view)
    assert run("export", "stopped", "--to", "m.py").code == 2
    assert run("resume", "stopped", "--executor", "inline").code == 0
    assert (place / "stopped" / "history.jsonl").read_bytes() == (finished / "history.jsonl").read_bytes()


WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from evoprune.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_search_in_this_process_needs_no_ray(tiny: Path, small: Path, finished: Path, place: Path) -> None:
    words = ["search", "metric", str(tiny), "--config", str(small), "--seed", "1", "--run-dir", "alone"]
    command = [sys.executable, "-c", WITHOUT_RAY, *words, "--executor", "inline"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (place / "alone" / "history.jsonl").read_bytes() == (finished / "history.jsonl").read_bytes()


def test_the_resolved_configuration_can_be_used_again(run: Run, place: Path) -> None:
    first = run("search", "metric", "--dry-run", "--pattern", "2:4", "--set", "searcher.islands=2")
    assert first.code == 0
    Path("resolved.yaml").write_text(first.out)
    assert run("search", "metric", "--dry-run", "--config", "resolved.yaml").out == first.out
    document = run("search", "metric", "--dry-run", "--config", "resolved.yaml", "--json").json
    assert document == yaml.safe_load(first.out)
    half = {"sparsity": None, "pattern": "2:4", "group": "row", "allocation": None, "compressor": "mask"}
    assert document["target"] == half
    replaced = run("search", "metric", "--dry-run", "--config", "resolved.yaml", "--sparsity", 0.7, "--json").json
    assert replaced["target"] == half | {"sparsity": 0.7, "pattern": None}
    both = run("search", "metric", "--dry-run", "--sparsity", 0.7, "--set", "target.pattern=2:4")
    assert both.code == 2 and "not both" in both.err
    Path("default.yaml").write_text(run("search", "metric", "--dry-run").out)
    assert yaml.safe_load(Path("default.yaml").read_text())["target"]["sparsity"] == 0.6
    pattern = ("--dry-run", "--config", "default.yaml", "--set", "target.pattern=2:4", "--json")
    assert run("search", "metric", *pattern).json["target"] == half
    assert {path.name for path in place.iterdir()} == {"resolved.yaml", "default.yaml"}


@pytest.mark.parametrize("pattern", ["2:4", "'2:4'", "1:16", "12:64"])
def test_a_pattern_in_yaml_needs_no_quotes(pattern: str, run: Run, place: Path) -> None:
    """YAML knows numbers to the base of 60."""
    (place / "c.yaml").write_text(f"target: {{pattern: {pattern}}}")
    plain = pattern.strip("'")
    assert run("search", "metric", "--dry-run", "--json", "--config", "c.yaml").json["target"]["pattern"] == plain
    words = ("search", "metric", "--dry-run", "--json", "--set", f"target.pattern={pattern}")
    assert run(*words).json["target"]["pattern"] == plain


def test_every_option_reaches_the_configuration(run: Run) -> None:
    """An option per key, each with a value that is not the default."""
    given = {
        "revision": "main", "dtype": "bfloat16", "device": "cpu", "data": "a.txt", "calibration": "b.txt",
        "calibration_sequences": 7, "calibration_window": 33, "sparsity": 0.55, "group": "layer", "population": 24,
        "searcher": "random", "objective": "perplexity", "evaluations": 11, "minutes": 2.5, "seed": 5, "window": 9,
        "threads": 2, "seed_from": "m.json", "compressor": "refit",
    }  # fmt: skip
    assert given.keys() | {"model", "pattern", "allocation", "trust_remote_code"} == KEYS.keys()
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    plain = run("search", "metric", "some/model", *words, "--trust-remote-code", "--dry-run", "--json").json
    for name, value in (given | {"model": "some/model", "trust_remote_code": True}).items():
        found: Any = plain
        for part in KEYS[name].split("."):
            found = found[part]
        assert found == value, name


def test_the_defaults_in_the_help_are_true(run: Run) -> None:
    text = " ".join(run("search", "metric", "--help").out.replace("│", " ").split())
    plain = MetricSearchConfig()
    assert "[default: 0.6]" in text and plain.target.rule.sparsity == 0.6
    for name in ("evaluations", "population", "searcher", "objective", "seed", "window", "threads", "group",
                 "calibration_sequences", "calibration_window", "dtype", "device"):  # fmt: skip
        value: Any = plain
        for part in KEYS[name].split("."):
            value = getattr(value, part)
        part = text.partition(f"--{name.replace('_', '-')} ")[2].partition(" --")[0]
        assert f"[default: {value}" in part, name


def test_a_run_in_python(finished: Path, place: Path) -> None:
    run = evoprune.Run(finished)
    assert (run.state, run.kind, run.path) == ("finished", "metric", finished)
    assert run.best is not None and run.result is not None
    assert run.best["expression"] in repr(run)
    assert run.baselines and run.front and run.dense["heldout"]["perplexity"] > 1
    assert len(list(run.history())) == run.result["births"]
    assert run.table().row_count == 10
    assert run.export("winner.json") == Path("winner.json")
    assert evoprune.resume(run).path == finished
    assert [found.id for found in evoprune.list_runs(finished.parent)] == [run.id]
    assert evoprune.list_runs() == []
    with pytest.raises(InvalidInput, match="keeps its options"):
        run.resume(settings={"evaluations": 3})
    with pytest.raises(InvalidInput, match="no run"):
        evoprune.Run()


@pytest.mark.usefixtures("without_report")
def test_a_search_in_python(tiny: Path, small: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = evoprune.search_metric(
        str(tiny), config=small, executor="inline", quiet=True, evaluations=16, settings={"searcher.seeds": ["wanda"]}
    )
    assert run.state == "finished"
    assert run.config["searcher"]["seeds"] == ["wanda"]
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InvalidInput, match="evaluations"):
        evoprune.search_metric(str(tiny), evaluations=0)
    with pytest.raises(InvalidInput, match="no such option"):
        evoprune.search_metric(str(tiny), settings={"searcher.island": 2})


def test_options_win_over_files(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\nevaluations: 40\nsearcher: {islands: 3}\n")
    config = metric_config({"seed": 4}, files=[file], assignments=["searcher.islands=2"])
    assert (config.seed, config.evaluations, config.searcher.islands) == (4, 40, 2)
    assert Interrupted.exit_code == 130
