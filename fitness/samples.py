"""What calibration runs a model on: windows of text, or samples that mix modalities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evoprune.metrics.errors import InvalidCandidate, InvalidInput

TEXT_TOKEN = 0
# Attributes of a config that name placeholder tokens, and what `mm_token_type_ids` calls their modality.
_PLACEHOLDERS = {"image_token_id": 1, "video_token_id": 2, "audio_token_id": 3}
_PATCHES = ("pixel_values", "pixel_values_videos", "input_features")


@dataclass(frozen=True)
class Batch:
    """What one forward pass is given.

    Attributes:
        inputs: arguments of the model's forward.
        keep: [rows, tokens] bool, False = padding; None if nothing is padded.
        modality: [rows, tokens] int64, 0 text, 1 image, 2 video, 3 audio; None if all is text.
    """

    inputs: dict[str, Tensor]
    keep: Tensor | None = None
    modality: Tensor | None = None

    @property
    def rows(self) -> int:
        """Sequences in it."""
        return self.inputs["input_ids"].shape[0]

    @property
    def tokens(self) -> int:
        """Tokens in it, padding aside."""
        return self.inputs["input_ids"].numel() if self.keep is None else int(self.keep.sum())

    def real(self, hidden: Tensor) -> Tensor:
        """The rows of [sequences, tokens, features] that are no padding, as [n, features]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self.keep is None else flat[self.keep.reshape(-1).to(flat.device)]

    def by_row(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """([n, features], its [n] modality) of each sequence, padding dropped; from [sequences, tokens, features]."""
        for index, row in enumerate(hidden.reshape(self.rows, -1, hidden.shape[-1])):
            modality = None if self.modality is None else self.modality[index].to(row.device)
            if self.keep is not None:
                real = self.keep[index].to(row.device)
                row, modality = row[real], None if modality is None else modality[real]
            yield row, modality

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch({name: value.to(device) for name, value in self.inputs.items()}, self.keep, self.modality)


class Samples:
    """Batches that a processor has made of images and text.

    Args:
        batches: arguments of the model's forward, each a mapping of tensors with ``input_ids`` [rows, tokens] int64;
            ``attention_mask`` marks padding, ``mm_token_type_ids`` modalities.
        config: of the model; its placeholder ids say which tokens are which where `mm_token_type_ids` is absent.

    Raises:
        InvalidInput: there is no batch, or one has no ``input_ids``.
    """

    def __init__(self, batches: Sequence[Mapping[str, Tensor]], config: Any) -> None:
        self._batches = [_batch(dict(inputs), config) for inputs in batches]
        if not self._batches:
            raise InvalidInput("there is no calibration sample: give at least one")

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    @property
    def sequences(self) -> int:
        """Sequences in all batches."""
        return sum(batch.rows for batch in self._batches)

    @property
    def tokens(self) -> int:
        """Tokens in all batches, padding aside."""
        return sum(batch.tokens for batch in self._batches)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, padding included."""
        return max(batch.inputs["input_ids"].shape[1] for batch in self._batches)

    @property
    def images(self) -> bool:
        """Whether some sample holds something else than text."""
        return any(name in batch.inputs for batch in self._batches for name in _PATCHES)

    def digest(self) -> str:
        """sha256 over all tensors, in hex."""
        digest = sha256()
        for batch in self._batches:
            for name in sorted(batch.inputs):
                value = batch.inputs[name].cpu().contiguous()
                digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
                digest.update(value.float().numpy().tobytes() if value.is_floating_point() else value.numpy().tobytes())
        return digest.hexdigest()


Calibration = Tensor | Samples
"""[n, window] int64 token ids of a text, or samples that mix modalities."""


def forward_batches(calibration: Calibration, batch: int, device: torch.device) -> Iterator[Batch]:
    """Batches on `device`: windows `batch` at a time, samples as they are."""
    if isinstance(calibration, Samples):
        for sample in calibration:
            yield sample.to(device)
    else:
        for ids in calibration.split(batch):
            yield Batch({"input_ids": ids.to(device)})


def n_sequences(calibration: Calibration) -> int:
    """Sequences in it."""
    return calibration.sequences if isinstance(calibration, Samples) else len(calibration)


def token_modalities(inputs: Mapping[str, Tensor], config: Any) -> Tensor:
    """[rows, tokens] int64: 0 text, 1 image, 2 video, 3 audio.

    The processor's ``mm_token_type_ids`` say so; where it gives none, the placeholder ids of the config do, of which
    there is one for each feature that is put in its place.

    Source: multimodal allocation chapter, 5.2.
    """
    ids = inputs["input_ids"]
    if "mm_token_type_ids" in inputs:
        return inputs["mm_token_type_ids"].to(torch.int64)
    found = torch.full_like(ids, TEXT_TOKEN)
    for name, modality in _PLACEHOLDERS.items():
        placeholder = getattr(config, name, None)
        if placeholder is not None:
            found[ids == placeholder] = modality
    return found


@torch.no_grad()
def text_loss(model: PreTrainedModel, samples: Samples, device: torch.device) -> float:
    """Mean negative log-likelihood, in nats, of the text tokens of all samples, given what stands before them.

    Placeholders of images and padding are read and not predicted.

    Raises:
        InvalidInput: there is no text to predict.
        InvalidCandidate: the model's output is not finite.
    """
    total, count = 0.0, 0
    for batch in forward_batches(samples, 1, device):
        logits = model(**batch.inputs, use_cache=False).logits
        ids = batch.inputs["input_ids"]
        wanted = torch.ones_like(ids, dtype=torch.bool)
        if batch.modality is not None:
            wanted &= batch.modality.to(device) == TEXT_TOKEN
        if batch.keep is not None:
            keep = batch.keep.to(device)
            # Behind padding a first token has nothing that it could be predicted from.
            wanted[:, 1:] &= keep[:, 1:] & keep[:, :-1]
        wanted[:, 0] = False
        for row in range(len(ids)):
            targets = wanted[row].nonzero()[:, 0]
            log_q = torch.log_softmax(logits[row, targets - 1].float(), dim=-1)
            total -= log_q.gather(-1, ids[row, targets, None]).double().sum().item()
            count += len(targets)
    if not count:
        raise InvalidInput("the samples hold no text to predict: give texts of two tokens or more beside the images")
    if not math.isfinite(total):
        raise InvalidCandidate("NONFINITE", "the model's output is not finite on these samples")
    return total / count


def _batch(inputs: dict[str, Tensor], config: Any) -> Batch:
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.dtype != torch.int64:
        raise InvalidInput("a calibration sample has no input_ids of int64 [rows, tokens]")
    mask = inputs.get("attention_mask")
    keep = None if mask is None or bool(mask.all()) else mask.bool()
    return Batch(inputs, keep, token_modalities(inputs, config))
