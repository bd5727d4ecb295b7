"""Tiny random image classifiers and images: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from evoprune.fitness.classifiers import ImageClassifier, classifier_of

SIZE, CLASSES, LAYERS = 16, 5, 2
ARCHITECTURES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassificationWithTeacher",
    "dinov2": "Dinov2ForImageClassification",
    "swin": "SwinForImageClassification",
}
FAMILIES = tuple(ARCHITECTURES)
# Of those that merge patches from stage to stage: its blocks have other sizes.
_STAGES = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": SIZE,
           "patch_size": 2, "num_labels": CLASSES}  # fmt: skip


def tiny_vit(family: str = "vit", *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 classifier of two blocks; `changes` go to its config."""
    settings = {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64,
        "mlp_ratio": 2, "image_size": SIZE, "patch_size": 4, "num_labels": CLASSES,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **((_STAGES if family == "swin" else settings) | changes))
    config.dtype = torch.float32
    config.architectures = [ARCHITECTURES[family]]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def tiny_classifier(family: str = "vit", **changes: object) -> ImageClassifier:
    """`tiny_vit` as `load_classifier` would hand it over, without a folder."""
    return classifier_of(tiny_vit(family, **changes), f"tiny-{family}", f"tiny-{family}-{sorted(changes.items())}")


def save_tiny_vit(folder: Path, family: str = "vit", **changes: object) -> Path:
    """Save `tiny_vit` and its processor to `folder`; returns `folder`."""
    tiny_vit(family, **changes).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def random_images(n: int = 6, *, seed: int = 0) -> Tensor:
    """[n, 3, SIZE, SIZE] float32."""
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def save_images(folder: Path, n: int = 9) -> Path:
    """`n` images of noise in folders by class; returns `folder`."""
    generator = np.random.default_rng(0)
    for number in range(n):
        place = folder / f"class-{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return folder
