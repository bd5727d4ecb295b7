"""Allocation searches under a compressor that changes weights, from the command line: what is said and refused."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from evoprune.metrics.allocation_file import read_allocation
from tests.door.conftest import Run

pytestmark = pytest.mark.usefixtures("without_report")


def test_a_search_and_the_command_that_it_prints(
    run: Run, tiny: Path, story: Path, levels: Path, place: Path, refused: Callable[..., str]
) -> None:
    words = ("--config", levels, "--compressor", "sparsegpt", "--metric", "magnitude", "--executor", "inline")
    done = run("search", "allocation", tiny, *words)
    assert done.code == 0, done.err
    assert "sparsegpt chooses by itself what goes: only allocators read --metric" in done.err
    assert "building the level database: 17 levels of every matrix by sparsegpt, 1 MiB in the cache" in done.err
    assert re.search(r"^its levels took [\d.e-]+ s$", done.err, re.MULTILINE)
    assert "60% sparsity by sparsegpt" in " ".join(done.err.split())
    folder = Path(done.out.strip())
    (command,) = [line for line in done.err.splitlines() if line.startswith("prune ")]
    assert "--compressor sparsegpt" in command and "--metric" not in command
    pruned = run(*shlex.split(command.partition("evoprune ")[2].replace("DIR", "out")), "--json")
    assert (pruned.code, pruned.json["compressor"], pruned.json["criterion"]) == (0, "sparsegpt", None)
    best = json.loads((folder / "result.json").read_text())["best"]
    assert pruned.json["removed"] == best["removed"]
    words = ("eval", "out", "--dense", tiny, "--data", story, "--window", 32, "--tokens", 4 * 32, "--json")
    assert run(*words).json["loss"] == pytest.approx(best["heldout"]["loss"], rel=1e-6)

    # The file says which compressor it was searched for; another one may be given.
    file = folder / "export" / "allocation.json"
    calibration = shlex.split(command.partition("DIR")[2])
    from_file = run("prune", tiny, "--allocation", file, "--out", "again", *calibration, "--json").json
    assert {**from_file, "out": ""} == {**pruned.json, "out": ""}
    masked = run("prune", tiny, "--allocation", file, "--compressor", "mask", "--out", "masked", *calibration)
    assert "the allocation was searched for sparsegpt, and its matrices now lose weights by mask" in masked.err
    document = json.loads(file.read_text())
    for changed, said in (
        ({"compressor": "shrink"}, "no compressor 'shrink'"),
        ({"compressor": 3}, "no compressor '3'"),
        ({"compressor": "sparsegpt", "threads": 0}, "searched with '0' threads"),
    ):
        (place / "changed.json").write_text(json.dumps({**document, "parameters": changed}))
        assert said in refused("prune", tiny, "--allocation", "changed.json", "--out", "never")
    assert read_allocation(file).sparsity == 0.6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spelled", "criterion"), [("obq:bits=3", "wanda"), ("armor:rounds=2", None), ("block:height=8,width=8", None)]
)
def test_a_compressor_with_parameters(
    spelled: str, criterion: str | None, run: Run, tiny: Path, story: Path, levels: Path
) -> None:
    words = ("--config", levels, "--compressor", spelled, "--executor", "inline")
    done = run("search", "allocation", tiny, *words)
    assert done.code == 0, done.err
    (command,) = [line for line in done.err.splitlines() if line.startswith("prune ")]
    assert f"--compressor {spelled}" in command and ("--metric wanda" in command) == (criterion is not None)
    pruned = run(*shlex.split(command.partition("evoprune ")[2].replace("DIR", "out")), "--json").json
    best = json.loads((Path(done.out.strip()) / "result.json").read_text())["best"]
    assert (pruned["compressor"], pruned["criterion"]) == (spelled, criterion)
    assert pruned["removed"] == best["removed"]
    # Wrappers that are kept apart multiply in another order than the product that was measured.
    words = ("eval", "out", "--data", story, "--window", 32, "--tokens", 4 * 32, "--json")
    assert run(*words).json["loss"] == pytest.approx(best["heldout"]["loss"], rel=1e-5)


def test_what_cannot_be_is_refused(refused: Callable[..., str], tiny: Path) -> None:
    search = ("search", "allocation", tiny, "--compressor")
    assert "no compressor 'sparsgpt'; did you mean 'sparsegpt'" in refused(*search, "sparsgpt")
    assert "scap removes no weights, so there is nothing to allocate" in refused(*search, "scap")
    for grid, said in (
        ("3", "3 levels are out of range: give from 4 to 128"),
        ("300", "300 levels are out of range"),
        ("[0, 128]", "[0, 128] is no grid: give levels from 1 to 255"),
        ("[128, 256]", "[128, 256] is no grid"),
        ("[128, 64]", "ascending order"),
        ("[]", "[] is no grid"),
        ("[0.5]", "target.grid"),
        ("many", "target.grid"),
    ):
        assert said in refused(*search, "sparsegpt", "--set", f"target.grid={grid}")
    assert "leave out target.grid" in refused(*search, "mask", "--set", "target.grid=8")
    assert "nothing for sparsegpt to compress" in refused(*search, "sparsegpt", "--drop", "parts", "--drop-only")
    assert "a formula asks for levels that are not stored" in refused(*search, "sparsegpt", "--searcher", "formula")


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("block:height=5", "cannot compress model.layers.0.self_attn.q_proj: blocks of 5 × 16 do not divide"),
        ("armor:block=12", "cannot compress model.layers.0.self_attn.q_proj: wrappers in blocks of 12 do not fit"),
    ],
)
def test_a_model_that_a_compressor_cannot_have_is_refused_before_statistics(
    spelled: str, said: str, run: Run, tiny: Path, levels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collected(*given: object, **options: object) -> None:
        raise AssertionError("statistics were collected")

    monkeypatch.setattr("evoprune.fitness.prepare.statistics_for", collected)
    monkeypatch.setattr("evoprune.calibration.statistics_for", collected)
    words = ("--compressor", spelled)
    done = run("search", "allocation", tiny, "--config", levels, *words, "--executor", "inline")
    assert (done.code, done.err.strip().count("Traceback")) == (2, 0)
    assert said in done.err.splitlines()[-1]
    pruned = run("prune", tiny, "--out", "out", *words, "--sparsity", 0.5)
    assert pruned.code == 2 and said in pruned.err.splitlines()[-1]
    allocated = run("prune", tiny, "--out", "out", *words, "--allocation", "owl")
    assert allocated.code == 2 and said in allocated.err.splitlines()[-1]


def test_a_metric_has_to_have_a_say(run: Run, refused: Callable[..., str], tiny: Path) -> None:
    for kind in ("metric", "joint"):
        search = ("search", kind, tiny, "--compressor")
        assert "no compressor 'refitt'; did you mean 'refit'" in refused(*search, "refitt")
        assert "steps 0 is outside [1, 10000]" in refused(*search, "refit:steps=0")
        assert "scap removes no weights, so there is nothing for a metric to say" in refused(*search, "scap")
        said = refused(*search, "sparsegpt:bits=4")
        assert "sparsegpt:bits=4 chooses by itself what goes and reads no metric: give one that does (awp, " in said
        assert (
            "or search how much each matrix loses, `evoprune search allocation --compressor sparsegpt:bits=4`" in said
        )
        done = run(*search, "refit:steps=10", "--dry-run")
        assert (done.code, "compressor: refit:steps=10" in done.out) == (0, True)
    formulas = ("--set", "allocation.searcher.name=formula")
    assert "a formula asks for levels" in refused("search", "joint", tiny, "--compressor", "refit", *formulas)


def test_a_grid_that_the_budget_is_beyond(run: Run, tiny: Path, levels: Path) -> None:
    words = ("--config", levels, "--compressor", "sparsegpt", "--set", "target.grid=[64,96]", "--executor", "inline")
    done = run("search", "allocation", tiny, *words)
    assert done.code == 2
    assert "weights cannot go: the matrices can lose" in done.err.splitlines()[-1]
