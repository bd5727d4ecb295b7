"""Whole joint searches on a tiny random model: steps that are ordinary runs, and what is made of them."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evoprune.fitness.joint_worker import build
from evoprune.metrics.allocation_file import read_allocation
from evoprune.metrics.criterion import Metric
from evoprune.metrics.errors import Interrupted, InvalidInput, WorkersFailed
from evoprune.metrics.exported import load_metric
from evoprune.search.config import resolve_as
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.worker_session import Resources
from tests.models import save_tiny
from tests.search.whole_runs import history, result_of, timeless, tiny_options

INLINE = Resources(executor="inline")
STEPS = ("1-metric", "2-allocation", "3-metric", "4-allocation")


def config(world: Path, **changes: Any) -> JointSearchConfig:
    return resolve_as(
        JointSearchConfig,
        overrides={
            **tiny_options(world),
            "metric.racing.rungs": [1, 2, 4],
            "metric.searcher.population": 8,
            "metric.searcher.islands": 2,
            "metric.searcher.power_budget": 4,
            "metric.statistics": ["X_l2", "G_l2"],
            "allocation.searcher": {
                "offspring": 6,
                "windows": 8,
                "stages": [{"windows": 1, "survivors": 2}, {"windows": 4, "survivors": 1}],
                "seeds": ["erk"],
            },
            "evaluations": 70,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    return start_search(config(world), INLINE, run_dir=world / "joint")


def step(run: RunDirectory, name: str) -> RunDirectory:
    return RunDirectory(run.path / "steps" / name)


def test_each_step_is_at_what_the_other_found(finished: RunDirectory) -> None:
    steps = [step(finished, name) for name in STEPS]
    assert [one.state for one in steps] == ["finished"] * 4
    assert [one.identity["part_of"] for one in steps] == [finished.run_id] * 4
    best = [result_of(one)["best"] for one in steps]
    first, second, third, fourth = (one.config for one in steps)
    assert (first["target"]["allocation"], first["seed_from"]) == (None, None)
    assert second["target"]["metric"] == best[0]["expression"] and second["seed_from"] is None
    assert result_of(steps[2])["allocation"]["sites"] == best[1]["allocation"]
    assert load_metric(third["seed_from"]) == load_metric(str(steps[0].path / "export" / "metric.json"))
    assert fourth["target"]["metric"] == best[2]["expression"]
    assert read_allocation(fourth["seed_from"]).by_name() == best[1]["allocation"]
    # What a step starts from is born in it.
    assert best[0]["expression"] in {line["expression"] for line in steps[2].history()}
    assert "seed:given" in {line["origin"] for line in steps[3].history()}


def test_the_budget_is_shared_out(finished: RunDirectory, world: Path) -> None:
    steps = [step(finished, name) for name in STEPS]
    assert [one.config["evaluations"] for one in steps] == [14, 21, 14, 21]
    spent = [result_of(one)["evaluations"] for one in steps]
    assert all(count <= one.config["evaluations"] for count, one in zip(spent, steps, strict=True))
    assert result_of(finished)["evaluations"] == sum(spent)
    for evaluations in range(4, 100, 7):
        shares = config(world, evaluations=evaluations, metric_share=0.5).shares
        assert sum(shares) == evaluations and max(shares) - min(shares) <= 1
    timed = config(world, minutes=10, evaluations=None)
    given = [
        timed.metric_values(0, seed_from=None, allocation=None),
        timed.allocation_values(1, metric="wanda", seed_from=None),
    ]
    assert [(one["minutes"], one["evaluations"]) for one in given] == [(2, None), (3, None)]


def test_the_table_is_measured_anew(finished: RunDirectory, world: Path) -> None:
    """By another worker, with masks of its own; the best round is that of text B, which is not the table's."""
    result = result_of(finished)
    steps = [result_of(step(finished, name))["best"] for name in STEPS]
    rows = {row["name"]: row for row in result["baselines"]}
    rounds = {"round-1", "round-2"} & rows.keys()
    assert rows.keys() - rounds == {"wanda", "metric-uniform", "wanda-allocated"} and len(rounds) == 1
    pairs = [(steps[0]["expression"], steps[1]["allocation"]), (steps[2]["expression"], steps[3]["allocation"])]
    best = result["best"]
    assert (best["expression"], best["allocation"]) == pairs[best["round"] - 1]
    worker = build(config(world).context().to_json())
    prepared = worker.handle("prepare", {})["name"]

    def measured(text: str, criterion: dict[str, Any], sparsities: dict[str, float]) -> dict[str, Any]:
        payload = {"prepared": prepared, "text": text, "criterion": criterion, "sparsities": sparsities}
        return worker.handle("pair", payload)

    def spelt(expression: str) -> dict[str, Any]:
        return {"expression": Metric.from_text(expression).expression.to_json()}

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    on_b = [mean(measured("search", spelt(metric), allocation)["kl"]) for metric, allocation in pairs]
    assert best["fitness"] == min(on_b) == on_b[best["round"] - 1]
    assert rows["wanda"]["fitness"] == mean(measured("search", {"name": "wanda"}, {})["kl"])
    last = steps[3]["allocation"]
    for row, criterion, sparsities in (
        (rows["wanda"], {"name": "wanda"}, {}),
        (rows["metric-uniform"], spelt(steps[0]["expression"]), {}),
        (rows["wanda-allocated"], {"name": "wanda"}, last),
        (best, spelt(best["expression"]), best["allocation"]),
    ):
        found = measured("heldout", criterion, sparsities)
        assert row["heldout"]["loss"] == mean(found["nll"]) and row["heldout"]["kl"] == mean(found["kl"])
    # What the steps say of the same models, measured their own way.
    assert rows["metric-uniform"]["heldout"] == pytest.approx(steps[0]["heldout"])
    assert best["heldout"] == pytest.approx(steps[2 * best["round"] - 1]["heldout"])


def test_the_exports_are_the_pair(finished: RunDirectory) -> None:
    best, folder = result_of(finished)["best"], finished.path / "export"
    assert {path.name for path in folder.iterdir()} == {
        "metric.json", "metric.py", "metric.tex", "allocation.json", "allocation.txt",
    }  # fmt: skip
    for name in ("metric.json", "metric.py"):
        metric = load_metric(str(folder / name))
        assert isinstance(metric, Metric) and metric.expression.text == best["expression"]
    assert read_allocation(folder / "allocation.json").by_name() == best["allocation"]


def everything(run: RunDirectory) -> list[Any]:
    """All that must be the same in another run of the same seed."""
    steps = [step(run, name) for name in STEPS]
    return [history(run), timeless(run.result), *((history(one), timeless(one.result)) for one in steps)]


def test_the_history_says_what_the_steps_found(finished: RunDirectory) -> None:
    lines = list(finished.history())
    assert [line["step"] for line in lines] == list(STEPS)
    assert [line["fitness"] for line in lines] == [result_of(step(finished, name))["best"]["fitness"] for name in STEPS]


class Stopped(Exception):
    """In place of a kill."""


@pytest.mark.parametrize("kind", ["agreement", "levels", "pair"])
def test_it_goes_on_from_anywhere(
    kind: str, finished: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in a step that searches metrics, in one that searches allocations, and in the comparison."""
    counted: list[str] = []
    real = InlineExecutor.poll
    # In the second round; the last one while text B is read.
    fatal = {"agreement": 2, "levels": 40, "pair": 3}[kind]

    def poll(self: InlineExecutor, timeout: float) -> list[Any]:
        outcomes = real(self, timeout)
        counted.extend(jobs.pop(outcome.key) for outcome in outcomes)
        if counted.count(kind) >= fatal:
            raise Stopped
        return outcomes

    jobs: dict[str, str] = {}
    submit = InlineExecutor.submit

    def noted(self: InlineExecutor, asked: Any) -> None:
        asked = list(asked)
        jobs.update({job.key: job.kind for job in asked})
        submit(self, asked)

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(InlineExecutor, "poll", poll)
        patch.setattr(InlineExecutor, "submit", noted)
        with pytest.raises(Stopped):
            start_search(config(world), INLINE, run_dir=path)
    run = resume_search(RunDirectory(path), INLINE)
    assert everything(run) == everything(finished)


def test_a_step_that_was_being_made_is_made_again(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished.path, path)
    for name in ("result.json", "steps/4-allocation/run.json"):
        (path / name).unlink()
    run = resume_search(RunDirectory(path), INLINE)
    assert everything(run) == everything(finished)


def test_a_stop_between_two_steps_is_taken(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evoprune.search import joint_run

    def carried_out(run: RunDirectory, *arguments: Any) -> None:
        carry_out(run, *arguments)
        signal.raise_signal(signal.SIGTERM)

    carry_out = joint_run.carry_out
    monkeypatch.setattr(joint_run, "carry_out", carried_out)
    with pytest.raises(Interrupted):
        start_search(config(world), INLINE, run_dir=tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    assert run.state == "interrupted" and step(run, "1-metric").state == "finished"
    assert not (run.path / "steps" / "2-allocation").exists()


def test_resume_refuses_what_changed(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    """Before a step could begin on another model or text than those before."""
    model, text = save_tiny(tmp_path / "model"), tmp_path / "text.txt"
    shutil.copy(world / "text.txt", text)
    path = tmp_path / "run"
    changes = {"model.name": str(model), "data.source": str(text), "rounds": 1, "evaluations": 20}
    start_search(config(world, **changes), INLINE, run_dir=path)
    (path / "result.json").unlink()
    shutil.rmtree(path / "steps" / "2-allocation")
    before = (path / "config.yaml").read_text()

    def refused() -> str:
        with pytest.raises((InvalidInput, WorkersFailed)) as caught:
            resume_search(RunDirectory(path), INLINE)
        assert not (path / "steps" / "2-allocation").exists()
        return str(caught.value)

    (path / "config.yaml").write_text(before.replace("rounds: 1", "rounds: 2"))
    assert re.search("the configuration changed since this run began.*--fork", refused())
    (path / "config.yaml").write_text(before)
    whole = text.read_text()
    text.write_text(whole.replace("pears", "plums"))
    assert re.search("the model or data changed since this run began.*--fork", refused())
    text.write_text(whole)
    save_tiny(model, seed=1)
    assert "its numbers differ from the run's: model" in refused()


_DRIVER = """
import json, sys
from pathlib import Path
from evoprune.search.config import validated
from evoprune.search.rundir import RunDirectory
from evoprune.search.worker_session import Resources
from evoprune.search.session import resume_search, start_search
path, executor = Path(sys.argv[1]), Resources(executor=sys.argv[3], workers=2)
if (path / "run.json").exists():
    resume_search(RunDirectory.open(path), executor)
else:
    start_search(validated(json.loads(sys.argv[2])), executor, run_dir=path)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "moments"),
    [
        ("inline", ("steps/1-metric/config.yaml", *(f"steps/{name}/evaluations.wal" for name in STEPS), "export")),
        pytest.param("ray", ("steps/2-allocation/evaluations.wal",), marks=pytest.mark.ray),
    ],
)
def test_a_killed_run_resumes_to_the_same(
    executor: str, moments: tuple[str, ...], finished: RunDirectory, world: Path
) -> None:
    """SIGKILL as soon as these files are there: early, in every step and at the end."""
    path = world / f"killed-{executor}"
    command = [sys.executable, "-c", _DRIVER, str(path), config(world).model_dump_json(), executor]
    for wanted in moments:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (path / wanted).exists():
            time.sleep(0.01)
        assert process.poll() is None, process.stderr and process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert everything(RunDirectory.open(path)) == everything(finished)
    assert json.loads((path / "run.json").read_text())["kind"] == "joint"
