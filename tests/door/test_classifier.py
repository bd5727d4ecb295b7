"""`prune` of an image classifier from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.classifiers import random_images, save_images, save_tiny_vit
from tests.door.conftest import Run


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"))


def test_blocks_by_slopes_in_a_checkpoint_that_transformers_loads(
    run: Run, vit: Path, images: Path, place: Path
) -> None:
    words = ("--compressor", "block", "--allocation", "lpvit", "--allocation-set", "power=1", "--calibration", images)
    done = run("prune", vit, *words, "--sparsity", 0.5, "--out", "out", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert (document["removed"], document["sparsity"]) == (document["prunable"] // 2, 0.5)
    assert (document["compressor"], document["allocation"]["allocator"]) == ("block", "lpvit")
    assert document["held_out"]["images"] == 3 and document["held_out"]["kl"] > 0
    loaded = AutoModelForImageClassification.from_pretrained(place / "out").eval()
    zeros = {layer["name"]: int((loaded.get_parameter(f"{layer['name']}.weight") == 0).sum())
             for layer in document["layers"]}  # fmt: skip
    assert sum(zeros.values()) == document["removed"]
    assert AutoImageProcessor.from_pretrained(place / "out") is not None
    with torch.no_grad():
        assert loaded(pixel_values=random_images()).logits.isfinite().all()
    record = json.loads((place / "out" / "evoprune.json").read_text())
    assert record["recipe"]["calibration"]["statistics"] == ["G_mean", "H"]
    assert record["report"]["held_out"] == document["held_out"]
    card = (place / "out" / "README.md").read_text()
    assert "AutoModelForImageClassification.from_pretrained" in card and "AutoImageProcessor" in card
    assert "image-classification" in card
    report = json.loads((place / "out" / "sparsity_report.json").read_text())
    assert [layer["error"] for layer in report["layers"]] == [layer["error"] for layer in document["layers"]]

    masked = run("prune", vit, "--pattern", "2:4", "--calibration", images, "--out", "masked")
    assert masked.code == 0 and "on 3 other images: KL" in masked.err


def test_what_is_of_language_models_is_refused(refused: Callable[..., str], vit: Path, images: Path) -> None:
    prune = ("prune", vit, "--out", "out")
    assert "are of images: give a folder of some" in refused(*prune)
    for words, named in (
        (("--recovery", "lora"), "--recovery"),
        (("--tokens", "amia"), "--tokens"),
        (("--budget", "vision_tower=0.3"), "--budget"),
        (("--form", "modules"), "--form"),
        (("--bits", 4), "--bits"),
        (("--memory", "1GiB"), "--memory"),
        (("--accumulation", "path"), "--accumulation"),
        (("--calibration-window", 32), "--calibration-window"),
    ):
        assert f"{named} is of language models, and this is an image" in refused(*prune, *words)
    blocks = (*prune, "--compressor", "block", "--calibration", images)
    assert "2:4: give a sparsity" in refused(*blocks, "--pattern", "2:4")
    assert "is no causal language model" in refused("eval", vit)
