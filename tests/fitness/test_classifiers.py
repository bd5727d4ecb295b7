"""Image classifiers: which matrices they have, statistics against autograd, and block sparsity by LPViT's slopes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

import evoprune
from evoprune.fitness import hub
from evoprune.fitness.classifiers import agreement, classifier_of, is_classifier, load_classifier, read_images
from evoprune.fitness.statistics_images import image_statistics
from evoprune.metrics.allocation_file import write_allocation
from evoprune.metrics.errors import InvalidInput
from tests.classifiers import (
    CLASSES,
    FAMILIES,
    SIZE,
    random_images,
    save_images,
    save_tiny_vit,
    tiny_classifier,
    tiny_vit,
)
from tests.models import save_tiny

IMAGES = random_images(20)  # more than a batch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_linear_layers_of_the_blocks(family: str, tmp_path: Path) -> None:
    loaded = load_classifier(str(save_tiny_vit(tmp_path / "model", family)))
    linear = {name for name, module in loaded.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {bound.site.name for bound in loaded.sites} == {name for name in linear if "classifier" not in name}
    # A stage of Swin also merges patches, but for the last.
    merging = 1 if family == "swin" else 0
    assert [bound.site.block for bound in loaded.sites] == [0] * (6 + merging) + [1] * 6
    assert loaded.logits(IMAGES).shape == (20, CLASSES)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(IMAGES), plain(pixel_values=IMAGES).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_autograd_and_of_inputs_by_hand(family: str) -> None:
    classifier, other = tiny_classifier(family), tiny_vit(family).eval()
    statistics = image_statistics(classifier, IMAGES, {"H", "X_l2", "G_mean", "G_l2"})
    layers = {bound.site.name: other.get_submodule(bound.site.name) for bound in classifier.sites}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach().flatten(0, -2)))
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for image in IMAGES:
        other.zero_grad()
        other(pixel_values=image[None]).logits.square().mean().backward()
        for name, layer in layers.items():
            gradients[name].append(layer.weight.grad.clone())
    tokens = {"vit": 16 + 1, "dinov2": 16 + 1, "deit": 16 + 2, "swin": 64}[family]
    assert (statistics.sequences, statistics.tokens) == (20, 20 * tokens)
    for name in layers:
        rows, steps = torch.cat(inputs[name]), torch.stack(gradients[name])
        found = statistics.site_statistics(name, {"H", "X_l2", "G_mean", "G_l2"})
        torch.testing.assert_close(found["H"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["X_l2"][0], (rows.square().sum(0) / 20).sqrt(), rtol=1e-4, atol=1e-5)
        # Stored in half precision, with a scale of their own.
        peak = steps.abs().max().item()
        torch.testing.assert_close(found["G_mean"], steps.mean(0), rtol=2e-3, atol=1e-3 * peak)
        torch.testing.assert_close(found["G_l2"], steps.square().sum(0).sqrt(), rtol=2e-3, atol=1e-3 * peak)


def test_statistics_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = tiny_classifier()
    first = image_statistics(classifier, IMAGES, {"X_l2", "G_mean"})
    monkeypatch.setattr("evoprune.fitness.statistics_images._Passes.run", lambda self: pytest.fail("collected again"))
    assert image_statistics(classifier, IMAGES, {"X_l2"}).folder == first.folder


def test_blocks_go_where_slopes_say() -> None:
    """One half of the network hardly reaches the logits: it loses more, and the exact number of weights goes."""
    classifier = tiny_classifier()
    faint = [bound for bound in classifier.sites if bound.site.block == 1]
    for bound in faint:
        bound.weight().mul_(1e-3)
    pruned = evoprune.prune_classifier(
        classifier, images=IMAGES, sparsity=0.5, compressor="block", allocation="lpvit", metric="magnitude"
    )
    assert pruned.removed == pruned.prunable // 2
    shares = {layer.name: layer.sparsity for layer in pruned.layers}
    names = {bound.site.name for bound in faint}
    assert min(shares[name] for name in names) > max(share for name, share in shares.items() if name not in names)
    for bound in pruned.classifier.sites:
        height, width = bound.weight().shape
        zeros = (bound.weight() == 0).view(height // 16, 16, width // 16, 16).sum((1, 3)).flatten()
        # A count that is no multiple of a block leaves one in part.
        assert int(((zeros > 0) & (zeros < 256)).sum()) <= 1
    assert not any(bool((bound.weight() == 0).any()) for bound in classifier.sites)
    uniform = evoprune.prune_classifier(classifier, images=IMAGES, sparsity=0.5, compressor="block")
    dense = classifier.logits(IMAGES)
    assert (
        agreement(dense, pruned.classifier.logits(IMAGES))["kl"]
        < agreement(dense, uniform.classifier.logits(IMAGES))["kl"]
    )


def test_an_allocation_of_a_file_is_met(tmp_path: Path) -> None:
    classifier, file = tiny_classifier(), tmp_path / "allocation.json"
    found = evoprune.prune_classifier(classifier, metric="magnitude", sparsity=0.4, allocation="erk").allocation
    assert found is not None
    write_allocation(found, file)
    again = evoprune.prune_classifier(classifier, metric="magnitude", allocation=file)
    assert {layer.name: layer.removed for layer in again.layers} == {site.name: site.removed for site in found.sites}
    for options, said in (
        ({"sparsity": 0.5}, r"the allocation's budget is 0.4, not 0.5"),
        ({"allocation_parameters": {"power": 1}}, "parameter 'power' is of an allocator, and this allocation is there"),
    ):
        with pytest.raises(InvalidInput, match=said):
            evoprune.prune_classifier(classifier, metric="magnitude", allocation=found, **options)


def test_agreement_by_hand() -> None:
    dense, pruned = torch.tensor([[0.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    found = agreement(dense, pruned)
    low, high = 1 / (1 + torch.tensor(4.0).exp()), 1 / (1 + torch.tensor(-4.0).exp())
    assert found == {"kl": pytest.approx(2 * float(high - low)), "top1": 0.5, "images": 2}


def test_images_have_sides_and_are_drawn_by_seed(tmp_path: Path) -> None:
    loaded = load_classifier(str(save_tiny_vit(tmp_path / "model")))
    source = str(save_images(tmp_path / "images"))
    sides = [read_images(loaded, source, side, count=9) for side in "ABC"]
    assert [tuple(side.shape) for side in sides] == [(3, 3, SIZE, SIZE)] * 3
    assert len(torch.cat(sides).flatten(1).unique(dim=0)) == 9
    assert torch.equal(
        read_images(loaded, source, "A", count=2, seed=1), read_images(loaded, source, "A", count=2, seed=1)
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: evoprune.prune_classifier(tiny_classifier()), r"statistics \(X_l2\) are of images: give a folder"),
        (
            lambda: evoprune.prune_classifier(tiny_classifier(), images=IMAGES, compressor="block:height=5"),
            "cannot compress vit.layers.0.attention.q_proj: blocks of 5 × 16 do not divide",
        ),
        (lambda: evoprune.prune_classifier(tiny_classifier(), compressor="scap"), "'scap' is of language models"),
        (
            lambda: evoprune.prune_classifier(tiny_classifier(), images=IMAGES, allocation="das"),
            "allocator 'das' runs a language model on text: give one such as lpvit",
        ),
        (
            lambda: evoprune.prune_classifier(tiny_classifier(), images=IMAGES, allocation="erk", pattern="2:4"),
            "an allocation prunes by row: leave out the pattern",
        ),
        (
            lambda: evoprune.prune_classifier(tiny_classifier(), images=IMAGES[0]),
            r"images are torch.float32 \[3, 16, 16\]: give pixel values",
        ),
        (
            lambda: image_statistics(tiny_classifier(), IMAGES, {"G_reg"}),
            "G_reg is of language models: for an image classifier give a metric without it",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_of_a_hub_id_descriptions_alone_say_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = save_tiny_vit(tmp_path / "model"), []

    def download(name: str, **options: object) -> str:
        asked.append((name, options["revision"], "*.safetensors" in options["allow_patterns"]))  # type: ignore[operator]
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert is_classifier("somebody/vit", "v2")
    assert asked == [("somebody/vit", "v2", False)]
    assert load_classifier("somebody/vit", revision="v2").folder == folder
    assert asked[1:] == [("somebody/vit", "v2", False), ("somebody/vit", "v2", True)]


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is no image classifier: give a folder of one"):
        load_classifier(str(save_tiny(tmp_path / "llama")))
    with pytest.raises(InvalidInput, match="was not loaded from a folder: give pixel values"):
        read_images(tiny_classifier(), str(save_images(tmp_path / "images")), "A", count=2)
    with pytest.raises(InvalidInput, match="holds no image"):
        read_images(classifier_of(tiny_vit(), "vit", "0"), str(tmp_path / "llama"), "A", count=2)
