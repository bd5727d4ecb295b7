"""Wrong input: exit code 2, one line on stderr that says what to do, nothing on stdout, nothing left behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import MetricExport
from tests.door.conftest import Run, tree
from tests.models import save_tiny
from tests.resealed import rehashed, resealed

HOSTILE = (
    "__import__('os').system('touch hacked')",
    "().__class__.__bases__[0].__subclasses__()",
    "mul(W,open('hacked','w'))",
    "eval(abs(W))",
    "(lambda: W)()",
    "W.__class__",
    "[W for W in X_l2]",
)


RUN = '{"run": "x", "kind": "metric", "created": "2026-01-01T00:00:00+00:00"}'

# Models


def test_unknown_model(refused: Callable[..., str]) -> None:
    for command in (["eval"], ["stats"], ["prune", "--out", "out"], ["search", "metric"]):
        assert "no model 'no/such-model'" in refused(*command, "no/such-model")
        assert "no model './nowhere'" in refused(*command, "./nowhere")


def test_folder_without_a_config(refused: Callable[..., str], place: Path) -> None:
    (place / "empty").mkdir()
    for command in (["eval"], ["prune", "--out", "out"]):
        assert "has no config.json" in refused(*command, "empty")


def test_weights_as_a_pickle_only(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    folder = save_tiny(place / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for command in (["eval"], ["prune", "--out", "out"]):
        assert "as a pickle only" in refused(*command, folder)


def test_unknown_family(refused: Callable[..., str], place: Path) -> None:
    folder = save_tiny(place / "strange")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    assert "knows no model family 'strange'" in refused("eval", folder)


def test_damaged_checkpoints(refused: Callable[..., str], tiny: Path, place: Path, small: Path) -> None:
    """Each is refused in one line, by a search too, before it makes a run's folder."""
    weights = load_file(tiny / "model.safetensors")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny, place / name))

    cut = copy("cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    shards = copy("shards")
    (shards / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    mute = copy("mute")
    (mute / "tokenizer.json").unlink()
    empty = copy("empty-stack")
    config = json.loads((empty / "config.json").read_text())
    (empty / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    for folder, said in (
        (cut, "cannot be read: model.safetensors"),
        (shards, "which model.safetensors.index.json lists, is missing"),
        (mute, "has no tokenizer"),
        (empty, "nothing to prune: model.layers is empty"),
    ):
        search = ("search", "metric", folder, "--config", small, "--executor", "inline")
        for command in (("eval", folder), ("stats", folder), ("prune", folder, "--out", "out"), search):
            assert said in refused(*command)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_numbers(value: float, refused: Callable[..., str], tiny: Path, place: Path) -> None:
    folder = Path(shutil.copytree(tiny, place / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for command in (("eval", folder), ("stats", folder), ("prune", folder, "--out", "out", "--metric", "magnitude")):
        assert "model.layers.1.mlp.up_proj.weight holds a NaN or an infinity" in refused(*command)


def test_a_search_on_a_bad_model_leaves_no_run(run: Run, place: Path, small: Path) -> None:
    (place / "empty").mkdir()
    before = tree(place)
    done = run("search", "metric", "empty", "--config", small, "--executor", "inline")
    assert (done.code, done.out) == (2, "")
    assert "has no config.json" in done.err.splitlines()[-1]
    assert tree(place) == before
    (place / "mine").mkdir()
    assert run("search", "metric", "empty", "--config", small, "--executor", "inline", "--run-dir", "mine").code == 2
    assert tree(place) == before | {"mine"}


def test_a_search_says_which_windows_a_model_can_read(run: Run, tiny: Path) -> None:
    done = run("search", "metric", tiny, "--executor", "inline", "--calibration-window", 32)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].endswith("at most 64: give --set data.window=64 --calibration-window 32")


# Text


def test_text(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    (place / "short.txt").write_text("a few words, and no more\n" * 3)
    assert "text too short" in refused("eval", tiny, "--data", "short.txt")
    assert "text too short" in refused("prune", tiny, "--calibration", "short.txt", "--out", "out")
    assert "no text './nowhere.txt'" in refused("eval", tiny, "--data", "./nowhere.txt")
    assert "no text './nowhere.txt'" in refused("search", "metric", tiny, "--data", "./nowhere.txt")
    assert "reads at most 64 tokens" in refused("eval", tiny, "--window", 128)
    assert "do not fill one window" in refused("eval", tiny, "--tokens", 3)


def test_files_that_hold_no_text(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    noise = bytes(range(256)) * 20
    for name, content, said in (
        ("empty.jsonl", b"", "text too short"),
        ("blank.jsonl", b"\n\n \n", "text too short"),
        ("other.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 is no JSON object"),
        ("noise.jsonl", noise, "is damaged"),
        ("noise.jsonl.gz", noise, "cannot be read"),
        ("noise.parquet", noise, "is no Parquet file"),
        ("noise", noise, "is no text that evoprune reads"),
        ("noise.zip", b"PK\3\4" + noise, "is no text that evoprune reads"),
    ):
        (place / name).write_bytes(content)
        assert said in refused("eval", tiny, "--data", name)
    (place / "none").mkdir()
    assert "holds no text" in refused("eval", tiny, "--data", "none")
    table = pytest.importorskip("pyarrow").table
    write = pytest.importorskip("pyarrow.parquet").write_table
    write(table({"words": ["a"]}), place / "words.parquet")
    assert "has no column 'text', only words" in refused("eval", tiny, "--data", "words.parquet")


def test_a_search_on_a_short_text_leaves_no_run(run: Run, place: Path, tiny: Path, small: Path) -> None:
    (place / "short.txt").write_text("a few words, and no more\n" * 3)
    before = tree(place)
    done = run("search", "metric", tiny, "--config", small, "--executor", "inline", "--data", "short.txt")
    assert (done.code, done.out) == (2, "")
    assert "text too short" in done.err.splitlines()[-1]
    assert tree(place) == before


# Target


@pytest.mark.parametrize("sparsity", ["0", "1", "-1", "nan", "inf", "60"])
def test_sparsity(sparsity: str, refused: Callable[..., str], tiny: Path) -> None:
    for command in (["search", "metric", tiny], ["prune", tiny, "--out", "out"]):
        assert "is not between 0 and 1" in refused(*command, "--sparsity", sparsity)
        assert "is not between 0 and 1" in refused(*command, f"--sparsity={sparsity}")


def test_pattern(refused: Callable[..., str], tiny: Path) -> None:
    for command in (["search", "metric", tiny], ["prune", tiny, "--out", "out"]):
        for pattern in ("4:2", "0:4", "2", "2:4:8", "a:b"):
            assert f"pattern {pattern!r} is not N:M" in refused(*command, "--pattern", pattern)
        assert "not both" in refused(*command, "--pattern", "2:4", "--sparsity", 0.5)
    assert "but model.layers.0.self_attn.q_proj has 32 inputs" in refused(
        "prune", tiny, "--out", "out", "--pattern", "2:3"
    )


def test_a_search_for_a_pattern_that_does_not_fit(run: Run, place: Path, tiny: Path, small: Path) -> None:
    done = run("search", "metric", tiny, "--config", small, "--executor", "inline", "--pattern", "2:3")
    assert (done.code, done.out) == (2, "")
    assert "2:3 needs a width that 3 divides" in done.err.splitlines()[-1]
    assert tree(place) == set()


# Metrics


def test_metric_names(refused: Callable[..., str], tiny: Path) -> None:
    prune = ("prune", tiny, "--out", "out", "--metric")
    assert "no criterion 'wnada'; did you mean 'wanda'" in refused(*prune, "wnada")
    assert "no terminal 'X_l3'" in refused(*prune, "mul(abs(W),X_l3)")
    assert "no operator 'mull'; did you mean 'mul'" in refused(*prune, "mull(abs(W),X_l2)")
    assert "takes 2 arguments" in refused(*prune, "mul(W)")
    assert "no compressor 'shrink'" in refused("prune", tiny, "--out", "out", "--compressor", "shrink")
    assert "no file 'nowhere.json'" in refused(*prune, "nowhere.json")
    sparsegpt = ("prune", tiny, "--out", "out", "--compressor", "sparsegpt")
    assert "chooses by itself what goes: leave out the group 'global'" in refused(*sparsegpt, "--group", "global")
    assert "needs a width that 5 divides" in refused(*sparsegpt, "--pattern", "2:5")
    other = ("prune", tiny, "--out", "out", "--compressor")
    assert "bits 9 is outside [2, 8]" in refused(*other, "obq:bits=9")
    assert "'bits' of compressor 'obq:bits' is not KEY=VALUE" in refused(*other, "obq:bits")
    replay = ("prune", tiny, "--out", "out", "--accumulation", "path")
    assert "'scap' goes from block to block by itself" in refused(*replay, "--compressor", "scap")
    assert "compares the scores of all blocks before the first" in refused(*replay, "--group", "global")
    assert "leave out --accumulation" in refused(*replay, "--method", "shortgpt")
    assert "leave out the group 'global', or give row, or give layer" in refused(*other, "obs", "--group", "global")


def test_huge_and_deep_expressions(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    prune = ("prune", tiny, "--out", "out", "--metric")
    assert "of 100008 characters" in refused(*prune, f"abs(W)+{'W' * 100_001}")
    assert "100000" in refused(*prune, "abs(W)".ljust(100_000, "x"))
    assert "nested" in refused(*prune, "abs(" * 100 + "W" + ")" * 100)
    refused(*prune, "(" * 500 + "W" + ")" * 500)
    (place / "deep.json").write_text('{"format":' * 20_000 + "1" + "}" * 20_000)
    refused(*prune, "deep.json")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_that_would_be_code(text: str, refused: Callable[..., str], tiny: Path, place: Path) -> None:
    prune = ("prune", tiny, "--out", "out", "--metric")
    refused(*prune, text)
    # With a seal of its own, a file is refused for what it says and not for having been edited.
    wanda = CRITERIA["wanda"]
    assert isinstance(wanda, Metric)
    export = MetricExport(wanda)
    formula = f'FORMULA = "{wanda.expression.text}"'
    assert export.python_text.count(formula) == 1
    (place / "bad.py").write_text(resealed(export.python_text.replace(formula, f"FORMULA = {text!r}")))
    (place / "code.py").write_text(resealed(export.python_text.replace(formula, f"FORMULA = {text}")))
    for name, expr in (("text", text), ("operator", [text, "W"]), ("argument", ["mul", "W", text])):
        (place / f"{name}.json").write_text(rehashed({**export.document, "expr": expr}))
    for name in ("bad.py", "code.py", "text.json", "operator.json", "argument.json"):
        said = refused(*prune, name)
        assert "was edited" not in said and "not known" not in said and "dialect" not in said
    assert not (place / "hacked").exists()


def test_code_beside_a_formula_never_runs(run: Run, tiny: Path, place: Path) -> None:
    """Only the formula of a file is read; what else is in it changes nothing."""
    wanda = CRITERIA["wanda"]
    assert isinstance(wanda, Metric)
    code = "".join(f"{text}\n" for text in HOSTILE)
    (place / "metric.py").write_text(resealed(MetricExport(wanda).python_text + code))
    assert run("prune", tiny, "--out", "out", "--metric", "metric.py").code == 0
    assert not (place / "hacked").exists()


def test_tampered_exports(refused: Callable[..., str], run: Run, tiny: Path, place: Path) -> None:
    wanda = CRITERIA["wanda"]
    assert isinstance(wanda, Metric)
    export = MetricExport(wanda)
    for suffix in (".py", ".json"):
        path = place / f"metric{suffix}"
        export.write(path)
        assert run("stats", tiny, "--metric", path).code == 0
        path.write_text(path.read_text().replace("X_l2", "X_l1"))
        assert "was edited" in refused("prune", tiny, "--out", "out", "--metric", path)
        assert "was edited" in refused("search", "metric", tiny, "--seed-from", path)


# Runs


def test_folders_that_are_no_run(refused: Callable[..., str], place: Path) -> None:
    (place / "other").mkdir()
    for command in (["show"], ["resume"], ["report"], ["dashboard"], ["export", "--to", "m.py"]):
        assert "is not a run folder" in refused(*command, "other")
        assert "no run 'nowhere'" in refused(*command, "nowhere")
        assert "no run in runs yet" in refused(*command)
    (place / "other" / "run.json").write_text("[]")
    assert "is not a run folder" in refused("show", "other")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"run.json": "{"}, "is not a run folder"),
        ({"run.json": '{"run": "x"}'}, "is not a run folder"),
        ({"run.json": RUN}, "config.yaml cannot be read"),
        ({"run.json": RUN, "config.yaml": "- 1"}, "config.yaml cannot be read"),
        ({"run.json": RUN, "config.yaml": "[" * 1200}, "config.yaml cannot be read"),
        ({"run.json": RUN, "config.yaml": "seed: 1", "result.json": "{}"}, "result.json is damaged"),
        ({"run.json": RUN, "config.yaml": "seed: 1", "result.json": "[1]"}, "result.json is damaged"),
    ],
)
def test_damaged_run_folders(files: dict[str, str], said: str, refused: Callable[..., str], place: Path) -> None:
    (place / "run").mkdir()
    for name, text in files.items():
        (place / "run" / name).write_text(text)
    for command in (["show", "run"], ["show", "run", "--json"]):
        assert said in refused(*command)
    for command in (["resume", "run"], ["report", "run"], ["export", "run", "--to", "m.py"]):
        refused(*command)


def test_a_run_from_before_an_option_existed_is_shown(run: Callable[..., Any], place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "run.json").write_text(RUN)
    (place / "run" / "config.yaml").write_text("seed: 1")
    done = run("show", "run")
    assert done.code == 0
    assert "reference, seed 1" in done.out


# Names


def test_names_that_lead_nowhere(refused: Callable[..., str], tiny: Path, place: Path, small: Path) -> None:
    for name in ("loop", "loop.json", "loop.txt", "loop.yaml"):
        (place / name).symlink_to(name)
    search, prune = ("search", "metric", tiny, "--config", small), ("prune", tiny, "--out")
    for stem in ("loop", "x" * 300, "~nobody-of-this-name/x"):
        for command in (
            ("eval", stem),
            ("eval", tiny, "--data", f"{stem}.txt"),
            ("show", stem),
            ("resume", stem),
            (*prune, stem),
            (*prune, f"{stem}/out"),
            (*prune, "out", "--metric", f"{stem}.json"),
            (*search, "--seed-from", f"{stem}.json"),
            ("search", "metric", tiny, "--config", f"{stem}.yaml"),
        ):
            refused(*command)
        if not stem.startswith("~"):
            refused(*search, "--run-dir", stem)


# Options of a search


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\tseed: 1", "is not a YAML file"),
        ("data:\n\twindow: 32", "is not a YAML file"),
        ("[" * 1200, "is not a YAML file"),
        ("!!python/object/apply:os.system ['touch hacked']", "is not a YAML file"),
        ("\0", "is not a YAML file"),
        ("- 1", "does not hold options by name"),
        ("1: 2", "1: "),
        ("data: 3", "data: "),
        ("seed: 2020-01-01", "seed: "),
        ("evaluations: .inf", "evaluations: "),
        ("minutes: .inf", "minutes: "),
        (f"seed: {10**30}", "seed: "),
        ("target: {sparsity: .nan}", "is not between 0 and 1"),
        ("racing: {rungs: [4, 2]}", "rungs are numbers of windows that increase"),
        ("searcher: {simplify: none}", "searcher.simplify: "),
        ("kind: policy", "kind: "),
        ("kind: allocation", "kind: these are options of another search, 'allocation': this one is 'metric'"),
    ],
)
def test_configuration_files(text: str, said: str, refused: Callable[..., str], tiny: Path, place: Path) -> None:
    (place / "bad.yaml").write_text(text)
    assert said in refused("search", "metric", tiny, "--config", "bad.yaml")
    assert not (place / "hacked").exists()


def test_numbers_that_cannot_be(refused: Callable[..., str], tiny: Path, small: Path) -> None:
    search = ("search", "metric", tiny, "--config", small, "--executor", "inline")
    for option, value in (
        ("--workers", 0), ("--workers", -1), ("--gpus-per-worker", "nan"), ("--gpus-per-worker", -1),
        ("--minutes", "inf"), ("--minutes", "nan"), ("--seed", 10**30), ("--seed", -1), ("--threads", 0),
        ("--population", 3), ("--window", 0),
    ):  # fmt: skip
        refused(*search, option, value)
    refused(*search, "--set", "seed=" + "[" * 1200)
    assert "seed 1000" in refused("prune", tiny, "--out", "out", "--seed", 10**30)
    assert "--statistics names none" in refused("stats", tiny, "--statistics", "")


def test_options_of_a_search(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    search = ("search", "metric", tiny)
    assert "no searcher 'evolutoin'; did you mean 'evolution'" in refused(*search, "--searcher", "evolutoin")
    assert "no racing rule 'halfing'; did you mean 'halving'" in refused(*search, "--set", "racing.rule=halfing")
    assert "no objective 'kll'" in refused(*search, "--objective", "kll")
    assert "searcher.popluation: no such option" in refused(*search, "--set", "searcher.popluation=8")
    assert "is not of the form key.sub=value" in refused(*search, "--set", "searcher")
    assert "evaluations: " in refused(*search, "--evaluations", 0)
    assert "minutes: " in refused(*search, "--minutes", -1)
    assert "cannot read nowhere.yaml" in refused(*search, "--config", "nowhere.yaml")
    assert "is not a database URL" in refused(*search, "--storage", "nonsense")
    assert "no criterion 'wnada'" in refused(*search, "--set", "searcher.seeds=[wnada]")
    (place / "full").mkdir()
    (place / "full" / "mine.txt").write_text("mine")
    assert "full is not empty" in refused(*search, "--run-dir", "full")


# Disks


def test_places_that_cannot_be_written(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    (place / "file").write_text("mine")
    assert "cannot write file/out" in refused("prune", tiny, "--out", "file/out")
    assert "cannot write file" in refused("prune", tiny, "--out", "file")
    for here in (".", "../work", Path.cwd()):
        assert "is the current folder" in refused("prune", tiny, "--out", here)
    assert "cannot write file/run" in refused("search", "metric", tiny, "--run-dir", "file/run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    (place / "locked").mkdir(mode=0o500)
    assert "locked is read-only" in refused("prune", tiny, "--out", "locked/out")
    assert "cannot write locked/run" in refused("search", "metric", tiny, "--run-dir", "locked/run")


def test_a_read_only_folder(refused: Callable[..., str], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `os.access` tells it, root or not."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "is read-only; give a folder that can be written" in refused("prune", tiny, "--out", "out")


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system refuses to write on, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_do_not_fit(
    run: Run, tiny: Path, place: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real writes that fail, in the middle of a checkpoint, of statistics, and of what a search prepares."""
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cold"))
    calibration = ("--calibration-window", 32, "--calibration-sequences", 4)
    for size, command in (
        (50_000, ("prune", tiny, "--out", "out", "--metric", "magnitude")),
        (3_000, ("prune", tiny, "--out", "out", *calibration)),
        (3_000, ("stats", tiny, "--statistics", "G_l2", *calibration)),
        (3_000, ("search", "metric", tiny, "--config", small, "--executor", "inline")),
        (100, ("search", "metric", tiny, "--config", small, "--executor", "inline")),
    ):
        with full_after(size):
            done = run(*command)
        assert (done.code, done.out) == (2, ""), done
        last = done.err.splitlines()[-1]
        assert last.startswith("error: cannot write ") and "file too large" in last.lower()
        assert tree(place) == set()
        # What is whole may stay; what is being written has a name that begins with a dot.
        assert not [path for path in (tmp_path / "cold").rglob("*") if path.name.startswith(".")]


@pytest.mark.slow
def test_a_disk_that_fills_during_a_search(
    run: Run, tiny: Path, place: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evoprune.sessions.write_report", lambda run: None)
    search = ("search", "metric", tiny, "--config", small, "--executor", "inline", "--run-dir")
    assert run(*search, "whole").code == 0
    history = (place / "whole" / "history.jsonl").read_bytes()
    with full_after((place / "whole" / "evaluations.wal").stat().st_size // 2):
        done = run(*search, "cut")
    assert (done.code, done.out) == (2, ""), done
    last = done.err.splitlines()[-1]
    assert "cannot write" in last and last.endswith("then continue with `evoprune resume cut`")
    assert not [path for path in tree(place / "cut") if path.endswith(".part")]
    assert run("resume", "cut", "--executor", "inline").code == 0
    assert (place / "cut" / "history.jsonl").read_bytes() == history


def test_a_full_disk(run: Run, tiny: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run("prune", tiny, "--out", "warm")
    before = tree(place)
    with monkeypatch.context() as patch:
        patch.setattr("evoprune.fitness.checkpoint.write_atomically", full)
        done = run("prune", tiny, "--out", "out")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith("error: cannot write") and "No space left" in done.err
    assert tree(place) == before


def test_as_a_process(tiny: Path, place: Path) -> None:
    """The same through the installed entry point: nothing of a traceback, and the exit code of the process."""
    words = ["-m", "evoprune", "prune", str(tiny), "--out", "out", "--metric", "__import__('os').getcwd()"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert tree(place) == set()
