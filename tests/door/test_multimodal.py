"""Images with texts through the door: loaded, measured, pruned, written, loaded by plain transformers, refused."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import evoprune
from evoprune.fitness.adapters import list_sites
from evoprune.fitness.examples import encode_examples, read_examples, side_examples
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import removed_count
from tests.door.conftest import Done, Run
from tests.multimodal import (
    FAMILIES,
    IMAGE,
    encoded,
    multimodal_tokenizer,
    save_llava,
    synthetic_image,
    tiny_multimodal,
)

ROWS = 9


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(autouse=True)
def images(place: Path) -> Path:
    """Nine rows of images and texts, one of them text alone."""
    rows = []
    for number in range(ROWS):
        synthetic_image(number).save(place / f"{number}.png")
        rows.append({"image": f"{number}.png" if number else None, "text": f"noise number {number}"})
    file = place / "images.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_from_images_to_a_checkpoint_that_transformers_loads(run: Run, llava: Path, place: Path) -> None:
    """TAMP whole: allocation by modality, norms of chosen tokens; what is not pruned stays bit for bit (7.9, 7.11)."""
    words = ("--calibration", "images.jsonl", "--tokens", "amia", "--allocation", "das", "--allocation-set", "omega=1")
    done: Done = run("prune", llava, "--out", "out", "--sparsity", 0.5, *words, "--json")
    assert done.code == 0, done.err
    document = done.json
    assert document["removed"] == removed_count(0.5, document["prunable"])
    assert len({layer["sparsity"] for layer in document["layers"]}) > 3
    before = AutoModelForImageTextToText.from_pretrained(llava)
    after = AutoModelForImageTextToText.from_pretrained(place / "out")
    pruned = {f"{layer['name']}.weight": layer for layer in document["layers"]}
    assert all(name.startswith("model.language_model.layers.") for name in pruned)
    for name, weight in after.state_dict().items():
        old = before.state_dict()[name]
        if name not in pruned:
            assert torch.equal(weight, old), name
            continue
        zeros = (weight == 0).float().mean().item()
        assert zeros == pytest.approx(pruned[name]["sparsity"], abs=1e-6)
        assert torch.equal(weight[weight != 0], old[weight != 0])
        per_row = (weight == 0).sum(1)
        assert bool((per_row == per_row[0]).all())
    recipe = json.loads((place / "out" / "evoprune.json").read_text())["recipe"]
    assert recipe["calibration"]["tokens"]["knn"] == 3
    processor = AutoProcessor.from_pretrained(place / "out")
    again = processor(text="<image>\nnoise", images=synthetic_image(0), return_tensors="pt")
    assert torch.isfinite(after(**again).logits).all()
    assert "AutoModelForImageTextToText" in (place / "out" / "README.md").read_text()


def test_logits_of_what_was_saved(llava: Path, place: Path) -> None:
    loaded = evoprune.load_model(str(llava), components="all")
    pruned = evoprune.prune(loaded, metric="magnitude", sparsity=0.5, out=place / "out")
    batch = encoded("llava", (0,))
    reloaded = evoprune.load_model(str(place / "out"), components="all")
    assert torch.equal(reloaded.model(**batch).logits, pruned.language_model.model(**batch).logits)
    assert [bound.site for bound in reloaded.sites] == [bound.site for bound in list_sites(loaded.model, ("all",))]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llava"])
def test_every_family_is_saved_and_loaded(family: str, place: Path) -> None:
    """On disk names differ from those in memory; zeros and logits are the same."""
    tiny_multimodal(family).save_pretrained(place / "dense")
    multimodal_tokenizer().save_pretrained(place / "dense")
    pruned = evoprune.prune(str(place / "dense"), metric="magnitude", components="all", out=place / "out")
    after = AutoModelForImageTextToText.from_pretrained(place / "out")
    batch = encoded(family, (0,))
    assert torch.equal(after(**batch).logits, pruned.language_model.model(**batch).logits)
    for layer in pruned.layers:
        assert layer.removed == int((after.get_submodule(layer.name).weight == 0).sum()) > 0
    with pytest.raises(InvalidInput, match=r"the processor of .* cannot be read"):
        evoprune.collect_statistics(pruned.language_model, ["X_l2"], calibration=str(place / "images.jsonl"))


def test_components_with_budgets_of_their_own(run: Run, llava: Path) -> None:
    budgets = ("--budget", "vision_tower=0.25", "--budget", "*.self_attn.*=0.5")
    words = ("--components", "all", "--calibration", "images.jsonl", "--json")
    layers = run("prune", llava, "--out", "out", *budgets, *words).json["layers"]
    for layer in layers:
        vision = "vision_tower" in layer["name"]
        attention = "self_attn" in layer["name"] and not vision
        # One column of 16 is the least that a row of the tower can lose.
        assert layer["sparsity"] == pytest.approx(0.25 if vision else 0.5 if attention else 0, abs=1 / 16)
    tower = [layer for layer in layers if "vision_tower" in layer["name"]]
    sizes = [layer["shape"][0] * layer["shape"][1] for layer in tower]
    removed = sum(layer["sparsity"] * size for layer, size in zip(tower, sizes, strict=True))
    assert removed / sum(sizes) == pytest.approx(0.25, abs=1e-4)


def test_a_sparsity_beside_budgets_falls_on_the_rest(llava: Path) -> None:
    found = evoprune.allocate(str(llava), "uniform", 0.5, budgets={"vision_tower": 0.1}, components="all")
    # To the nearest column of the matrices that make up the rest.
    assert abs(found.removed - removed_count(0.5, found.weights)) < 16
    shares = {site.name: site.sparsity for site in found.sites}
    assert all(share < 0.2 for name, share in shares.items() if "vision" in name)
    assert all(share > 0.5 for name, share in shares.items() if "vision" not in name)
    assert found.parameters["budgets"] == {"vision_tower": 0.1}
    inside = evoprune.allocate(str(llava), "das", budgets={"*": 0.5}, calibration="images.jsonl")
    assert inside.sparsity == pytest.approx(0.5, abs=1e-3)


def test_statistics_on_the_command_line(run: Run, llava: Path) -> None:
    words = ("--calibration", "images.jsonl", "--statistics", "X_l2", "--json")
    every = run("stats", llava, *words)
    assert every.code == 0, every.err
    assert every.json["sequences"] == ROWS // 3
    chosen = run("stats", llava, "--tokens", "amia", *words).json
    assert chosen["folder"] != every.json["folder"]


@pytest.fixture
def refused(run: Run, llava: Path, place: Path) -> Callable[..., str]:
    """Run `prune` as it must be refused; its one line."""

    def call(*words: object, model: Path = llava) -> str:
        done: Done = run("prune", model, "--out", "out", *words)
        assert (done.code, done.out) == (2, ""), done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert len(done.err) < 500
        assert not (place / "out").exists()
        return done.err

    return call


def test_budgets_that_are_refused(refused: Callable[..., str], tiny: Path) -> None:
    assert "no prunable matrix fits 'vision_tower'; give a component (language_model)" in refused(
        "--budget", "vision_tower=0.5", "--metric", "magnitude"
    )
    assert "--budget 'x' is not GROUP=SPARSITY" in refused("--budget", "x")
    assert "--budget '*=0.2' is not" in refused("--budget", "*=0.1", "--budget", "*=0.2")
    assert "outside [0, 1)" in refused("--budget", "*=1.5", "--metric", "magnitude")
    assert "a pattern fixes the sparsity" in refused("--budget", "*=0.5", "--pattern", "2:4")
    assert "budgets of groups need an allocator" in refused("--budget", "*=0.5", "--allocation", "none.json")
    assert "the groups hold every matrix" in refused(
        "--budget", "*_proj=0.5", "--sparsity", 0.9, "--metric", "magnitude"
    )
    assert "no component 'ears'" in refused("--components", "ears", "--metric", "magnitude")
    assert "no component 'vision_tower'" in refused("--components", "vision_tower", model=tiny)


def test_images_that_are_refused(refused: Callable[..., str], place: Path) -> None:
    def rows(*lines: str) -> tuple[str, str]:
        (place / "bad.jsonl").write_text("\n".join(lines))
        return "--calibration", "bad.jsonl"

    good = '{"image": "1.png", "text": "x"}'
    assert "line 2 of" in refused(*rows(good, '{"image": "1.png"}'))
    assert "no image" in refused(*rows(good, '{"image": "none.png", "text": "x"}'))
    assert "its image is '3', no path" in refused(*rows(good, '{"image": 3, "text": "x"}'))
    (place / "broken.png").write_bytes(b"no image")
    broken = '{"image": "broken.png", "text": "x"}'
    assert "broken.png is no image that can be read" in refused(*rows(broken, broken, broken))
    twice = '{"image": "1.png", "text": "<image> <image>"}'
    assert "the example" in refused(*rows(twice, twice, twice))
    long = json.dumps({"image": "1.png", "text": "x" * 500})
    assert "reads at most 128 tokens" in refused(*rows(long, long, long))
    assert "never ran" in refused("--components", "vision_tower", "--calibration-window", 16)


def test_folders_of_images(place: Path, llava: Path) -> None:
    folder = place / "folder"
    folder.mkdir()
    for number in range(3):
        synthetic_image(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"text {number}\n")
    found = read_examples(str(folder))
    assert [example.text for example in found] == ["text 0", "text 1", "text 2"]
    model = evoprune.load_model(str(llava))
    samples = encode_examples(model, str(folder), "A", count=5, seed=0)
    (batch,) = samples
    assert int((batch.inputs["input_ids"] == IMAGE).sum()) == int((batch.modality == 1).sum()) == 4
    (folder / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "only"}\n')
    assert [(example.image, example.text) for example in read_examples(str(folder))] == [(folder / "2.png", "only")]
    (folder / "metadata.jsonl").unlink()
    (folder / "1.txt").unlink()
    with pytest.raises(InvalidInput, match=r"1\.png in .* has no text: give 1\.txt"):
        read_examples(str(folder))


@pytest.mark.parametrize("n", [3, 4, 9, 60])
def test_sides_are_disjoint_and_whole(n: int, place: Path) -> None:
    row = {"image": "1.png", "text": ""}
    (place / "many.jsonl").write_text("".join(json.dumps(row | {"text": f"t{index}"}) + "\n" for index in range(n)))
    examples = read_examples(str(place / "many.jsonl"))
    sides = [{example.text for example in side_examples(examples, side)} for side in "ABC"]
    assert sum(map(len, sides)) == n == len(set.union(*sides))
    assert all(sides)


# Searching on images

SMALL = (
    "--data", "images.jsonl", "--sparsity", 0.5, "--evaluations", 12, "--executor", "inline",
    "--set", "data.heldout_windows=3",
)  # fmt: skip
STAGES = "searcher.stages=[{windows: 2, survivors: 2}, {windows: 3, survivors: 1}]"
LEVELS = (*SMALL, "--set", "searcher.windows=3", "--set", STAGES)


def result_of(place: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the only run, and its result."""
    (folder,) = (entry for entry in (place / "runs").iterdir() if entry.is_dir())
    return folder, json.loads((folder / "result.json").read_text())


def test_an_allocation_searched_on_images_is_pruned_and_measured_there(run: Run, llava: Path, place: Path) -> None:
    """What the report says of the winner is what `eval` measures of the pruned model, on the same three examples."""
    done = run("search", "allocation", llava, *LEVELS)
    assert done.code == 0, done.err
    folder, result = result_of(place)
    assert result["images"]
    found = folder / "export" / "allocation.json"
    assert len({site["sparsity"] for site in json.loads(found.read_text())["sites"]}) > 1
    words = ("--metric", "wanda", "--calibration", "images.jsonl", "--allocation", found)
    pruned = run("prune", llava, *words, "--out", "out")
    assert pruned.code == 0, pruned.err
    measured = run("eval", "out", "--dense", llava, "--data", "images.jsonl", "--json").json
    assert measured["images"]
    for name in ("loss", "kl", "tokens"):
        assert measured[name] == pytest.approx(result["best"]["heldout"][name], abs=1e-4)
    assert "images with texts" in " ".join(run("show", folder).out.split())
    assert "images with texts" in (folder / "report.html").read_text()


def test_a_metric_searched_on_images(run: Run, llava: Path, place: Path) -> None:
    done = run("search", "metric", llava, *SMALL, "--set", "racing.rungs=[2,3]")
    assert done.code == 0, done.err
    _, result = result_of(place)
    assert result["images"]
    assert result["best"]["heldout"]["tokens"] == result["dense"]["heldout"]["tokens"] < 100


@pytest.mark.slow
def test_a_joint_search_on_images(run: Run, llava: Path, place: Path) -> None:
    """The pair that it prints is pruned to what it measured, on images that only the report reads."""
    parts = ("metric.racing.rungs=[2,3]", "allocation.searcher.windows=3", f"allocation.{STAGES}", "rounds=1")
    done = run("search", "joint", llava, *SMALL, "--evaluations", 24, *(w for part in parts for w in ("--set", part)))
    assert done.code == 0, done.err
    folder, result = result_of(place)
    assert result["images"]
    assert "images with texts" in " ".join(run("show", folder).out.split())
    assert "images with texts" in (folder / "report.html").read_text()
    (command,) = [line for line in done.err.splitlines() if line.startswith("prune ")]
    words = shlex.split(command.removeprefix("prune").strip())[1:]
    pruned = run(*[word if word != "DIR" else "pruned" for word in words])
    assert pruned.code == 0, pruned.err
    measured = run("eval", "pruned", "--dense", llava, "--data", "images.jsonl", "--json").json
    for name in ("loss", "kl", "tokens"):
        assert measured[name] == pytest.approx(result["best"]["heldout"][name], abs=1e-4)


def test_metrics_of_norms_by_modality(
    run: Run, llava: Path, tiny: Path, place: Path, refused: Callable[..., str]
) -> None:
    statistics = ("--set", "statistics=[X_l2,X_v,X_l]")
    done = run("search", "metric", llava, *SMALL, "--set", "racing.rungs=[2,3]", *statistics)
    assert done.code == 0, done.err
    folder, _ = result_of(place)
    expressions = [json.loads(line)["expression"] for line in (folder / "history.jsonl").read_text().splitlines()]
    assert any(re.search(r"X_[vl]\b", text) for text in expressions)
    metric = ("--metric", "mul(abs(W),div(X_v,X_l))")
    pruned = run("prune", llava, *metric, "--calibration", "images.jsonl", "--out", "pruned", "--json")
    assert pruned.code == 0, pruned.err
    assert "X_l is of one modality, which projector does not tell apart" in refused(
        *metric, "--components", "all", "--calibration", "images.jsonl"
    )
    alone = "of one modality, and there is text alone: calibrate a model that reads images on images with texts"
    assert alone in refused(*metric, "--calibration-window", 16, "--calibration-sequences", 2)
    assert alone in refused(*metric, "--calibration-window", 16, "--calibration-sequences", 2, model=tiny)
    windows = ("--set", "data.window=16", "--calibration-window", 16)
    done = run("search", "metric", tiny, *statistics, "--executor", "inline", *windows)
    assert (done.code, done.out) == (2, "")
    assert alone in done.err.splitlines()[-1]


def test_too_little_to_search_on(run: Run, llava: Path, place: Path) -> None:
    done = run("search", "allocation", llava, *SMALL)
    assert done.code == 2
    assert "side B of 'images.jsonl' has 3 examples, 192 are needed" in done.err
    rows = [json.dumps({"image": f"{number}.png", "text": "<image>"}) for number in range(ROWS)]
    (place / "silent.jsonl").write_text("\n".join(rows))
    done = run("search", "allocation", llava, *LEVELS, "--data", "silent.jsonl")
    assert done.code == 2
    assert "has no text to predict" in done.err
