"""What a model is run on: windows of text, or samples that mix modalities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from evoprune.metrics.errors import InvalidInput

TEXT_TOKEN = 0
VISUAL_TOKENS = (1, 2)
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

    @property
    def predicted(self) -> Tensor | None:
        """[rows, tokens - 1] bool: of all tokens but the first of a row, those that are predicted; None: all are.

        Placeholders of images and padding are read and not predicted.
        """
        if self.keep is None and self.modality is None:
            return None
        chosen = torch.ones_like(self.inputs["input_ids"][:, 1:], dtype=torch.bool, device="cpu")
        if self.modality is not None:
            chosen &= self.modality[:, 1:].cpu() == TEXT_TOKEN
        if self.keep is not None:
            keep = self.keep.cpu()
            # Behind padding a first token has nothing that it could be predicted from.
            chosen &= keep[:, 1:] & keep[:, :-1]
        return chosen

    def real(self, hidden: Tensor) -> Tensor:
        """The rows of [sequences, tokens, features] that are no padding, as [n, features]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self.keep is None else flat[self.keep.reshape(-1).to(flat.device)]

    def kinds(self) -> Tensor | None:
        """[n] int64: the modality of each token that is no padding, in the order of `real`; None if all is text."""
        if self.modality is None:
            return None
        flat = self.modality.reshape(-1)
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

    @classmethod
    def _of(cls, batches: Sequence[Batch]) -> Samples:
        samples = cls.__new__(cls)
        samples._batches = list(batches)
        return samples

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Samples:
        """What `tensors` gave."""
        batches: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            number, _, inside = name.partition(".")
            batches.setdefault(int(number), {})[inside] = value
        return cls._of(
            [
                Batch(
                    {name.removeprefix("inputs."): value for name, value in found.items() if "inputs." in name},
                    found.get("keep"),
                    found.get("modality"),
                )
                for _, found in sorted(batches.items())
            ]
        )

    def tensors(self) -> dict[str, Tensor]:
        """All there is, by a name, to be saved."""
        named: dict[str, Tensor] = {}
        for number, batch in enumerate(self._batches):
            named |= {f"{number}.inputs.{name}": value.contiguous() for name, value in batch.inputs.items()}
            named |= {
                f"{number}.{name}": value.contiguous()
                for name, value in (("keep", batch.keep), ("modality", batch.modality))
                if value is not None
            }
        return named

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def __len__(self) -> int:
        return self.sequences

    def __getitem__(self, sequences: slice) -> Samples:
        """Some of the sequences, where every batch holds one."""
        assert all(batch.rows == 1 for batch in self._batches)
        return self._of(self._batches[sequences])

    def take(self, indices: Sequence[int]) -> Samples:
        """These sequences in this order, where every batch holds one."""
        assert all(batch.rows == 1 for batch in self._batches)
        return self._of([self._batches[index] for index in indices])

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

    @property
    def visual(self) -> bool:
        """Whether some token stands for a part of an image or a video."""
        kinds = [batch.kinds() for batch in self._batches]
        return any(kind in VISUAL_TOKENS for found in kinds if found is not None for kind in found.unique().tolist())

    def digest(self) -> str:
        """sha256 over all tensors, in hex."""
        digest = sha256()
        for batch in self._batches:
            for name in sorted(batch.inputs):
                value = batch.inputs[name].cpu().contiguous()
                digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
                digest.update(value.float().numpy().tobytes() if value.is_floating_point() else value.numpy().tobytes())
        return digest.hexdigest()


Sequences = Tensor | Samples
"""[n, window] int64 token ids of a text, or samples that mix modalities."""


def forward_batches(sequences: Sequences, batch: int, device: torch.device) -> Iterator[Batch]:
    """Batches on `device`: windows `batch` at a time, samples as they are."""
    if isinstance(sequences, Samples):
        for sample in sequences:
            yield sample.to(device)
    else:
        for ids in sequences.split(batch):
            yield Batch({"input_ids": ids.to(device)})


def first_batch(sequences: Sequences, tokens: int = 8) -> Batch:
    """What a model can be tried on: the first `tokens` of a window, or the first samples."""
    if isinstance(sequences, Samples):
        return next(iter(sequences))
    return Batch({"input_ids": sequences[:1, :tokens]})


def taken(sequences: Sequences, indices: Sequence[int]) -> Sequences:
    """These sequences in this order.

    Raises:
        InvalidInput: there is none, or one does not exist.
    """
    if not indices or not all(type(index) is int and 0 <= index < len(sequences) for index in indices):
        raise InvalidInput(f"windows {str(list(indices))[:60]} of {len(sequences)}: give one or more, from 0")
    return sequences.take(indices) if isinstance(sequences, Samples) else sequences[list(indices)]


def n_tokens(sequences: Sequences) -> int:
    """Tokens in it, padding aside."""
    return sequences.tokens if isinstance(sequences, Samples) else sequences.numel()


def n_predictions(sequences: Sequences) -> Tensor:
    """[n] int64: how many tokens of each sequence are predicted."""
    if not isinstance(sequences, Samples):
        n, window = sequences.shape
        return torch.full((n,), window - 1)
    counts = []
    for batch in sequences:
        predicted = batch.predicted
        every = batch.inputs["input_ids"].shape[1] - 1
        counts.append(torch.full((batch.rows,), every) if predicted is None else predicted.sum(1))
    return torch.cat(counts)


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


def _batch(inputs: dict[str, Tensor], config: Any) -> Batch:
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.dtype != torch.int64:
        raise InvalidInput("a calibration sample has no input_ids of int64 [rows, tokens]")
    mask = inputs.get("attention_mask")
    keep = None if mask is None or bool(mask.all()) else mask.bool()
    return Batch(inputs, keep, token_modalities(inputs, config))
