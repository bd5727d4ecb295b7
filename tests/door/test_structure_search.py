"""Structure searches from the command line and in Python: what is found, shown, exported, pruned, resumed, refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

import evoprune
from evoprune.configuration import STRUCTURE_KEYS
from evoprune.fitness.part_merges import spelled_block
from evoprune.fitness.structure_weights import merging_in, with_merges
from evoprune.fitness.unit_costs import kept_by
from evoprune.fitness.unit_criteria import UNIT_CRITERIA
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape, Shape
from evoprune.metrics.shape_file import read_shape, write_shape
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.publishing import rebuild_board
from evoprune.search.rundir import RunDirectory
from tests.door.conftest import Run, tree
from tests.models import save_tiny

CONFIG = """\
data: {source: TEXT, window: 32, heldout_windows: 4, calibration_window: 32, calibration_sequences: 4}
searcher:
  offspring: 6
  windows: 8
  stages: [{windows: 1, survivors: 3}, {windows: 2, survivors: 2}, {windows: 4, survivors: 1}]
  seeds: [flap, wanda-sp]
evaluations: 20
"""
SHOWN = ["run", "kind", "state", "seed", "evaluations", "distinct", "seconds", "best", "baselines", "dense", "front"]
HELDOUT = {"loss", "perplexity", "kl", "stderr", "tokens"}


@pytest.fixture
def shapes(tmp_path: Path, story: Path) -> Path:
    """A configuration file for a search of seconds."""
    path = tmp_path / "shapes.yaml"
    path.write_text(CONFIG.replace("TEXT", str(story)))
    return path


@pytest.fixture(scope="module")
def structured(tiny: Path, story: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search; it only gets read."""
    folder = tmp_path_factory.mktemp("structured")
    config = folder / "shapes.yaml"
    config.write_text(CONFIG.replace("TEXT", str(story)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOPRUNE_CACHE", str(cache))
        run = evoprune.search_structure(
            str(tiny), config=config, executor="inline", run_dir=folder / "run", quiet=True, seed=1
        )
    return run.path


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def study(folder: Path) -> optuna.Study:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log")))
    return optuna.load_study(study_name=RunDirectory(folder).run_id, storage=storage)


def test_a_search_from_the_command_line(
    run: Run, tiny: Path, story: Path, shapes: Path, structured: Path, place: Path
) -> None:
    """And the commands that it prints at its end: they make the models that were measured."""
    done = run("search", "structure", tiny, "--config", shapes, "--executor", "inline", "--seed", 1)
    assert done.code == 0, done.err
    folder = Path(done.out.strip())
    assert folder.parent == Path("runs") and "-structure-" in folder.name
    assert (folder / "history.jsonl").read_bytes() == (structured / "history.jsonl").read_bytes()
    for text in ("dense", "evolved winner", "winner, path refit", "uniform", "flap alone",
                 "25% fewer parameters in heads and MLPs", "KV groups", "in the whole model",
                 "20 evaluations, seed 1"):  # fmt: skip
        assert text in " ".join(done.err.split()), text
    first = result_of(structured)
    assert {**result_of(folder), "run": ""} == {**first, "run": ""}

    assert first["best"]["refitted"] != first["best"]["heldout"]
    for head, out, expected in (("prune ", "out", "heldout"), ("refit ", "refitted", "refitted")):
        (command,) = [line for line in done.err.splitlines() if line.startswith(head)]
        words = shlex.split(command.partition("evoprune ")[2].replace("DIR", out))
        pruned = run(*words, "--json")
        assert pruned.code == 0, pruned.err
        assert pruned.json["parameters"] == first["best"]["cost"] + first["rest_cost"]
        words = ["eval", out, "--dense", tiny, "--data", story, "--window", 32, "--tokens", 4 * 32, "--json"]
        measured = run(*words).json
        assert measured["loss"] == pytest.approx(first["best"][expected]["loss"], rel=1e-5)
        assert measured["kl"] == pytest.approx(first["best"][expected]["kl"], rel=1e-3)
    assert run("prune", tiny, "--recipe", "refitted", "--calibration", story, "--out", "again").code == 0
    assert (Path("again") / "model.safetensors").read_bytes() == (Path("refitted") / "model.safetensors").read_bytes()

    listed = run("runs", "--json").json
    assert (listed[0]["run"], listed[0]["kind"], listed[0]["state"]) == (folder.name, "structure", "finished")
    assert listed[0]["best"]["shape"] == first["best"]["shape"]
    assert "query heads" in " ".join(run("runs").out.split())
    shown = run("show", "--json")
    assert shown.json["run"] == folder.name
    assert run("resume", folder, "--executor", "inline", "--json").json == shown.json


def test_a_merged_block_is_a_start_and_what_is_measured_is_pruned(
    run: Run, tiny: Path, story: Path, structured: Path, shapes: Path
) -> None:
    shape = read_shape(structured / "export/shape.json")
    blocks, merging = (shape.widths[0].whole, BlockShape((), (), ())), [(False, False), (True, True)]
    weights = with_merges(shape.weights, merging)
    write_shape(replace(shape, blocks=blocks, weights=weights), "given.json")
    words = ("--config", shapes, "--executor", "inline", "--sparsity", 0.5, "--evaluations", 14, "--seed", 1)
    words += ("--set", "searcher.methods=[shortgpt, comp]")
    done = run(
        "search", "structure", tiny, *words, "--merge", "--seed-from", "given.json", "--run-dir", "run", "--json"
    )
    assert done.code == 0, done.err
    result, winner = result_of(Path("run")), read_shape("run/export/shape.json")
    (given,) = (row for row in result["baselines"] if row["name"] == "given")
    assert given["shape"] == [[2, 2, 48], [0, -1, -1]]
    named = {row["name"]: row["shape"] for row in result["baselines"]}
    assert named["shortgpt method"] in ([[2, 2, 48], [0, 0, 0]], [[0, 0, 0], [2, 2, 48]])
    assert all(0 < block[2] < 48 for block in named["comp method"])  # of two blocks none is unprotected
    found = map(spelled_block, map(kept_by, winner.blocks), merging_in(winner))
    assert list(found) == result["best"]["shape"]
    pruned = run("prune", tiny, "--shape", "given.json", "--out", "out", "--json")
    assert (pruned.code, pruned.json["form"], pruned.json["sparsity"]) == (0, "plain", 0.5)
    words = ("--dense", tiny, "--data", story, "--window", 32, "--tokens", 4 * 32, "--json")
    measured = run("eval", "out", *words).json
    assert measured["loss"] == pytest.approx(given["heldout"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("merges", "told"),
    [
        ([{"block": 0, "part": "mlp"}], "the mlp of block 0 cannot be merged into one before: some of it stays"),
        ([{"block": 9, "part": "mlp"}], "give a block, 0 to 1, and its part, attention or mlp"),
        ("all", "a merge of the shape is 'all'"),
    ],
)
def test_merges_that_cannot_be(
    merges: Any, told: str, refused: Callable[..., str], tiny: Path, structured: Path, place: Path
) -> None:
    shape = read_shape(structured / "export/shape.json")
    whole = tuple(widths.whole for widths in shape.widths)
    weights = {**shape.weights, "method": "database+merges", "merges": merges}
    write_shape(replace(shape, blocks=whole, weights=weights), "given.json")
    assert told in refused("prune", tiny, "--shape", "given.json", "--out", "out")


def test_show_as_json(run: Run, structured: Path, tiny: Path) -> None:
    document = run("show", structured, "--json").json
    assert list(document) == SHOWN
    assert (document["kind"], document["state"], document["seed"]) == ("structure", "finished", 1)
    assert document["evaluations"] == 20 >= document["distinct"] > 10
    assert {"shape", "fitness", "heldout"} <= set(document["best"])
    assert set(document["best"]["heldout"]) == set(document["dense"]["heldout"]) == HELDOUT
    names = {"uniform", "dp", "flap", "flap alone", "wanda-sp", "wanda-sp alone"}
    assert {row["name"] for row in document["baselines"]} == names
    for row in document["baselines"]:
        assert (set(row), set(row["heldout"])) == ({"name", "cost", "fitness", "heldout"}, HELDOUT)
    text = json.dumps([document[name] for name in ("best", "front", "baselines", "dense")])
    assert str(structured) not in text and str(tiny) not in text


@pytest.mark.parametrize("width", [80, 120])
def test_show_for_people(width: int, run: Run, structured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = run("show", structured)
    assert (done.code, done.err) == (0, "")
    table, _, rest = done.out.partition("\nfitness ")
    assert max(len(line.rstrip()) for line in table.splitlines()) <= width
    losses = [float(loss) for loss in re.findall(r"\d\.\d\d +(\d+\.\d{4}) ± \d", table)]
    assert losses == sorted(losses) and len(losses) == 9
    for block, (groups, each, neurons) in enumerate(result_of(structured)["best"]["shape"]):
        heads = rf"{groups} of 2 +{groups * each} of 4" if groups else "dropped +dropped"
        assert re.search(rf"\n +{block} +{heads} +{f'{neurons} of 48' if neurons else 'dropped'} *\n", table)
    assert f"evoprune show {structured}" in rest


def test_export(run: Run, structured: Path, place: Path, tmp_path: Path) -> None:
    done = run("export", structured, "--to", "shape.json")
    assert (done.code, done.out) == (0, "shape.json\n")
    assert (place / "shape.json").read_bytes() == (structured / "export" / "shape.json").read_bytes()
    done = run("export", structured, "--to", "mine.py")
    assert done.code == 2 and "cannot export the shape to 'mine.py': the ending must be .json" in done.err
    folder = tmp_path / "run"
    shutil.copytree(structured, folder)
    shape = read_shape("shape.json")
    whole = [widths.whole for widths in shape.widths]
    write_shape(
        Shape(shape.model, shape.fingerprint, tuple(whole), shape.widths, shape.weights, shape.target),
        folder / "export" / "shape.json",
    )
    assert "it was changed" in run("export", folder, "--to", "c.json").err
    assert not (place / "c.json").exists()


def test_an_interrupted_run(
    run: Run, tiny: Path, shapes: Path, place: Path, structured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in a generation, looked at, and continued."""
    asked = iter(range(100))
    search = ("search", "structure", tiny, "--config", shapes, "--executor", "inline", "--seed", 1)
    with monkeypatch.context() as patch:
        patch.setattr("evoprune.search.session.stop_on_signals", lambda: nullcontext(lambda: next(asked, 100) >= 40))
        done = run(*search, "--run-dir", "stopped")
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1].endswith("continue with `evoprune resume stopped`")
    shown = run("show", "stopped", "--json").json
    assert list(shown) == SHOWN
    assert (shown["state"], shown["dense"], shown["baselines"]) == ("interrupted", {"heldout": None}, [])
    assert 4 < shown["evaluations"] < 20
    history = [json.loads(line) for line in (place / "stopped" / "history.jsonl").read_text().splitlines()]
    assert shown["best"]["fitness"] in [line["kl"] for line in history if line["stage"] in (2, "seeds")]
    assert (shown["best"]["heldout"], len(shown["best"]["shape"])) == (None, 2)
    view = run("show", "stopped").out
    assert "evoprune resume stopped" in view and "query heads" in view
    assert re.search(r"by stage +\d+ → \d+ → \d+", view) and re.search(r"from +generation \d+ \(", view)
    assert "query heads" in " ".join(run("runs").out.split()) or run("runs").out == ""
    assert "is not finished" in run("export", "stopped", "--to", "a.json").err
    page = Path(run("report", "stopped").out.strip())
    assert "This run is not finished" in page.read_text()
    assert run("resume", "stopped", "--executor", "inline").code == 0
    assert (place / "stopped" / "history.jsonl").read_bytes() == (structured / "history.jsonl").read_bytes()


def test_the_dashboard_has_a_note_and_the_shape(structured: Path, tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    folder = tmp_path / "run"
    shutil.copytree(structured, folder)
    (folder / "optuna.log").unlink()
    rebuild_board(RunDirectory(folder), None)
    found = study(folder)
    assert len(found.trials) == 20
    note = dashboard.get_note(found)
    assert all(f"| {name} |" in note for name in ("dense", "uniform", "flap", "**evolved winner**"))
    listed = {artifact.filename for artifact in optuna.artifacts.get_all_artifact_meta(found)}
    assert {"shape.json", "shape.svg", "report.html"} <= listed
    assert "![what every block keeps](/artifacts/" in note and "| block | KV groups | query heads | neurons |" in note


def test_the_resolved_configuration_can_be_used_again(run: Run, place: Path) -> None:
    assert "structure" in run("search", "--help").out
    first = run("search", "structure", "--dry-run", "--cost", "flops", "--population", 12)
    assert (first.code, first.err) == (0, "")
    (place / "resolved.yaml").write_text(first.out)
    assert run("search", "structure", "--dry-run", "--config", "resolved.yaml").out == first.out
    document = run("search", "structure", "--dry-run", "--config", "resolved.yaml", "--json").json
    assert document == yaml.safe_load(first.out)
    assert document["target"] == {
        "sparsity": 0.25, "cost": "flops", "batch": 1, "sequence": None, "decode": False, "speedup": None,
        "table": None, "pareto": None, "sparsity_range": None,
        "heads": "both", "serving_safe": False, "step": None, "drop": "parts", "merge": False,
        "accumulation": "expectation", "correction": 0.5,
    }  # fmt: skip
    timed = run("search", "structure", "--dry-run", "--minutes", 5, "--json").json
    assert (timed["evaluations"], timed["minutes"]) == (None, 5.0)


def test_every_option_reaches_the_configuration(run: Run) -> None:
    """An option per key, each with a value that is not the default."""
    given = {
        "revision": "main", "dtype": "bfloat16", "device": "cpu", "data": "a.txt", "calibration": "b.txt",
        "calibration_sequences": 7, "calibration_window": 33, "sparsity": 0.35, "cost": "kv_bytes", "heads": "groups",
        "drop": "none", "step": 3, "accumulation": "dense", "population": 24, "evaluations": 11, "minutes": 2.5,
        "seed": 5, "window": 9, "threads": 2, "seed_from": "a.json", "selection": "training-aware",
        "training_tokens": 777,
    }  # fmt: skip
    flags = {"trust_remote_code": True, "surrogate": True}
    # What is about latency, or a front, contradicts another budget, and what merges what is dropped another `drop`.
    others = {"model", "speedup", "decode", "merge", "pareto", "sparsity_range", "serving_safe"}
    assert given.keys() | flags.keys() | others == STRUCTURE_KEYS.keys()
    assert run("search", "structure", "--merge", "--dry-run", "--json").json["target"]["merge"] is True
    front = run("search", "structure", "--pareto", "flops", "--sparsity-range", 0.2, 0.4, "--dry-run", "--json").json
    found = front["target"]
    assert (found["pareto"], found["sparsity_range"], found["cost"], found["sparsity"]) == (
        "flops", [0.2, 0.4], "flops", 0.3,
    )  # fmt: skip
    timed = run("search", "structure", "--speedup", 2, "--decode", "--dry-run", "--json").json["target"]
    assert (timed["speedup"], timed["decode"], timed["cost"], timed["sparsity"]) == (2.0, True, "latency", None)
    served = run("search", "structure", "--serving-safe", "--dry-run", "--json").json["target"]
    assert (served["serving_safe"], served["heads"]) == (True, "whole")
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--trust-remote-code", "--surrogate"]
    plain = run("search", "structure", "some/model", *words, "--dry-run", "--json").json
    for name, value in (given | flags | {"model": "some/model"}).items():
        resolved: Any = plain
        for part in STRUCTURE_KEYS[name].split("."):
            resolved = resolved[part]
        assert resolved == value, name
    assert STRUCTURE_KEYS.keys() <= signature(evoprune.search_structure).parameters.keys()


def test_the_defaults_in_the_help_are_true(run: Run) -> None:
    text = " ".join(run("search", "structure", "--help").out.replace("│", " ").split())
    plain = StructureSearchConfig()
    for name in ("sparsity", "cost", "heads", "drop", "accumulation", "evaluations", "population", "seed", "window",
                 "selection", "training_tokens",
                 "threads", "dtype", "device", "calibration_sequences", "calibration_window"):  # fmt: skip
        value: Any = plain
        for part in STRUCTURE_KEYS[name].split("."):
            value = getattr(value, part)
        part = text.partition(f"--{name.replace('_', '-')} ")[2].partition(" --")[0]
        assert f"[default: {value}" in part, name


@pytest.mark.usefixtures("without_report")
def test_a_search_in_python(tiny: Path, shapes: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = evoprune.search_structure(
        str(tiny), config=shapes, executor="inline", quiet=True, evaluations=10, sparsity=0.4, heads="groups",
        drop="none", settings={"searcher.seeds": ["flap"]},
    )  # fmt: skip
    assert capfd.readouterr() == ("", "")
    assert (run.kind, run.state, run.config["target"]["heads"]) == ("structure", "finished", "groups")
    assert run.best is not None and run.result is not None
    assert "query heads" in repr(run)
    assert all(each == 2 and groups and neurons for groups, each, neurons in run.best["shape"])
    assert run.table().row_count == 7
    small = evoprune.prune_shape(str(tiny), run.export("winner.json"))
    assert small.parameters == run.best["cost"] + run.result["rest_cost"]
    # What the newest run found is where the next one starts, and says so once and for all.
    again = evoprune.search_structure(
        str(tiny), config=shapes, executor="inline", quiet=True, evaluations=3, sparsity=0.4, seed_from="latest"
    )
    assert again.config["seed_from"] == str(run.path)
    assert [line["origin"] for line in again.history()][1] == "seed:given"
    with pytest.raises(InvalidInput, match="evaluations"):
        evoprune.search_structure(str(tiny), evaluations=0)


def test_unit_criteria_are_listed(run: Run) -> None:
    rows = {row["name"]: row for row in run("list", "unit-criteria", "--json").json}
    assert rows.keys() == set(UNIT_CRITERIA)
    assert (rows["flap"]["compared"], rows["wanda-sp"]["needs"]) == ("over all blocks", ["X_l2"])
    found = [row["name"] for row in run("list", "searchers", "--json").json if row["search"] == "structure"]
    assert found == [StructureSearchConfig().searcher.name]


# Wrong input


def test_options(refused: Callable[..., str], tiny: Path, place: Path, allocated: Path) -> None:
    search = ("search", "structure", tiny)
    assert "is not between 0 and 1" in refused(*search, "--sparsity", 1.5)
    assert "no model 'no/such-model'" in refused("search", "structure", "no/such-model")
    both = refused(*search, "--serving-safe", "--heads", "groups")
    assert "what serves keeps attentions whole: leave out --heads groups, or serving_safe" in both
    assert "no unit criterion or allocator 'flop'; did you mean 'flap'" in refused(
        *search, "--set", "searcher.seeds=[flop]"
    )
    assert "no method 'lako'; did you mean 'laco'" in refused(*search, "--set", "searcher.methods=[lako]")
    assert "a path of merged parts is not rebuilt around: leave out --merge, or path accumulation" in refused(
        *search, "--merge", "--accumulation", "path"
    )
    assert "what is merged has no path refit: leave out --merge, or path-refit selection" in refused(
        *search, "--merge", "--selection", "path-refit"
    )
    assert "searcher.islands: no such option" in refused(*search, "--set", "searcher.islands=2")
    assert "'half' is not one of 'whole', 'groups'" in refused(*search, "--heads", "half")
    assert "give --population 8 or more" in refused(*search, "--population", 4)
    assert "'two-shot' is not one of 'one-shot', 'path-refit', 'training-aware'" in refused(
        *search, "--selection", "two-shot"
    )
    assert "searcher.training.tokens: Input should be greater than" in refused(*search, "--training-tokens", 0)
    assert "add --selection training-aware, or leave them out" in refused(*search, "--training-tokens", 5000)
    assert "searcher.training.learning_rate: Input should be" in refused(
        *search, "--set", "searcher.training.learning_rate=0"
    )
    assert "wants 64 windows, and there are 60" in refused(*search, "--set", "searcher.windows=60")
    assert "searched allocations: a run that searched a structure is needed" in refused(
        *search, "--seed-from", allocated
    )
    assert "no file 'nowhere.json'" in refused(*search, "--seed-from", "nowhere.json")
    file = allocated / "export" / "allocation.json"
    assert "'allocation.json': format" in refused(*search, "--seed-from", file)


def test_what_does_not_fit_leaves_no_run(
    run: Run, tiny: Path, shapes: Path, place: Path, structured: Path, story: Path
) -> None:
    (place / "short.txt").write_text("a few words, and no more\n" * 3)
    save_tiny(place / "wide", intermediate_size=64)
    save_tiny(place / "qwen", "qwen2")
    save_tiny(place / "olmo", "olmo2")
    save_tiny(place / "long", max_position_embeddings=2048)
    file = structured / "export" / "shape.json"
    assert run("prune", tiny, "--shape", file, "--form", "compact", "--no-latency", "--out", "small").code == 0
    before = tree(place)
    for words, said in (
        ((tiny, "--data", "short.txt"), "text too short"),
        ((tiny, "--sparsity", 0.99, "--drop", "none"), "what may go makes up 0."),
        ((tiny, "--step", 40), "give a whole number of at most 24"),
        ((tiny, "--cost", "kv_bytes", "--heads", "whole", "--drop", "none"), "nothing that may go costs any bytes of"),
        (("long", "--cost", "flops", "--sparsity", 0.7), "choose another budget, such as 0.7"),
        ((tiny, "--cost", "flops", "--set", "target.sequence=65"), "is too long: model"),
        (("wide", "--seed-from", file), "48 neurons there and 4 query heads in 2 KV groups and 64 neurons here"),
        (("qwen", "--seed-from", structured), "LlamaForCausalLM and not this Qwen2ForCausalLM: the classes differ"),
        (("small",), "model 'small' is cut already: give the dense model"),
        (("olmo",), "q_norm.weight [32] beside its matrices: it cannot be cut"),
    ):
        done = run("search", "structure", *words, "--config", shapes, "--executor", "inline")
        assert (done.code, done.out) == (2, ""), done
        last = done.err.splitlines()[-1]
        assert last.startswith("error: ") and said in last, last
        assert "building the structured database" not in done.err
        assert tree(place) == before
