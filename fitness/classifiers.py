"""Image classifiers of transformers, such as ViT and DeiT: loaded, run on images, pruned like any other model."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from evoprune.fitness.adapters import SiteModule, rebind
from evoprune.fitness.adapters.base import bind_sites
from evoprune.fitness.adapters.multimodal import VISION, Component, component_part
from evoprune.fitness.examples import IMAGE_SUFFIXES, METADATA, Example, open_image, read_examples, side_examples
from evoprune.fitness.hub import copy_processor, fingerprint, model_folder, one_line, silence
from evoprune.fitness.models import check_weights, device_of, dtype_of
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import user_path

IMAGES_AT_ONCE = 16
_ARCHITECTURE = "ForImageClassification"


@dataclass(frozen=True)
class ImageClassifier:
    """A model that names what images show, ready for pruning.

    Attributes:
        model: in eval mode, no parameter asks for gradients; it takes ``pixel_values`` and gives ``logits``.
        sites: linear layers inside its blocks, in model order, bound to `model`. Embeddings, the head and what is no
            linear layer stay dense.
        name: what the user typed.
        fingerprint: sha256 over config and weights as stored.
        stored_dtype: dtype of the weights in the files.
        folder: where its files are; None if it was never in a folder.
        cut: always False: its blocks have the widths that its class gives them.
    """

    model: PreTrainedModel
    sites: tuple[SiteModule, ...]
    name: str
    fingerprint: str
    stored_dtype: torch.dtype | None = None
    folder: Path | None = None
    cut: bool = False

    @property
    def auto(self) -> Any:
        """The class in transformers that loads it."""
        return AutoModelForImageClassification

    def save_readers(self, folder: Path) -> None:
        """Write what turns images into its inputs."""
        copy_processor(self.folder, folder)

    def copy(self) -> ImageClassifier:
        """The same with weights of its own."""
        model = deepcopy(self.model)
        return replace(self, model=model, sites=rebind(self.sites, model))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """[n, classes] float32 on the CPU, of [n, channels, height, width] float32."""
        parts = [self.model(pixel_values=self.given(part)).logits for part in images.split(IMAGES_AT_ONCE)]
        return torch.cat([part.float().cpu() for part in parts])

    def given(self, images: Tensor) -> Tensor:
        """Images on the model's device and in its dtype."""
        return images.to(self.model.device, self.model.dtype)


def is_classifier(name: str, revision: str | None = None) -> bool:
    """Whether a local folder or a Hub id holds an image classifier; of the latter only descriptions are fetched.

    Raises:
        InvalidInput: there is no such model, or it cannot be reached.
    """
    folder = model_folder(name, revision=revision, trust_remote_code=False, weights=False)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    architectures = facts.get("architectures") if isinstance(facts, dict) else None
    return isinstance(architectures, list) and any(_ARCHITECTURE in str(found) for found in architectures)


def load_classifier(
    name: str, *, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> ImageClassifier:
    """Load an image classifier, with safetensors only and no code of others.

    Args:
        name: a local folder or a Hub id.
        dtype: float32, bfloat16 or float16; ``auto`` is float32 on a CPU and bfloat16 elsewhere.
        device: such as ``cpu`` or ``cuda:1``; ``auto`` is the first CUDA device, else the CPU.
        revision: branch, tag or commit of a Hub id.

    Raises:
        InvalidInput: there is no such model, it is no image classifier, not readable, or has no linear layer in blocks.
    """
    target = device_of(device)
    chosen = dtype_of(dtype, target)
    if not is_classifier(name, revision):
        raise InvalidInput(
            f"{name[:200]} is no image classifier: give a folder of one, such as ViTForImageClassification"
        )
    folder = model_folder(name, revision=revision, trust_remote_code=False, weights=True)
    try:
        with silence():
            model, info = AutoModelForImageClassification.from_pretrained(
                folder, dtype=chosen, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # whatever transformers makes of files that a stranger wrote
        raise InvalidInput(f"the classifier in {folder} cannot be read: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise InvalidInput(f"the weights in {folder} are incomplete: {len(missing)} are missing, such as {missing[0]}")
    check_weights(model, folder)
    return classifier_of(model.to(target), name, fingerprint(folder), folder=folder)


def classifier_of(
    model: PreTrainedModel, name: str, fingerprint: str, *, folder: Path | None = None
) -> ImageClassifier:
    """A loaded image classifier, ready for pruning.

    Raises:
        InvalidInput: its body is no stack of blocks with linear layers.
    """
    stored = model.config.dtype if isinstance(model.config.dtype, torch.dtype) else None
    model.eval().requires_grad_(False)
    part = component_part(model, Component(VISION, model.base_model_prefix))
    # Tables of relative positions and the like are no matrices that inputs are multiplied by.
    sites = tuple(bind_sites(model, [part], others_stay_dense=True))
    return ImageClassifier(model, sites, name, fingerprint, stored, folder)


def read_images(classifier: ImageClassifier, source: str, side: str, *, count: int, seed: int | None = None) -> Tensor:
    """Images of one side of a source, as the model's processor makes them.

    Args:
        source: a folder with images in it, at any depth, whose names need not mean anything; or rows that name images,
            see `evoprune.fitness.examples.read_examples`. Texts and labels are not read.
        side: A for statistics, C for the report; see `side_examples`.
        count: how many at most.
        seed: draws them; None takes the first ones in order.

    Returns:
        [n, channels, height, width] float32.

    Raises:
        InvalidInput: there is no image, one cannot be read, or the processor makes nothing of them.
    """
    examples = side_examples(_examples(source), side)
    order = torch.arange(len(examples))
    if seed is not None:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    chosen = [examples[index].image for index in order[:count].tolist()]
    images = [open_image(path) for path in chosen if path is not None]
    if classifier.folder is None:
        raise InvalidInput(f"model {classifier.name!r} was not loaded from a folder: give pixel values, not {source!r}")
    try:
        with silence():
            processor = AutoImageProcessor.from_pretrained(classifier.folder)
            found = processor(images=images, return_tensors="pt")["pixel_values"]
    except Exception as error:  # whatever transformers makes of files that a stranger wrote
        raise InvalidInput(
            f"the processor of {classifier.name!r} makes nothing of images: {one_line(error)}"
        ) from error
    return torch.as_tensor(found).float()


def agreement(dense: Tensor, pruned: Tensor) -> dict[str, float]:
    """How near the answers of a pruned classifier are to the dense one's.

    Args:
        dense, pruned: logits, [n, classes] float32.

    Returns:
        ``kl``: from the dense to the pruned distribution, in nats per image; ``top1``: share of the images with the
        same first class; ``images``: how many.
    """
    before, after = (functional.log_softmax(logits.double(), dim=1) for logits in (dense, pruned))
    kl = (before.exp() * (before - after)).sum(1).mean().item()
    return {"kl": kl, "top1": (before.argmax(1) == after.argmax(1)).double().mean().item(), "images": len(dense)}


def _examples(source: str) -> list[Example]:
    path = user_path(source)
    if not path.is_dir() or (path / METADATA).is_file():
        found = [example for example in read_examples(source) if example.image is not None]
    else:
        found = [Example(file, "") for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise InvalidInput(f"{source} holds no image: give a folder with {', '.join(IMAGE_SUFFIXES)} files")
    return found
