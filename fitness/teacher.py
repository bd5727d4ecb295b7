"""The dense model's next-token distributions, cached so that a candidate's KL costs little beside its forward pass.

With p the teacher's distribution and z = h E^T the candidate's logits over output embeddings E,

    KL(p || softmax z) = sum p log p - h . (p E) + logsumexp(z),

so the teacher is known by one number (sum p log p) and one vector (p E, its expected output embedding) per token. That
is smaller than log-probabilities by a factor of vocabulary over width, and exact. A model whose logits are not linear
in the last hidden state (Gemma 2 caps them) keeps the teacher's log-probabilities instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evoprune.metrics.errors import InvalidInput

# Tokens whose logits exist at one time: small enough for a processor's cache.
CHUNK = 512

BATCH = 4
"""Windows in a forward pass, unless the caller says otherwise. Another number may change the last bit of a loss."""

# Memory for cached log-probabilities, per text, where the expected embedding does not apply.
MAX_LOG_PROBABILITY_BYTES = 4 << 30


@dataclass(frozen=True)
class Teacher:
    """What is kept of the dense model over n windows of w tokens (w - 1 predictions each).

    Attributes:
        negative_entropy: [n, w - 1] float32, sum over the vocabulary of p log p.
        embedding: [n, w - 1, hidden] float32, expected output embedding; None if logits are not linear.
        offset: [n, w - 1] float32, expected output bias; None without a bias.
        log_probabilities: [n, w - 1, vocabulary] float32 or float16; None if logits are linear.
    """

    negative_entropy: Tensor
    embedding: Tensor | None = None
    offset: Tensor | None = None
    log_probabilities: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by attribute name."""
        named = {
            "negative_entropy": self.negative_entropy,
            "embedding": self.embedding,
            "offset": self.offset,
            "log_probabilities": self.log_probabilities,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def __getitem__(self, windows: slice) -> Teacher:
        return Teacher(**{name: tensor[windows] for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class WindowLosses:
    """Means over the predictions of each window, float64, in nats per token.

    Attributes:
        kl: [n], divergence from the teacher's distribution to the model's; None without a teacher.
        nll: [n], negative log-likelihood of the next token.
    """

    kl: Tensor | None
    nll: Tensor


def linear_head(model: PreTrainedModel, sample: Tensor) -> nn.Linear | None:
    """The output embedding if the model's logits are its linear image of the last hidden state, else None.

    Args:
        model: a causal language model.
        sample: [1, w] token ids to check it on.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    with torch.no_grad():
        hidden = _last_hidden(model, sample)
        if hidden is None or hidden.shape[-1] != head.in_features:
            return None
        logits = model(input_ids=sample, use_cache=False).logits
        # The model itself does the same product, so anything but rounding is a cap or a scale.
        expected = head(hidden).float()
        largest = expected.abs().max().item()
        return head if torch.allclose(expected, logits.float(), rtol=0, atol=1e-6 * largest) else None


def _last_hidden(model: PreTrainedModel, windows: Tensor) -> Tensor | None:
    output = model.base_model(input_ids=windows, use_cache=False)
    return getattr(output, "last_hidden_state", None)


def _logit_chunks(
    model: PreTrainedModel, head: nn.Linear | None, windows: Tensor
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """(which predictions, hidden states, float32 logits) over the flattened predictions of `windows`."""
    if head is None:
        flat = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        for start in range(0, len(flat), CHUNK):
            part = slice(start, start + CHUNK)
            yield part, None, flat[part].float()
        return
    hidden = _last_hidden(model, windows)
    assert hidden is not None
    hidden = hidden[:, :-1].flatten(0, 1)
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        yield part, hidden[part].float(), head(hidden[part]).float()


@torch.no_grad()
def build_teacher(model: PreTrainedModel, head: nn.Linear | None, windows: Tensor, *, batch: int = BATCH) -> Teacher:
    """Run the dense model over `windows` and keep what `window_losses` needs.

    Args:
        windows: [n, w] token ids, on any device.
        head: what `linear_head` found.

    Raises:
        InvalidInput: log-probabilities are needed and exceed `MAX_LOG_PROBABILITY_BYTES` even in half precision.
    """
    n, predictions = len(windows), windows.shape[1] - 1
    negative_entropy = torch.empty(n * predictions)
    embedding = offset = log_probabilities = None
    if head is not None:
        embedding = torch.empty(n * predictions, head.in_features)
        if head.bias is not None:
            offset = torch.empty(n * predictions)
    else:
        vocabulary = model.get_output_embeddings().weight.shape[0]
        dtype = torch.float32 if n * predictions * vocabulary * 4 <= MAX_LOG_PROBABILITY_BYTES else torch.float16
        if n * predictions * vocabulary * 2 > MAX_LOG_PROBABILITY_BYTES:
            raise InvalidInput(
                f"log-probabilities of {n * predictions} tokens for a vocabulary of {vocabulary} take more than "
                f"{MAX_LOG_PROBABILITY_BYTES >> 30} GiB: use fewer or shorter windows of text"
            )
        log_probabilities = torch.empty(n * predictions, vocabulary, dtype=dtype)
    for first in range(0, n, batch):
        chunk = windows[first : first + batch].to(model.device)
        for part, _, logits in _logit_chunks(model, head, chunk):
            log_p = logits.log_softmax(1)
            p = log_p.exp()
            rows = slice(first * predictions + part.start, first * predictions + part.start + len(p))
            negative_entropy[rows] = (p * log_p).sum(1).cpu()
            if head is not None:
                assert embedding is not None
                embedding[rows] = (p @ head.weight.float()).cpu()
                if offset is not None:
                    offset[rows] = (p @ head.bias.float()).cpu()
            else:
                assert log_probabilities is not None
                log_probabilities[rows] = log_p.to(log_probabilities.dtype).cpu()
    kept = {"embedding": embedding, "offset": offset, "log_probabilities": log_probabilities}
    shaped = {
        name: None if tensor is None else tensor.view(n, predictions, *tensor.shape[1:])
        for name, tensor in kept.items()
    }
    return Teacher(negative_entropy.view(n, predictions), **shaped)


@torch.no_grad()
def window_losses(
    model: PreTrainedModel, head: nn.Linear | None, windows: Tensor, teacher: Teacher | None, *, batch: int = BATCH
) -> WindowLosses:
    """Losses of `model` on each window.

    Args:
        windows: [n, w] token ids; the first token of a window is not predicted.
        head: what `linear_head` found for this model.
        teacher: of the same windows, from a model with the same output embedding; None leaves out the KL.
    """
    n, predictions = len(windows), windows.shape[1] - 1
    kl, nll = torch.empty(n * predictions), torch.empty(n * predictions)
    for first in range(0, n, batch):
        chunk = windows[first : first + batch].to(model.device)
        targets = chunk[:, 1:].flatten()
        local = None if teacher is None else teacher[slice(first, first + batch)]
        for part, hidden, logits in _logit_chunks(model, head, chunk):
            rows = slice(first * predictions + part.start, first * predictions + part.start + len(logits))
            normaliser = logits.logsumexp(1)
            nll[rows] = (normaliser - logits.gather(1, targets[part, None]).squeeze(1)).cpu()
            if local is not None:
                kl[rows] = _divergence(local, part, hidden, logits, normaliser).cpu()
    means = [values.view(n, predictions).double().mean(1) for values in (kl, nll)]
    return WindowLosses(None if teacher is None else means[0], means[1])


def _divergence(teacher: Teacher, part: slice, hidden: Tensor | None, logits: Tensor, normaliser: Tensor) -> Tensor:
    negative_entropy = teacher.negative_entropy.flatten()[part].to(logits.device)
    if teacher.log_probabilities is not None:
        log_p = teacher.log_probabilities.flatten(0, 1)[part].to(logits.device).float()
        return negative_entropy - (log_p.exp() * logits).sum(1) + normaliser
    assert hidden is not None and teacher.embedding is not None
    expected = (hidden * teacher.embedding.flatten(0, 1)[part].to(logits.device)).sum(1)
    if teacher.offset is not None:
        expected = expected + teacher.offset.flatten()[part].to(logits.device)
    return negative_entropy - expected + normaliser
