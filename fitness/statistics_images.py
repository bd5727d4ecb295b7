"""The statistics that metrics read, of an image classifier: collected once per model and images, kept in the cache.

There are no labels. Gradients are those of the mean of the squared logits of an image, averaged over images.
Source: Xu et al. 2024 (LPViT), arXiv:2407.02068, and its code, for the gradients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from evoprune.fitness.cache import cache_folder, disk_errors
from evoprune.fitness.classifiers import IMAGES_AT_ONCE, ImageClassifier
from evoprune.fitness.heap import freed_tensors_released
from evoprune.fitness.statistics_forward import MODALITY_NORMS, ForwardSums, Results
from evoprune.fitness.statistics_gradient import GradientSums, loss_scale
from evoprune.fitness.statistics_passes import GRADIENT_NAMES, REGIONAL_NAMES, encoded
from evoprune.fitness.statistics_reader import Statistics
from evoprune.fitness.statistics_store import (
    DEFINITION_VERSION,
    FORMAT_VERSION,
    SetWriter,
    new_folder,
    site_facts,
    stored_names,
)
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash


def image_statistics(
    classifier: ImageClassifier,
    images: Tensor,
    names: Iterable[str],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """The statistics `names` of a classifier on images: from the cache, or collected now and kept there.

    An image is a sequence, and its patches are the tokens.

    Args:
        classifier: dense.
        images: [n, channels, height, width] float32, as the processor makes them.
        names: terminals that need data, and ``H``; gradients are of the mean squared logits.
        progress: called with (done, total) in images over all passes; not called on a hit.

    Raises:
        InvalidInput: unknown names, those of text alone or inside a block, or no images.
        EvopruneError: a statistic is not finite, or a layer runs more than once for an image.
    """
    stored = stored_names(names)
    if images.dim() != 4 or not len(images) or not images.is_floating_point():
        raise InvalidInput(
            f"images are {images.dtype} {list(images.shape)}: give pixel values [n, channels, height, width]"
        )
    if others := stored & (REGIONAL_NAMES | MODALITY_NORMS.keys()):
        raise InvalidInput(f"{min(others)} is of language models: for an image classifier give a metric without it")
    facts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "definitions": DEFINITION_VERSION,
        "fingerprint": classifier.fingerprint,
        "windows": hashlib.sha256(images.cpu().contiguous().float().numpy().tobytes()).hexdigest(),
        "sequences": len(images),
        "components": sorted({bound.site.component for bound in classifier.sites}),
        "dtype": str(classifier.model.dtype).removeprefix("torch."),
        "device": classifier.model.device.type,
        "threads": torch.get_num_threads(),
        "settings": {"loss": "mean squared logits", "batch": IMAGES_AT_ONCE, "tokens": None},
    }
    key, place = content_hash(facts)[:32], cache_folder() / "statistics"
    for folder in sorted(place.glob(f"{key}-*")):
        held = Statistics.open(folder, fingerprint=classifier.fingerprint)
        if stored <= held.names:
            held.verify()
            return held
    folder = place / f"{key}-{content_hash(sorted(stored))[:8]}"
    with disk_errors(folder), new_folder(folder) as partial, freed_tensors_released():
        passes = _Passes(classifier, images, stored, progress)
        found, leaders, rows = passes.run()
        writer = SetWriter(partial)
        for block in sorted({bound.site.block for bound in classifier.sites}):
            writer.add(block, encoded(found, [bound for bound in classifier.sites if bound.site.block == block]))
        facts |= {
            "model": classifier.name,
            "names": sorted(stored),
            "window": passes.tokens,
            "tokens": passes.tokens * len(images),
            "rows": rows,
            "loss_scale": loss_scale(classifier.model.dtype),
            "provenance": {},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        writer.finish(site_facts((bound.site for bound in classifier.sites), leaders), facts)
    return Statistics.open(folder, fingerprint=classifier.fingerprint)


class _Passes:
    """A forward pass for statistics of inputs and outputs, a backward pass for gradients; each if it is asked for.

    Attributes:
        tokens: of an image, as the first block gets them.
    """

    def __init__(
        self, classifier: ImageClassifier, images: Tensor, stored: frozenset[str], progress: Callable[[int, int], None]
    ) -> None:
        self._classifier, self._images, self._progress = classifier, images, progress
        self._gradients = stored & GRADIENT_NAMES
        self._forward = stored - GRADIENT_NAMES
        self._done, self._batch = 0, 1
        self.tokens = 0

    def run(self) -> tuple[Results, dict[str, str], dict[str, int]]:
        """Statistics by site, which site leads each site's inputs, and how many tokens each site's are of."""
        found: Results = {bound.site.name: {} for bound in self._classifier.sites}
        leaders: dict[str, str] = {}
        rows: dict[str, int] = {}
        first = self._classifier.sites[0].module
        handle = first.register_forward_pre_hook(self._count)
        try:
            if self._forward:
                sums = ForwardSums(self._classifier.sites, self._forward)
                with torch.no_grad(), sums.hooked():
                    for part in self._batches(IMAGES_AT_ONCE):
                        self._classifier.model(pixel_values=part)
                _merge(found, sums.results(len(self._images)))
                leaders, rows = sums.leaders, sums.rows
            if self._gradients:
                _merge(found, self._gradient_results())
        finally:
            handle.remove()
        return found, leaders, rows

    def _gradient_results(self) -> Results:
        scale = loss_scale(self._classifier.model.dtype)
        sums = GradientSums(self._classifier.sites, self._gradients, scale)
        with torch.enable_grad(), sums.tapped():
            # One at a time: families that merge patches have other numbers of tokens in each stage.
            for image in self._batches(1):
                # Frozen weights build no graph: it starts at the images.
                logits = self._classifier.model(pixel_values=image.requires_grad_(True)).logits
                sums.expect(1, None)
                (logits.float().square().mean() * scale).backward()
        return sums.results(len(self._images))

    def _batches(self, size: int) -> Iterable[Tensor]:
        passes = bool(self._forward) + bool(self._gradients)
        for part in self._images.split(size):
            self._batch = len(part)
            yield self._classifier.given(part).detach().clone()
            self._done += len(part)
            self._progress(self._done, passes * len(self._images))

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = args[0].numel() // args[0].shape[-1] // self._batch


def _merge(found: Results, more: Results) -> None:
    for name, tensors in more.items():
        found[name] |= tensors
