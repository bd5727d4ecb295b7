"""Whole metric searches on a tiny random model: from a folder on disk to the exported winner."""

import io
import json
import math
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from evoprune.fitness.worker import build
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.expression import parse
from evoprune.search.config import resolve
from evoprune.search.engine.deadline import SHORTEST
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.kinds import config_of
from evoprune.search.metric_export import readme, winner_export
from evoprune.search.rundir import RunDirectory
from evoprune.search.search_run import memory_line
from evoprune.search.session import resume_search, start_search
from evoprune.search.worker_session import Resources
from tests.models import save_tiny
from tests.search.whole_runs import history, timeless, tiny_options

EVALUATIONS = 40


def config(world, **changes):
    return resolve(
        overrides={
            **tiny_options(world),
            "racing.rungs": [2, 4, 8],
            "evaluations": EVALUATIONS,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def finished(world):
    return start_search(config(world), Resources(executor="inline"), run_dir=world / "run")


def test_the_result_has_what_scripts_rely_on(finished):
    result = finished.result
    assert finished.state == "finished"
    assert result["evaluations"] == EVALUATIONS
    assert {row["name"] for row in result["baselines"]} == {
        "random",
        "magnitude",
        "wanda",
        "ria",
        "gblm",
        "gblm-gradient",
        "pruner-zero",
        "power",
    }
    for entry in (result["dense"], result["best"], *result["baselines"]):
        assert set(entry["heldout"]) == {"loss", "perplexity", "kl", "stderr", "tokens"}
    assert result["dense"]["heldout"]["kl"] == pytest.approx(0, abs=1e-5)
    assert result["best"]["fitness"] <= min(row["fitness"] for row in result["baselines"] if row["fitness"] is not None)
    finalists = result["finalists"]
    assert finalists[0]["expression"] == result["best"]["expression"]
    assert finalists == sorted(finalists, key=lambda member: member["fitness"] + member["loss"])
    assert min(member["fitness"] for member in finalists) == min(member["fitness"] for member in result["front"])
    assert "/" not in json.dumps({name: result[name] for name in ("best", "front", "baselines", "dense")}).replace(
        "\\\\", ""
    )


def test_finalists_are_compared_on_all_of_the_search_text(finished, world):
    worker = build(config(world).context().to_json())
    prepared = worker.handle("prepare", {})["name"]
    windows = worker.prepared(prepared).final_windows()
    assert finished.result["final_tokens"] == windows.numel()
    assert len(windows) > config(world).racing.rungs[-1]
    for member in finished.result["finalists"]:
        criterion = {"expression": parse(member["expression"]).to_json()}
        whole = worker.handle("finals", {"prepared": prepared, "criterion": criterion, "windows": [0, len(windows)]})
        assert member["loss"] == pytest.approx(math.fsum(whole["nll"]) / len(windows), rel=1e-6)


def test_the_winner_is_no_worse_than_any_baseline_on_the_search_text(finished):
    result = finished.result
    known = [row["fitness"] for row in result["baselines"] if row["fitness"] is not None]
    assert result["best"]["fitness"] <= min(known)


def test_the_exports_give_the_winner_back(finished):
    for suffix in ("json", "py"):
        metric = load_metric(str(finished.path / "export" / f"metric.{suffix}"))
        assert metric.expression.text == finished.result["best"]["expression"]
    done = subprocess.run([sys.executable, str(finished.path / "export" / "metric.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_exports_say_where_the_winner_comes_from(finished):
    result = finished.result
    best, folder = result["best"], finished.path / "export"
    document = json.loads((folder / "metric.json").read_text())
    provenance, results = document["provenance"], document["results"]
    config = config_of(finished)
    assert provenance["statistics"] == {
        "names": best["statistics"],
        "data": config.data.source,
        "sequences": config.data.calibration_sequences,
        "window": config.data.calibration_window,
        "seed": config.seed,
        "dtype": "float32",
    }
    assert provenance["config"] == finished.identity["config"]
    assert (provenance["git"], provenance["created"]) == (finished.identity["git"], finished.identity["created"])
    assert provenance["seconds"] > 0
    assert [rung["value"] for rung in results["fitness"]["rungs"]] == best["rungs"]
    assert results["fitness"]["rungs"][-1]["tokens"] == result["rung_tokens"][len(best["rungs"]) - 1]
    assert results["fitness"]["stderr"] == best["stderr"]
    assert results["baselines"] == result["baselines"]
    assert results["heldout"] == {"dense": result["dense"]["heldout"], "winner": best["heldout"]}
    table = (folder / "README.md").read_text()
    for row in (result["dense"], best, *result["baselines"]):
        assert f"| {row['heldout']['perplexity']:,.2f} | {row['heldout']['loss']:.4f} ± " in table
    assert best["expression"] in table


def test_an_export_names_what_prunes_the_same_weights(finished):
    twice = parse("mul(2,mul(X_l2,abs(W)))")
    config = config_of(finished)
    export = winner_export(config, finished.identity, finished.result, twice, dtype="float32", seconds=1.0)
    assert {*export.equivalent_to} - {"power"} == {"wanda"}  # the power product is whatever was tuned
    assert f"It prunes the same weights as {', '.join(export.equivalent_to)}." in readme(finished.result, export)


def test_the_board_shows_every_evaluation(finished):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(finished.path / "optuna.log")))
    study = optuna.load_study(study_name=finished.run_id, storage=storage)
    evaluated = [json.loads(line) for line in history(finished).splitlines() if b'"same_as"' not in line]
    assert [trial.user_attrs["expression"] for trial in study.trials] == [line["expression"] for line in evaluated]
    assert [list(trial.intermediate_values.values()) for trial in study.trials] == [
        line.get("rungs", []) for line in evaluated
    ]


def test_the_same_seed_gives_the_same_run(finished, world):
    again = start_search(config(world), Resources(executor="inline"), run_dir=world / "again")
    assert history(again) == history(finished)
    assert timeless(again.result) == timeless(finished.result)


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4))])
def test_ray_gives_the_same_run_with_any_number_of_workers(finished, world, workers):
    run = start_search(config(world), Resources(workers=workers), run_dir=world / f"ray-{workers}")
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


_DRIVER = """
import sys
from pathlib import Path
from evoprune.search.config import validated
from evoprune.search.worker_session import Resources
from evoprune.search.session import resume_search, start_search
from evoprune.search.kinds import config_of
from evoprune.search.metric_export import readme, winner_export
from evoprune.search.rundir import RunDirectory
from evoprune.search.search_run import memory_line
import json
path = Path(sys.argv[1])
if path.exists():
    resume_search(RunDirectory.open(path), Resources(executor="inline"))
else:
    start_search(validated(json.loads(sys.argv[2])), Resources(executor="inline"), run_dir=path)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_history(finished, world):
    """SIGKILL at several moments of the search; engine.md, check 6."""
    path = world / "killed"
    command = [sys.executable, "-c", _DRIVER, str(path), config(world).model_dump_json()]
    for wanted in (1, 12, 25):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        log = path / "evaluations.wal"
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < wanted):
            time.sleep(0.02)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    run = RunDirectory.open(path)
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


def test_resume_refuses_changed_data(finished, world, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((world / "text.txt").read_text())
    run = start_search(
        config(world, **{"data.source": str(text), "evaluations": 3}),
        Resources(executor="inline"),
        run_dir=tmp_path / "run",
    )
    (run.path / "result.json").unlink()
    text.write_text(text.read_text().replace("pears", "plums"))
    with pytest.raises(InvalidInput, match="changed since this run began"):
        resume_search(RunDirectory.open(run.path), Resources(executor="inline"))


@pytest.fixture
def unfinished(world, tmp_path):
    """A small run whose result has gone, so that it can be continued."""
    seed = tmp_path / "seed.json"
    seed.write_text((world / "run" / "export" / "metric.json").read_text())
    run = start_search(
        config(world, seed_from=str(seed), evaluations=3), Resources(executor="inline"), run_dir=tmp_path / "run"
    )
    (run.path / "result.json").unlink()
    return RunDirectory.open(run.path)


def resumed(run):
    return resume_search(RunDirectory.open(run.path), Resources(executor="inline"))


def test_resume_refuses_another_configuration(finished, unfinished):
    path = unfinished.path / "config.yaml"
    path.write_text(path.read_text().replace("window: 16", "window: 8"))
    with pytest.raises(InvalidInput, match=r"the configuration changed since this run began.*--fork") as caught:
        resumed(unfinished)
    assert "\n" not in str(caught.value)


def test_resume_takes_another_deadline_and_another_time(finished, unfinished):
    before = history(unfinished)
    path = unfinished.path / "config.yaml"
    path.write_text(path.read_text().replace("deadline: auto", "deadline: 100").replace("minutes: null", "minutes: 9"))
    run = resumed(unfinished)
    assert (run.config["deadline"], run.config["minutes"]) == (100, 9)
    assert history(run) == before
    assert run.result is not None


def test_resume_refuses_other_code(finished, unfinished, monkeypatch):
    monkeypatch.setattr("evoprune.search.worker_session.code_hash", lambda: "another")
    with pytest.raises(InvalidInput, match=r"the code of evoprune changed since this run began.*--fork"):
        resumed(unfinished)


def test_resume_refuses_other_seeds(finished, unfinished, monkeypatch):
    monkeypatch.setattr("evoprune.search.metric_run.seeds_from", lambda source: {"given": parse("mul(abs(W),X_max)")})
    with pytest.raises(InvalidInput, match=r"the candidates to start from changed since this run began.*--fork"):
        resumed(unfinished)


def test_every_evaluation_has_a_deadline_that_nothing_depends_on(world, tmp_path, monkeypatch):
    given = []

    class Watched(InlineExecutor):
        def submit(self, jobs):
            jobs = list(jobs)
            given.extend(jobs)
            super().submit(jobs)

    monkeypatch.setattr("evoprune.search.worker_session.InlineExecutor", Watched)
    runs = [
        start_search(
            config(world, evaluations=3, deadline=deadline), Resources(executor="inline"), run_dir=tmp_path / name
        )
        for name, deadline in (("auto", "auto"), ("given", 55))
    ]
    measured = [job for job in given if job.kind != "prepare"]
    half = len(measured) // 2
    assert {job.deadline for job in measured[:half]} == {SHORTEST}
    assert {job.deadline for job in measured[half:]} == {55}
    assert [job.key for job in measured[:half]] == [job.key for job in measured[half:]]
    assert len({(run.path / "state.json").read_bytes() for run in runs}) == 1


def test_seeds_may_come_from_another_run(finished, world, tmp_path):
    run = start_search(
        config(world, seed_from=str(finished.path), evaluations=16, **{"searcher.seeds": ["wanda"]}),
        Resources(executor="inline"),
        run_dir=tmp_path / "run",
    )
    born = {json.loads(line)["expression"] for line in history(run).splitlines()}
    assert finished.result["best"]["expression"] in born


@pytest.mark.parametrize("objective", ["perplexity", "reconstruction"])
def test_other_objectives_run(world, tmp_path, objective):
    run = start_search(
        config(world, objective=objective, evaluations=20), Resources(executor="inline"), run_dir=tmp_path / "run"
    )
    assert run.result["best"]["fitness"] <= min(row["fitness"] for row in run.result["baselines"] if row["fitness"])


def test_a_statistic_that_is_dead_is_left_out(world, tmp_path):
    """Neurons that nothing reads have no gradient: whole rows of up_proj and gate_proj are zero."""
    folder = save_tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    for block in (0, 1):
        weights[f"model.layers.{block}.mlp.down_proj.weight"][:, :8] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    stream = io.StringIO()
    run = start_search(
        config(world, evaluations=12, **{"model.name": str(folder), "statistics": ["X_l2", "G_l2"]}),
        Resources(executor="inline"),
        run_dir=tmp_path / "run",
        stream=stream,
    )
    lines = [json.loads(line) for line in history(run).splitlines()]
    dead = [line for line in lines if line["expression"] and "G_l2" in line["expression"]]
    assert dead and {line["reason"] for line in dead} <= {"STAT_DEAD", "DUP_KEY"}
    assert "warning: G_l2: zero along 1 % or more of all rows" in stream.getvalue()
    # A published metric is measured all the same, and stands in the table.
    assert "gblm" in {row["name"] for row in run.result["baselines"]}


def test_births_may_be_simplified_as_published(world, tmp_path):
    run = start_search(
        config(world, evaluations=16, **{"searcher.simplify": "opposing"}),
        Resources(executor="inline"),
        run_dir=tmp_path / "run",
    )
    assert run.state == "finished" and run.config["searcher"]["simplify"] == "opposing"


def test_a_pattern_and_forward_only_statistics(world, tmp_path):
    run = start_search(
        config(
            world, statistics=["X_l2", "X_var"], evaluations=20, **{"target.sparsity": None, "target.pattern": "2:4"}
        ),
        Resources(executor="inline"),
        run_dir=tmp_path / "run",
    )
    names = {row["name"] for row in run.result["baselines"]}
    assert names == {"random", "magnitude", "wanda", "ria", "power"}
    assert run.result["target"] == "2:4"


def test_what_a_search_says_of_memory() -> None:
    """Sums of gradients are float32 like these weights, and as many for each gradient statistic."""
    mib = 2**20
    facts = {"model_bytes": 100 * mib, "teacher_bytes": 20 * mib, "statistics_bytes": 30 * mib, "prunable": 20 * mib}
    shared = "memory: 120 MiB of model and teacher in each worker, 30 MiB of statistics shared on a machine"
    assert memory_line(facts, ("X_l2", "Hinv")) == shared
    once = "; collecting gradients takes one of them 160 MiB more"
    assert memory_line(facts, ("X_l2", "G_l2", "G_l1")) == shared + once
