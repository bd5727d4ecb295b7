"""How far a pruned diffusion pipeline is from the dense one: differences of predicted noise, no image generated.

Source: multimodal allocation chapter, section 6, fitness for generators. Its example is Stable Diffusion 2, as pruned
by Ramesh and Zhao 2024, arXiv:2411.15113.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evoprune.fitness.pipelines import DENOISER, TEXT_ENCODER, Pipeline
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import derived_seed

UNET = "unet"


@dataclass(frozen=True)
class Triple:
    """What the denoiser is asked about once: the same for every candidate, so that differences are not chance.

    Attributes:
        latent: [1, channels, height, width] float32.
        step: of the noise schedule.
        ids: [1, tokens] int64 of a prompt.
    """

    latent: Tensor
    step: int
    ids: Tensor


def draw_triples(pipeline: Pipeline, prompts: Sequence[str], seed: int = 0) -> list[Triple]:
    """One triple for each prompt: its tokens, standard normal noise, and a step of the schedule.

    The steps are spread evenly over the schedule, from the first half of its share on; the noise of a prompt depends
    on the seed and on its place alone. Latents of real images, which low steps would see, take an encoder and images.

    Raises:
        InvalidInput: there is no prompt, or the pipeline is not of a text encoder, a UNet, a tokenizer and a scheduler.
    """
    if not prompts:
        raise InvalidInput("there is no prompt: give at least one")
    parts = pipeline.pipe.components
    _check_parts(pipeline)
    tokenizer, scheduler = parts.get("tokenizer"), parts.get("scheduler")
    if tokenizer is None or scheduler is None:
        raise InvalidInput(f"pipeline {pipeline.name[:200]!r} has no tokenizer or no scheduler: give a loss instead")
    unet, encoder = parts[UNET], parts[TEXT_ENCODER]
    side = unet.config.sample_size
    shape = (1, unet.config.in_channels, *((side, side) if isinstance(side, int) else side))
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    found = []
    for place, prompt in enumerate(prompts):
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        generator = torch.Generator().manual_seed(derived_seed(seed, "latent", place))
        step = (2 * place + 1) * scheduler.config.num_train_timesteps // (2 * len(prompts))
        found.append(Triple(torch.randn(shape, generator=generator), step, ids))
    return found


class GeneratorLoss:
    """Losses of the components of a pipeline whose weights change, against what it is when this is made.

    Args:
        pipeline: dense; of one text encoder and a UNet, called as diffusers calls them.
        triples: what to compare at.

    Raises:
        InvalidInput: the pipeline has other parts that are pruned.

    A second copy of the UNet stays dense: text embeddings are compared by what it makes of them.
    """

    def __init__(self, pipeline: Pipeline, triples: Sequence[Triple]) -> None:
        _check_parts(pipeline)
        self._encoder, self._unet = pipeline.model[TEXT_ENCODER], pipeline.model[UNET]
        self._dense_unet = deepcopy(self._unet)
        self._triples = triples
        self._embeddings = list(self._encoded())
        self._noise = [
            _noise(self._dense_unet, triple, embedding)
            for triple, embedding in zip(triples, self._embeddings, strict=True)
        ]

    def by_component(self) -> dict[str, float]:
        """Mean squared difference of the noise, by the name of the component that is to blame.

        ``denoiser``: the UNet as it is, given dense embeddings. ``text_encoder``: its embeddings as they are, given to
        the dense UNet. So each is zero where its component is dense, and does not depend on the other component.
        """
        denoiser = self._distance(self._unet, self._embeddings)
        return {TEXT_ENCODER: self._distance(self._dense_unet, list(self._encoded())), DENOISER: denoiser}

    def __call__(self) -> float:
        """The sum over the components."""
        return sum(self.by_component().values())

    @torch.no_grad()
    def _encoded(self) -> Iterator[Tensor]:
        device = next(self._encoder.parameters()).device
        for triple in self._triples:
            yield self._encoder(input_ids=triple.ids.to(device))[0]

    def _distance(self, unet: nn.Module, embeddings: Sequence[Tensor]) -> float:
        total = 0.0
        for triple, embedding, dense in zip(self._triples, embeddings, self._noise, strict=True):
            total += (_noise(unet, triple, embedding) - dense).square().mean().item()
        return total / len(self._triples)


@torch.no_grad()
def _noise(unet: nn.Module, triple: Triple, embedding: Tensor) -> Tensor:
    """The noise that a UNet predicts, float64 on the CPU, whose differences may be small."""
    parameter = next(unet.parameters())
    latent = triple.latent.to(parameter.device, parameter.dtype)
    embedding = embedding.to(parameter.device, parameter.dtype)
    predicted = unet(latent, triple.step, encoder_hidden_states=embedding, return_dict=False)[0]
    found: Tensor = predicted.double().cpu()
    return found


def _check_parts(pipeline: Pipeline) -> None:
    """Refuse other parts than a text encoder and a UNet."""
    if set(pipeline.model) != {TEXT_ENCODER, UNET}:
        raise InvalidInput(
            f"noise is compared for pipelines of {TEXT_ENCODER} and {UNET}, and {pipeline.name[:200]!r} has "
            f"{', '.join(pipeline.model)}: give a loss of your own, from Python"
        )
