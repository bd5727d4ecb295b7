"""`search joint` from the command line to the files it leaves, everything that reads them, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import evoprune
from evoprune.configuration import JOINT_KEYS
from evoprune.metrics.allocation_file import read_allocation
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.rundir import RunDirectory
from tests.door.conftest import Run
from tests.search.html_page import Page

CONFIG = """\
data: {source: TEXT, window: 32, heldout_windows: 4, calibration_window: 32, calibration_sequences: 4}
metric:
  racing: {rungs: [1, 2, 4]}
  searcher: {population: 8, islands: 2, power_budget: 4}
  statistics: [X_l2, G_l2]
allocation:
  searcher:
    offspring: 6
    windows: 8
    stages: [{windows: 1, survivors: 2}, {windows: 4, survivors: 1}]
    seeds: [erk]
evaluations: 50
"""
STEPS = ["1-metric", "2-allocation", "3-metric", "4-allocation"]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, story: Path) -> Path:
    """A configuration for a joint search of seconds."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.yaml"
    path.write_text(CONFIG.replace("TEXT", str(story)))
    return path


@pytest.fixture(scope="session")
def joined(tiny: Path, pairs: Path, cache: Path) -> Path:
    """The folder of a finished joint search with its report; it only gets read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOPRUNE_CACHE", str(cache))
        run = evoprune.search_joint(
            str(tiny), config=pairs, executor="inline", run_dir=pairs.parent / "run", quiet=True, seed=1
        )
    return run.path


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.usefixtures("without_report")
def test_a_search_from_the_command_line(run: Run, tiny: Path, pairs: Path, story: Path, joined: Path) -> None:
    """And the command that it prints at its end: it prunes to what was measured."""
    done = run("search", "joint", tiny, "--config", pairs, "--executor", "inline", "--seed", 1)
    assert done.code == 0, done.err
    folder = Path(done.out.strip())
    assert folder.parent == Path("runs") and "-joint-" in folder.name
    said = " ".join(done.err.split())
    for text in ("2 rounds, each of 10 evaluations for metrics, then 15 evaluations for allocations", "4-allocation: ",
                 "dense", "evolved winner", "metric-uniform", "wanda-allocated", "60% sparsity, metric and allocation",
                 "sparsity in %, by block", "steps/3-metric", "least of all rounds"):  # fmt: skip
        assert text in said, text
    first = result_of(joined)
    assert {**result_of(folder), "run": ""} == {**first, "run": ""}
    assert (folder / "history.jsonl").read_bytes() == (joined / "history.jsonl").read_bytes()

    (command,) = [line for line in done.err.splitlines() if line.startswith("prune ")]
    pruned = run(*shlex.split(command.partition("evoprune ")[2].replace("DIR", "out")), "--json")
    assert pruned.code == 0, pruned.err
    assert pruned.json["removed"] == first["best"]["removed"]
    words = ["eval", "out", "--dense", tiny, "--data", story, "--window", 32, "--tokens", 4 * 32, "--json"]
    measured = run(*words).json
    assert measured["loss"] == pytest.approx(first["best"]["heldout"]["loss"], rel=1e-6)
    assert measured["kl"] == pytest.approx(first["best"]["heldout"]["kl"], rel=1e-4)

    (listed,) = run("runs", "--json").json
    assert (listed["run"], listed["kind"], listed["state"]) == (folder.name, "joint", "finished")
    assert {"fitness", "expression", "allocation"} == set(listed["best"])
    assert "matrices from " in " ".join(run("runs").out.split())
    assert run("resume", folder, "--executor", "inline", "--json").json == run("show", folder, "--json").json


def test_show(run: Run, joined: Path, tiny: Path) -> None:
    document = run("show", joined, "--json").json
    assert (document["kind"], document["state"], document["seed"]) == ("joint", "finished", 1)
    assert document["evaluations"] == sum(line["evaluations"] for line in RunDirectory(joined).history()) <= 50
    assert {"expression", "allocation", "fitness", "heldout"} <= set(document["best"])
    rounds = {"round-1", "round-2"} & {row["name"] for row in document["baselines"]}
    others = {row["name"] for row in document["baselines"]} - rounds
    assert others == {"wanda", "metric-uniform", "wanda-allocated"} and len(rounds) == 1
    text = json.dumps([document[name] for name in ("best", "front", "baselines", "dense")])
    assert str(joined) not in text and str(tiny) not in text
    for step in STEPS:
        assert run("show", joined / "steps" / step, "--json").json["state"] == "finished"
    assert "matrices from " in repr(evoprune.Run(joined))
    assert evoprune.Run(joined).table().row_count == 6


def test_show_of_one_that_is_under_way(run: Run, joined: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(joined, folder)
    for name in ("result.json", "steps/4-allocation/result.json"):
        (folder / name).unlink()
    document = run("show", folder, "--json").json
    third, fourth = (evoprune.Run(folder / "steps" / step) for step in STEPS[2:])
    assert document["state"] == "interrupted" and document["evaluations"] == result_of(joined)["evaluations"]
    assert document["best"]["expression"] == third.best["expression"]  # type: ignore[index]
    assert document["best"]["allocation"] == fourth.best["allocation"]  # type: ignore[index]
    shown = run("show", folder)
    assert shown.code == 0 and "steps/4-allocation" in shown.out and f"evoprune resume {folder}" in shown.out
    assert run("show", folder, "--follow").code == 0
    assert run("report", folder).code == 0
    page = Page((folder / "report.html").read_text())
    assert "This run is not finished" in page.text and "No pair has been compared yet" in page.text


def test_the_report(joined: Path) -> None:
    page = Page((joined / "report.html").read_text())
    assert len(page.ids) == len(set(page.ids)) and {"figure-course", "figure-baselines"} <= set(page.ids)
    for row in ("Evolved metric, uniform", "Wanda, last allocation", "Winner", "Dense"):
        assert row in page.text
    assert result_of(joined)["best"]["expression"] in page.text
    linked = [link for link in page.links if not link.startswith("#")]
    assert [link for link in linked if link.startswith("steps/")] == [f"steps/{step}/report.html" for step in STEPS]
    assert all((joined / "steps" / step / "report.html").exists() for step in STEPS)
    assert evoprune.Run(joined).report().read_text().count("<figure") == 2
    third = Page((joined / "steps" / "3-metric" / "report.html").read_text())
    assert "60 % of all prunable weights, shared out by an allocation, removed" in third.text
    assert f"--allocation {joined / 'steps' / '3-metric' / 'export' / 'allocation.json'}" in third.text


def test_export(run: Run, joined: Path, place: Path, tmp_path: Path) -> None:
    best = result_of(joined)["best"]
    for name in ("mine.py", "mine.json"):
        assert run("export", joined, "--to", name).code == 0
        assert load_metric(name).expression.text == best["expression"]  # type: ignore[attr-defined]
    assert run("export", joined, "--to", "allocation-60.json").code == 0
    assert read_allocation("allocation-60.json").by_name() == best["allocation"]
    assert run("export", joined, "--to", "levels.txt").code == run("export", joined, "--to", "m.tex").code == 0
    done = run("export", joined, "--to", "mine.bin")
    assert done.code == 2 and "the ending must be .py or .json or .tex or .txt" in done.err
    folder = tmp_path / "run"
    shutil.copytree(joined, folder)
    (folder / "export" / "metric.json").write_text((joined / "export" / "metric.json").read_text() + " ")
    (folder / "export" / "allocation.json").write_text('{"format": "evoprune-allocation/1"}')
    done = run("export", folder, "--to", "allocation.json")
    assert done.code == 2 and done.err.count("\n") == 1


@pytest.mark.usefixtures("without_report")
def test_either_half_may_go_on_alone(tiny: Path, pairs: Path, joined: Path, story: Path) -> None:
    options: dict[str, Any] = {"executor": "inline", "quiet": True, "evaluations": 3, "data": str(story)}
    small = {"data.window": 32, "data.heldout_windows": 4, "data.calibration_window": 32}
    metric = evoprune.search_metric(
        str(tiny),
        allocation=joined,
        seed_from=joined,
        settings={**small, "racing.rungs": [1, 2], "statistics": ["X_l2", "G_l2"]},
        **options,
    )
    best = result_of(joined)["best"]
    assert best["expression"] in {line["expression"] for line in metric.history()}
    assert metric.result is not None and metric.result["allocation"]["sites"] == best["allocation"]


def test_every_option_reaches_the_configuration(run: Run) -> None:
    """An option per key, each with a value that is not the default."""
    given = {
        "revision": "main", "dtype": "bfloat16", "device": "cpu", "data": "a.txt", "calibration": "b.txt",
        "calibration_sequences": 7, "calibration_window": 33, "sparsity": 0.55, "granularity": "kind", "rounds": 3,
        "metric_share": 0.5, "evaluations": 41, "minutes": 2.5, "seed": 5, "window": 9, "threads": 2,
        "seed_from": "m.json", "compressor": "refit",
    }  # fmt: skip
    assert given.keys() | {"model", "trust_remote_code"} == JOINT_KEYS.keys()
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    plain = run("search", "joint", "some/model", *words, "--trust-remote-code", "--dry-run", "--json").json
    for name, value in (given | {"model": "some/model", "trust_remote_code": True}).items():
        found: Any = plain
        for part in JOINT_KEYS[name].split("."):
            found = found[part]
        assert found == value, name


def test_the_defaults_in_the_help_are_true(run: Run) -> None:
    text = " ".join(run("search", "joint", "--help").out.replace("│", " ").split())
    plain = JointSearchConfig()
    for name in ("sparsity", "granularity", "rounds", "evaluations", "metric_share", "seed", "window", "threads",
                 "dtype", "device", "calibration_sequences", "calibration_window"):  # fmt: skip
        value: Any = plain
        for part in JOINT_KEYS[name].split("."):
            value = getattr(value, part)
        part = text.partition(f"--{name.replace('_', '-')} ")[2].partition(" --")[0]
        assert f"[default: {value}" in part, name


def test_options(refused: Callable[..., str], tiny: Path, place: Path, joined: Path) -> None:
    search = ("search", "joint", tiny)
    assert "is not between 0 and 1" in refused(*search, "--sparsity", 1.5)
    assert "rounds: " in refused(*search, "--rounds", 0)
    assert "metric_share: " in refused(*search, "--metric-share", 1)
    assert "leave a step without any" in refused(*search, "--evaluations", 3)
    assert "give --evaluations, --minutes or both" in refused(*search, "--set", "evaluations=null")
    assert "no model 'no/such-model'" in refused("search", "joint", "no/such-model")
    assert "no file 'nowhere.json'" in refused(*search, "--seed-from", "nowhere.json")
    assert "metric.searcher.isles: no such option" in refused(*search, "--set", "metric.searcher.isles=2")
    assert "no statistic 'Z_l2'" in refused(*search, "--set", "metric.statistics=[Z_l2]")
    assert "no allocator 'oww'; did you mean 'owl'" in refused(*search, "--set", "allocation.searcher.seeds=[oww]")
    assert "of 4 offspring cannot go on" in refused(*search, "--set", "allocation.searcher.offspring=4")
    (place / "c.yaml").write_text(yaml.safe_dump({"kind": "metric"}))
    assert "options of another search, 'metric': this one is 'joint'" in refused(*search, "--config", "c.yaml")
    steps = f"{joined / 'steps' / '1-metric'}, 2-allocation, 3-metric, 4-allocation"
    assert f"has a study for each of its steps, so name one as RUN: {steps}\n" in refused("dashboard", joined)
    assert "has a study for each of its steps" in refused("dashboard", joined, "--rebuild")


@pytest.mark.usefixtures("without_report")
def test_a_fork_may_have_another_budget(tiny: Path, joined: Path) -> None:
    forked = evoprune.resume(
        joined, fork=True, settings={"rounds": 1, "evaluations": 20}, executor="inline", quiet=True
    )
    assert forked.path != joined and [path.name for path in sorted((forked.path / "steps").iterdir())] == STEPS[:2]
    with pytest.raises(InvalidInput, match="leave a step without any"):
        evoprune.resume(joined, fork=True, settings={"evaluations": 2}, executor="inline", quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", [STEPS[0], STEPS[3]])
def test_stopped_and_continued(step: str, tiny: Path, pairs: Path, place: Path, joined: Path) -> None:
    """SIGTERM to a real process, in the first step and in the last."""
    command = [sys.executable, "-m", "evoprune"]
    words = ["search", "joint", str(tiny), "--config", str(pairs), "--seed", "1", "--run-dir", "stopped"]
    process = subprocess.Popen(
        [*command, *words, "--executor", "inline"], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    while process.poll() is None and not (place / "stopped" / "steps" / step / "run.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].endswith("continue with `evoprune resume stopped`")
    assert RunDirectory(place / "stopped").state == "interrupted"
    done = subprocess.run(
        [*command, "resume", "stopped", "--executor", "inline"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
    assert (place / "stopped" / "history.jsonl").read_bytes() == (joined / "history.jsonl").read_bytes()
