"""`search allocation` from the command line to the files it leaves, everything that reads them, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

import evoprune
from evoprune.configuration import ALLOCATION_KEYS, JOINT_KEYS, KEYS
from evoprune.fitness.allocators import ALLOCATORS
from evoprune.metrics.allocation_file import read_allocation, write_allocation
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import MetricExport
from evoprune.metrics.errors import InvalidInput
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.publishing import rebuild_board
from evoprune.search.rundir import RunDirectory
from tests.door.conftest import Run, tree
from tests.models import save_tiny

SHOWN = [
    "run", "kind", "state", "seed", "evaluations", "distinct", "seconds", "best", "baselines", "dense", "front",
]  # fmt: skip
HELDOUT = {"loss", "perplexity", "kl", "stderr", "tokens"}

pytestmark = pytest.mark.usefixtures("without_report")


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log")))
    return optuna.load_study(study_name=RunDirectory(folder).run_id, storage=storage).trials


def test_a_search_from_the_command_line(
    run: Run, tiny: Path, story: Path, levels: Path, allocated: Path, place: Path
) -> None:
    """And the command that it prints at its end: it prunes to what was measured."""
    done = run("search", "allocation", tiny, "--config", levels, "--executor", "inline", "--seed", 1)
    assert done.code == 0, done.err
    folder = Path(done.out.strip())
    assert folder.parent == Path("runs") and "-allocation-" in folder.name
    assert (folder / "history.jsonl").read_bytes() == (allocated / "history.jsonl").read_bytes()
    for text in ("dense", "evolved winner", "uniform", "owl", "60% sparsity by wanda", "sparsity in %, by block",
                 "self_attn.q_proj", "between uniform and dense", "20 evaluations, seed 1"):  # fmt: skip
        assert text in " ".join(done.err.split()), text  # a long path breaks the title
    first = result_of(allocated)
    assert {**result_of(folder), "run": ""} == {**first, "run": ""}

    (command,) = [line for line in done.err.splitlines() if line.startswith("prune ")]
    words = shlex.split(command.partition("evoprune ")[2].replace("DIR", "out"))
    pruned = run(*words, "--json")
    assert pruned.code == 0, pruned.err
    kept = {layer["name"]: layer["sparsity"] for layer in pruned.json["layers"]}
    assert pruned.json["removed"] == first["best"]["removed"]
    assert kept.keys() == first["best"]["allocation"].keys()
    words = ["eval", "out", "--dense", tiny, "--data", story, "--window", 32, "--tokens", 4 * 32, "--json"]
    measured = run(*words).json
    assert measured["loss"] == pytest.approx(first["best"]["heldout"]["loss"], rel=1e-6)
    assert measured["kl"] == pytest.approx(first["best"]["heldout"]["kl"], rel=1e-4)

    listed = run("runs", "--json").json
    assert [set(row) for row in listed] == [{"run", "kind", "state", "best", "seconds"}]
    assert (listed[0]["run"], listed[0]["kind"], listed[0]["state"]) == (folder.name, "allocation", "finished")
    table = run("runs")
    assert table.code == 0 and folder.name[:15] in table.out and "matrices from " in " ".join(table.out.split())
    shown = run("show", "--json")
    assert shown.json["run"] == folder.name
    assert run("show", folder.name, "--json").out == shown.out
    assert run("resume", folder, "--executor", "inline", "--json").json == shown.json


def test_show_as_json(run: Run, allocated: Path, tiny: Path) -> None:
    document = run("show", allocated, "--json").json
    assert list(document) == SHOWN
    assert (document["kind"], document["state"], document["seed"]) == ("allocation", "finished", 1)
    assert document["evaluations"] == 20 >= document["distinct"] > 10
    assert {"allocation", "fitness", "heldout"} <= set(document["best"])
    assert set(document["best"]["heldout"]) == set(document["dense"]["heldout"]) == HELDOUT
    sites = [bound.site.name for bound in evoprune.load_model(str(tiny)).sites]
    assert set(document["best"]["allocation"]) == set(sites)
    assert {row["name"] for row in document["baselines"]} == {"uniform", "erk", "owl"} <= set(ALLOCATORS)
    for row in document["baselines"]:
        assert (set(row), set(row["heldout"])) == ({"name", "fitness", "heldout"}, HELDOUT)
    assert document["front"] == []
    text = json.dumps([document[name] for name in ("best", "front", "baselines", "dense")])
    assert str(allocated) not in text and str(tiny) not in text


@pytest.mark.parametrize("width", [80, 120])
def test_show_for_people(width: int, run: Run, allocated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = run("show", allocated)
    assert (done.code, done.err) == (0, "")
    table, _, rest = done.out.partition("\nfitness ")
    assert max(len(line.rstrip()) for line in table.splitlines()) <= width
    losses = [float(loss) for loss in re.findall(r"\d\.\d\d +(\d+\.\d{4}) ± ", table)]
    assert losses == sorted(losses) and len(losses) == 5
    assert "124 predicted tokens of" in table and "(text C), windows of 32" in " ".join(table.split())
    best = result_of(allocated)["best"]["allocation"]
    row = re.search(r"mlp\.down_proj +(\d+) +(\d+)", table)
    assert row is not None
    shown = [f"{100 * best[f'model.layers.{block}.mlp.down_proj']:.0f}" for block in (0, 1)]
    assert [*row.groups()] == shown
    assert f"evoprune show {allocated}" in rest


def test_export(run: Run, allocated: Path, place: Path, tmp_path: Path) -> None:
    for ending in ("json", "txt"):
        done = run("export", allocated, "--to", f"mine.{ending}")
        assert (done.code, done.out) == (0, f"mine.{ending}\n")
    assert read_allocation("mine.json").by_name() == result_of(allocated)["best"]["allocation"]
    assert (place / "mine.txt").read_bytes() == (allocated / "export" / "allocation.txt").read_bytes()
    done = run("export", allocated, "--to", "mine.py")
    assert (done.code, done.err.count("\n")) == (2, 1) and "this run leaves no .py" in done.err
    done = run("export", allocated, "--to", "mine.tex")
    assert done.code == 2 and "cannot export the allocation to 'mine.tex': the ending must be .json" in done.err
    folder = tmp_path / "run"
    shutil.copytree(allocated, folder)
    other = write_allocation(evoprune.allocate(result_of(allocated)["model"], "er", 0.6), "other.json")
    text = folder / "export" / "allocation.txt"
    text.write_text(text.read_text().replace(": ", ": 1", 1))
    assert run("export", folder, "--to", "b.json").code == 0
    assert "it was changed" in run("export", folder, "--to", "b.txt").err
    shutil.copy(other, folder / "export" / "allocation.json")
    assert "it was changed" in run("export", folder, "--to", "c.json").err
    assert not (place / "c.json").exists()


def test_an_interrupted_run(
    run: Run, tiny: Path, levels: Path, place: Path, allocated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in a generation, looked at, and continued, although the file that its metric came from is gone."""
    wanda = CRITERIA["wanda"]
    assert isinstance(wanda, Metric)
    MetricExport(wanda).write(place / "mine.json")
    asked = iter(range(100))
    search = ("search", "allocation", tiny, "--config", levels, "--executor", "inline", "--seed", 1)
    with monkeypatch.context() as patch:
        patch.setattr("evoprune.search.session.stop_on_signals", lambda: nullcontext(lambda: next(asked, 100) >= 40))
        done = run(*search, "--metric", "mine.json", "--run-dir", "stopped")
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1].endswith("continue with `evoprune resume stopped`")
    (place / "mine.json").unlink()
    shown = run("show", "stopped", "--json").json
    assert list(shown) == SHOWN
    assert (shown["state"], shown["dense"], shown["baselines"]) == ("interrupted", {"heldout": None}, [])
    assert 3 < shown["evaluations"] < 20
    history = [json.loads(line) for line in (place / "stopped" / "history.jsonl").read_text().splitlines()]
    decided = [line for line in history if line["stage"] == 2 or line["stage"] == "seeds"]
    assert shown["best"]["fitness"] in [line["kl"] for line in decided]
    assert shown["best"]["heldout"] is None
    assert set(shown["best"]["allocation"]) == set(result_of(allocated)["best"]["allocation"])
    view = run("show", "stopped").out
    assert "evoprune resume stopped" in view and "matrices from " in view
    assert re.search(r"by stage +\d+ → \d+ → \d+", view) and re.search(r"from +generation \d+ \(", view)
    assert "matrices from " in " ".join(run("runs").out.split()) or run("runs").out == ""
    refused = run("export", "stopped", "--to", "a.json")
    assert refused.code == 2 and "is not finished" in refused.err
    assert run("resume", "stopped", "--executor", "inline").code == 0
    assert result_of(place / "stopped")["metric"] == wanda.expression.text
    # By name and by expression the metric is another job, but the same search.
    assert (place / "stopped" / "history.jsonl").read_bytes() == (allocated / "history.jsonl").read_bytes()
    rebuild_board(RunDirectory(place / "stopped"), None)
    assert len(trials(place / "stopped")) == 20


def test_the_board_can_be_rebuilt(allocated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(allocated, folder)
    before = trials(folder)
    (folder / "optuna.log").unlink()
    rebuild_board(RunDirectory(folder), None)
    after = trials(folder)
    assert len(after) == 20
    for name in ("number", "state", "value", "intermediate_values", "user_attrs", "datetime_start"):
        assert [getattr(trial, name) for trial in after] == [getattr(trial, name) for trial in before], name
    dashboard = pytest.importorskip("optuna_dashboard")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log")))
    found = optuna.load_study(study_name=RunDirectory(folder).run_id, storage=storage)
    note = dashboard.get_note(found)
    assert all(f"| {name} |" in note for name in ("dense", "uniform", "owl", "**evolved winner**"))
    listed = {artifact.filename for artifact in optuna.artifacts.get_all_artifact_meta(found)}
    assert {"allocation.json", "allocation.txt"} <= listed


def test_a_fork(run: Run, allocated: Path, place: Path) -> None:
    words = ("resume", allocated, "--fork", "--executor", "inline", "--set", "evaluations=26", "--run-dir", "fork")
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert done.json["evaluations"] == 26
    old = (allocated / "evaluations.wal").read_bytes()
    assert (place / "fork" / "evaluations.wal").read_bytes().startswith(old)


def test_the_resolved_configuration_can_be_used_again(run: Run, place: Path) -> None:
    assert "allocation" in run("search", "--help").out
    first = run("search", "allocation", "--dry-run", "--granularity", "block", "--population", 12)
    assert (first.code, first.err) == (0, "")
    (place / "resolved.yaml").write_text(first.out)
    assert run("search", "allocation", "--dry-run", "--config", "resolved.yaml").out == first.out
    document = run("search", "allocation", "--dry-run", "--config", "resolved.yaml", "--json").json
    assert document == yaml.safe_load(first.out)
    assert document["kind"] == "allocation" and document["evaluations"] == 500
    target = {"sparsity": 0.6, "metric": "wanda", "compressor": "mask", "grid": 16, "granularity": "block"}
    target |= {"drop": "none", "drop_only": False}
    assert document["target"] == {**target, "pareto": None, "sparsity_range": None}
    timed = run("search", "allocation", "--dry-run", "--minutes", 5, "--json").json
    assert (timed["evaluations"], timed["minutes"]) == (None, 5.0)
    assert {path.name for path in place.iterdir()} == {"resolved.yaml"}


def test_every_option_reaches_the_configuration(run: Run) -> None:
    """An option per key, each with a value that is not the default."""
    given = {
        "revision": "main", "dtype": "bfloat16", "device": "cpu", "data": "a.txt", "calibration": "b.txt",
        "calibration_sequences": 7, "calibration_window": 33, "sparsity": 0.55, "metric": "ria", "population": 24,
        "compressor": "sparsegpt",
        "granularity": "kind", "drop": "parts", "evaluations": 11, "minutes": 2.5, "seed": 5, "window": 9,
        "threads": 2, "searcher": "evolution", "seed_from": "a.json", "pareto": "flops",
    }  # fmt: skip
    flags = {"trust_remote_code": True, "drop_only": True, "sparsity_range": [0.35, 0.65]}
    assert given.keys() | flags.keys() | {"model", "surrogate"} == ALLOCATION_KEYS.keys()
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--trust-remote-code", "--drop-only", "--sparsity-range", 0.35, 0.65]
    plain = run("search", "allocation", "some/model", *words, "--dry-run", "--json").json
    for name, value in (given | flags | {"model": "some/model"}).items():
        found: Any = plain
        for part in ALLOCATION_KEYS[name].split("."):
            found = found[part]
        assert found == value, name
    # Neither goes with a front.
    for words, key, value in ((("--searcher", "random"), "name", "random"), (("--surrogate",), "surrogate", True)):
        assert run("search", "allocation", *words, "--dry-run", "--json").json["searcher"][key] == value


def test_the_defaults_in_the_help_are_true(run: Run) -> None:
    text = " ".join(run("search", "allocation", "--help").out.replace("│", " ").split())
    plain = AllocationSearchConfig()
    assert "[default: 0.6; with --pareto the middle of the range]" in text and plain.target.sparsity == 0.6
    assert "[default: 0.4 0.7; with --drop-only 0.1 0.5]" in text
    front = ("search", "allocation", "--pareto", "parameters", "--dry-run", "--json")
    for words, ends, middle in (((), [0.4, 0.7], 0.55), (("--drop", "parts", "--drop-only"), [0.1, 0.5], 0.3)):
        target = run(*front, *words).json["target"]
        assert (target["sparsity_range"], target["sparsity"]) == (ends, middle)
    for name in ("evaluations", "population", "metric", "compressor", "granularity", "drop", "searcher", "seed",
                 "window", "threads", "dtype", "device", "calibration_sequences", "calibration_window"):  # fmt: skip
        value: Any = plain
        for part in ALLOCATION_KEYS[name].split("."):
            value = getattr(value, part)
        part = text.partition(f"--{name.replace('_', '-')} ")[2].partition(" --")[0]
        assert f"[default: {value}" in part, name


def test_a_search_in_python(tiny: Path, levels: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = evoprune.search_allocation(
        str(tiny),
        config=levels,
        executor="inline",
        quiet=True,
        evaluations=10,
        metric="magnitude",
        granularity="block",
        sparsity=0.5,
        settings={"searcher.seeds": ["owl"]},
    )
    assert capfd.readouterr() == ("", "")
    assert (run.kind, run.state, run.config["target"]["metric"]) == ("allocation", "finished", "magnitude")
    assert run.best is not None and run.result is not None
    assert "matrices from " in repr(run)
    assert len(set(run.best["allocation"].values())) <= 2
    assert len(list(run.history())) == run.result["births"]
    assert run.table().row_count == 4
    file = run.export("winner.json")
    pruned = evoprune.prune(str(tiny), metric="magnitude", allocation=file)
    assert pruned.removed == run.result["best"]["removed"]
    # What the newest run found is where the next one starts, and says so once and for all.
    again = evoprune.search_allocation(
        str(tiny), config=levels, executor="inline", quiet=True, evaluations=3, metric="magnitude", seed_from="latest"
    )
    assert again.config["seed_from"] == str(run.path)
    assert [line["origin"] for line in again.history()][1] == "seed:given"
    with pytest.raises(InvalidInput, match="evaluations"):
        evoprune.search_allocation(str(tiny), evaluations=0)
    with pytest.raises(InvalidInput, match="no such option"):
        evoprune.search_allocation(str(tiny), settings={"searcher.islands": 2})


def test_python_has_the_options_of_the_command() -> None:
    from inspect import signature

    searches = (evoprune.search_metric, evoprune.search_allocation, evoprune.search_joint)
    for search, keys in zip(searches, (KEYS, ALLOCATION_KEYS, JOINT_KEYS), strict=True):
        assert keys.keys() <= signature(search).parameters.keys()


# Wrong input


@pytest.mark.parametrize("sparsity", ["0", "1", "-1", "nan", "inf", "60"])
def test_sparsity(sparsity: str, refused: Callable[..., str], tiny: Path) -> None:
    assert "is not between 0 and 1" in refused("search", "allocation", tiny, f"--sparsity={sparsity}")


def test_options(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    search = ("search", "allocation", tiny)
    assert "no model 'no/such-model'" in refused("search", "allocation", "no/such-model")
    assert "no text './nowhere.txt'" in refused(*search, "--data", "./nowhere.txt")
    assert "no criterion 'wnada'; did you mean 'wanda'" in refused(*search, "--metric", "wnada")
    assert "no operator 'mull'" in refused(*search, "--metric", "mull(abs(W),X_l2)")
    assert "no file 'nowhere.json'" in refused(*search, "--metric", "nowhere.json")
    assert "no allocator 'oww'; did you mean 'owl'" in refused(*search, "--set", "searcher.seeds=[oww]")
    assert "searcher.islands: no such option" in refused(*search, "--set", "searcher.islands=2")
    assert "evaluations: " in refused(*search, "--evaluations", 0)
    assert "give --evaluations, --minutes or both" in refused(*search, "--set", "evaluations=null")
    assert "is not a database URL" in refused(*search, "--storage", "nonsense")
    assert "give --population 8 or more" in refused(*search, "--population", 4)
    for stages, said in (
        ("[{windows: 4, survivors: 2}, {windows: 4, survivors: 1}]", "more windows and fewer survivors"),
        ("[{windows: 4, survivors: 2}, {windows: 8, survivors: 2}]", "the last has 1 survivor"),
        ("[{windows: 4, survivors: 2}, {windows: 8, survivors: 3}, {windows: 9, survivors: 1}]", "fewer survivors"),
        ("[{windows: 4, survivors: 1}]", "2 stages or more"),
        ("[{windows: 4, survivors: 2}, {windows: 999, survivors: 1}]", "wants 999 windows, and there are 192"),
        ("[{windows: 0, survivors: 2}, {windows: 8, survivors: 1}]", "stages.0.windows"),
        ("3", "searcher.stages: "),
    ):
        assert said in refused(*search, "--set", f"searcher.stages={stages}")
    (place / "metric.yaml").write_text(yaml.safe_dump(MetricSearchConfig().model_dump(mode="json")))
    assert "kind: these are options of another search, 'metric': this one is 'allocation'" in refused(
        *search, "--config", "metric.yaml"
    )
    tree_file = {"data": "abs", "left": {"data": "W"}}
    (place / "tree.json").write_text(json.dumps(tree_file))
    assert "tree.json" in refused(*search, "--metric", "tree.json")


def test_what_a_search_cannot_start_from(refused: Callable[..., str], tiny: Path, place: Path, allocated: Path) -> None:
    search = ("search", "allocation", tiny, "--seed-from")
    (place / "other").mkdir()
    (place / "other" / "run.json").write_text('{"run": "x", "kind": "metric", "created": "2026-01-01T00:00:00+00:00"}')
    assert "searched metrics: a run that searched allocations is needed" in refused(*search, "other")
    assert "searched allocations: a run that searched metrics is needed" in refused(
        "search", "metric", tiny, "--seed-from", allocated
    )
    assert "no run 'nowhere'" in refused(*search, "nowhere")
    assert "no file 'nowhere.json'" in refused(*search, "nowhere.json")
    assert "no run in runs yet" in refused(*search, "latest")
    wanda = CRITERIA["wanda"]
    assert isinstance(wanda, Metric)
    MetricExport(wanda).write(place / "metric.json")
    assert "'metric.json': format" in refused(*search, "metric.json")
    assert "says neither its budget nor its model" in refused(*search, allocated / "export" / "allocation.txt")
    shutil.copytree(allocated, place / "run")
    (place / "run" / "result.json").unlink()
    assert "is not finished: resume it first" in refused(*search, "run")


def test_a_model_or_a_text_that_does_not_fit_leaves_no_run(
    run: Run, tiny: Path, levels: Path, place: Path, allocated: Path
) -> None:
    (place / "short.txt").write_text("a few words, and no more\n" * 3)
    save_tiny(place / "wide", intermediate_size=64)
    save_tiny(place / "gpt2", "gpt2")
    before = tree(place)
    file = allocated / "export" / "allocation.json"
    for words, said in (
        ((tiny, "--data", "short.txt"), "text too short"),
        ((tiny, "--sparsity", 0.999), "weights cannot go: the matrices can lose"),
        ((tiny, "--granularity", "block"), "choose another sparsity or a finer granularity"),
        (("wide", "--seed-from", file), "mlp.gate_proj is [64, 32] here and [48, 32] there"),
        (("gpt2", "--seed-from", file), "LlamaForCausalLM and not this GPT2LMHeadModel"),
        (("gpt2", "--seed-from", allocated), "gives transformer.h.0.attn.c_attn no sparsity"),
    ):
        done = run("search", "allocation", *words, "--config", levels, "--executor", "inline")
        assert (done.code, done.out) == (2, ""), done
        last = done.err.splitlines()[-1]
        assert last.startswith("error: ") and said in last, last
        assert tree(place) == before


@pytest.mark.usefixtures("without_report")
def test_an_allocation_of_other_weights_is_taken_with_a_warning(
    run: Run, tiny: Path, story: Path, levels: Path, small: Path, place: Path, allocated: Path
) -> None:
    """Names and shapes agree, the weights do not, as in a model that was trained further."""
    save_tiny(place / "sibling", seed=1)
    file = allocated / "export" / "allocation.json"
    words = ("--data", story, "--evaluations", 12, "--executor", "inline")
    for model, warned in ((tiny, False), (place / "sibling", True)):
        for command in (
            ("prune", model, "--metric", "magnitude", "--allocation", file, "--out", f"out-{warned}"),
            ("search", "allocation", model, "--seed-from", file, "--config", levels, *words),
            ("search", "metric", model, "--allocation", file, "--config", small, *words),
        ):
            done = run(*command)
            assert done.code == 0, done.err
            said = [line for line in done.err.splitlines() if "found on other weights" in line]
            assert len(said) == warned, command
            assert all(line.startswith("warning: the allocation was found on other weights of") for line in said)
    document = json.loads(file.read_text())
    (place / "odd.json").write_text(json.dumps(document | {"fingerprint": 3}))
    done = run("prune", tiny, "--allocation", "odd.json", "--out", "odd")
    assert done.code == 2
    assert "'fingerprint' must be a string" in done.err
