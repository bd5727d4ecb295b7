"""The dense model's next-token distributions, cached so that a candidate's KL costs little beside its forward pass.

With p the teacher's distribution and z = h E^T the candidate's logits over output embeddings E,

    KL(p || softmax z) = sum p log p - h . (p E) + logsumexp(z),

so the teacher is known by one number (sum p log p) and one vector (p E, its expected output embedding) per token. That
is smaller than log-probabilities by a factor of vocabulary over width, and exact. A model whose logits are not linear
in the last hidden state (Gemma 2 caps them) keeps the teacher's log-probabilities instead.

With `top_k` only the teacher's K most likely tokens are kept, whatever the head: with T these, and both distributions
renormalised over them,

    KL_T = sum_T p log p - sum_T p z + logsumexp_T(z).

That takes 8 K bytes a token, so it is smaller than log-probabilities, and than an expected embedding if K is below half
the width.

Source: `sparse_kl` of DarwinLM (Tang et al. 2025, arXiv:2502.07780, released code).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evoprune.fitness.samples import Batch, Sequences, first_batch, forward_batches, n_predictions
from evoprune.metrics.errors import InvalidInput

# Tokens whose logits exist at one time: small enough for a processor's cache.
CHUNK = 512

BATCH = 4
"""Windows in a forward pass, unless the caller says otherwise. Another number may change the last bit of a loss."""

# Memory for cached log-probabilities and the tokens that they are of, per text, where expected embeddings do not apply.
MAX_LOG_PROBABILITY_BYTES = 4 << 30


@dataclass(frozen=True)
class Teacher:
    """What is kept of the dense model over n sequences of up to m predictions, behind which there are zeros.

    Attributes:
        negative_entropy: [n, m] float32, sum of p log p over the vocabulary, or over `tokens` where these are kept.
        embedding: [n, m, hidden] float32, expected output embedding; None if logits are not linear, or with `tokens`.
        offset: [n, m] float32, expected output bias; None without a bias, or with `tokens`.
        log_probabilities: [n, m, vocabulary] float32 or float16; None if logits are linear. With `tokens` [n, m, K],
            renormalised over these.
        tokens: [n, m, K] int32, the K most likely tokens of each prediction; None for the whole vocabulary.
    """

    negative_entropy: Tensor
    embedding: Tensor | None = None
    offset: Tensor | None = None
    log_probabilities: Tensor | None = None
    tokens: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by attribute name."""
        named = {
            "negative_entropy": self.negative_entropy,
            "embedding": self.embedding,
            "offset": self.offset,
            "log_probabilities": self.log_probabilities,
            "tokens": self.tokens,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def __getitem__(self, sequences: slice) -> Teacher:
        return Teacher(**{name: tensor[sequences] for name, tensor in self.tensors().items()})

    def take(self, sequences: list[int]) -> Teacher:
        """Copies of these sequences, in this order."""
        return Teacher(**{name: tensor[sequences] for name, tensor in self.tensors().items()})

    def flat(self) -> Teacher:
        """The same memory, with all predictions along one axis."""
        return Teacher(**{name: tensor.view(-1, *tensor.shape[2:]) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class WindowLosses:
    """Means over the predictions of each sequence, float64, in nats per token.

    Attributes:
        kl: [n], divergence from the teacher's distribution to the model's, over the tokens that the teacher keeps; None
            without a teacher.
        nll: [n], negative log-likelihood of the next token.
    """

    kl: Tensor | None
    nll: Tensor


def linear_head(model: PreTrainedModel, sequences: Sequences) -> nn.Linear | None:
    """The output embedding if the model's logits are its linear image of the last hidden state, else None.

    Args:
        model: a causal language model.
        sequences: it is checked on the beginning of the first.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    sample = first_batch(sequences).to(model.device)
    with torch.no_grad():
        hidden = _last_hidden(model, sample)
        if hidden is None or hidden.shape[-1] != head.in_features:
            return None
        logits = model(**sample.inputs, use_cache=False).logits
        # The model itself does the same product, so anything but rounding is a cap or a scale.
        expected = head(hidden).float()
        largest = expected.abs().max().item()
        return head if torch.allclose(expected, logits.float(), rtol=0, atol=1e-6 * largest) else None


def _last_hidden(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    output = model.base_model(**batch.inputs, use_cache=False)
    return getattr(output, "last_hidden_state", None)


@dataclass(frozen=True)
class _Chunk:
    """Some predictions of one forward pass.

    Attributes:
        places: where they stand in [sequences of the pass, longest], flattened.
        hidden: [k, hidden] float32 last hidden states; None without a linear head.
        logits: [k, vocabulary] float32.
        targets: [k] int64, the tokens that follow.
    """

    places: slice | Tensor
    hidden: Tensor | None
    logits: Tensor
    targets: Tensor


def _chunks(model: PreTrainedModel, head: nn.Linear | None, batch: Batch, longest: int) -> Iterator[_Chunk]:
    """The predictions of one forward pass, `CHUNK` at a time."""
    if head is None:
        states = model(**batch.inputs, use_cache=False).logits
    else:
        states = _last_hidden(model, batch)
    flat, targets = states[:, :-1].flatten(0, 1), batch.inputs["input_ids"][:, 1:].flatten()
    predicted, places = batch.predicted, None
    if predicted is not None:
        rank = predicted.cumsum(1) - 1
        places = (rank + longest * torch.arange(batch.rows)[:, None])[predicted]
        chosen = predicted.flatten()
        flat, targets = flat[chosen.to(flat.device)], targets[chosen.to(targets.device)]
    for start in range(0, len(flat), CHUNK):
        part = slice(start, min(start + CHUNK, len(flat)))
        where = part if places is None else places[part]
        if head is None:
            yield _Chunk(where, None, flat[part].float(), targets[part])
        else:
            yield _Chunk(where, flat[part].float(), head(flat[part]).float(), targets[part])


def check_top_k(model: PreTrainedModel, top_k: int | None) -> None:
    """Refuse more tokens than there are.

    Raises:
        InvalidInput: `top_k` exceeds the model's vocabulary.
    """
    if top_k is not None and top_k > (vocabulary := _vocabulary(model)):
        raise InvalidInput(
            f"top_k {top_k} exceeds the vocabulary of {vocabulary} tokens: give a smaller one, or none for all of them"
        )


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def check_teacher(
    model: PreTrainedModel, head: nn.Linear | None, sequences: Sequences, top_k: int | None = None
) -> None:
    """Refuse what `build_teacher` would; arguments and errors as there."""
    check_top_k(model, top_k)
    if head is None or top_k is not None:
        counts = n_predictions(sequences)
        _log_probability_dtype(len(counts) * int(counts.max()), _vocabulary(model), top_k)


def _log_probability_dtype(predictions: int, vocabulary: int, top_k: int | None) -> torch.dtype:
    """What log-probabilities are kept in.

    Raises:
        InvalidInput: see `build_teacher`.
    """
    token_bytes = 0 if top_k is None else torch.int32.itemsize
    each = top_k or vocabulary
    for dtype in (torch.float32, torch.float16):
        if predictions * each * (dtype.itemsize + token_bytes) <= MAX_LOG_PROBABILITY_BYTES:
            return dtype
    kept = f"a vocabulary of {vocabulary}" if top_k is None else f"their {top_k} most likely tokens"
    raise InvalidInput(
        f"log-probabilities of {predictions} predictions for {kept} take more than "
        f"{MAX_LOG_PROBABILITY_BYTES >> 30} GiB: use fewer or shorter windows of text"
    )


@torch.no_grad()
def build_teacher(
    model: PreTrainedModel,
    head: nn.Linear | None,
    sequences: Sequences,
    *,
    batch: int = BATCH,
    top_k: int | None = None,
) -> Teacher:
    """Run the dense model over `sequences` and keep what `window_losses` needs.

    Args:
        sequences: on any device.
        head: what `linear_head` found.
        top_k: keep the distribution over so many of the most likely tokens; None keeps that over all.

    Raises:
        InvalidInput: `top_k` exceeds the vocabulary, or log-probabilities are needed and exceed
            `MAX_LOG_PROBABILITY_BYTES` even in half precision.
    """
    check_top_k(model, top_k)
    counts = n_predictions(sequences)
    n, longest = len(counts), int(counts.max())
    negative_entropy = torch.zeros(n, longest)
    embedding = offset = log_probabilities = tokens = None
    if head is not None and top_k is None:
        embedding = torch.zeros(n, longest, head.in_features)
        if head.bias is not None:
            offset = torch.zeros(n, longest)
    else:
        vocabulary = _vocabulary(model)
        dtype = _log_probability_dtype(n * longest, vocabulary, top_k)
        log_probabilities = torch.zeros(n, longest, top_k or vocabulary, dtype=dtype)
        if top_k is not None:
            tokens = torch.zeros(n, longest, top_k, dtype=torch.int32)
    teacher = Teacher(negative_entropy, embedding, offset, log_probabilities, tokens)
    first = 0
    for given in forward_batches(sequences, batch, model.device):
        local = teacher[slice(first, first + given.rows)].flat()
        for chunk in _chunks(model, head, given, longest):
            logits = chunk.logits
            if top_k is not None and local.tokens is not None:
                logits, likely = logits.topk(top_k)
                local.tokens[chunk.places] = likely.int().cpu()
            log_p = logits.log_softmax(1)
            p = log_p.exp()
            local.negative_entropy[chunk.places] = (p * log_p).sum(1).cpu()
            if local.embedding is not None:
                assert head is not None
                local.embedding[chunk.places] = (p @ head.weight.float()).cpu()
                if local.offset is not None:
                    local.offset[chunk.places] = (p @ head.bias.float()).cpu()
            elif local.log_probabilities is not None:
                local.log_probabilities[chunk.places] = log_p.to(local.log_probabilities.dtype).cpu()
        first += given.rows
    return teacher


@torch.no_grad()
def window_losses(
    model: PreTrainedModel,
    head: nn.Linear | None,
    sequences: Sequences,
    teacher: Teacher | None,
    *,
    batch: int = BATCH,
) -> WindowLosses:
    """Losses of `model` on each window of text, or on each sample.

    Args:
        sequences: the first token of each is not predicted, nor are images.
        head: what `linear_head` found for this model.
        teacher: of the same sequences, from a model with the same output embedding; None leaves out the KL.
    """
    counts = n_predictions(sequences)
    n, longest = len(counts), int(counts.max())
    if teacher is not None:
        longest = teacher.negative_entropy.shape[1]
    kl, nll = torch.zeros(n, longest), torch.zeros(n, longest)
    first = 0
    for given in forward_batches(sequences, batch, model.device):
        rows = slice(first, first + given.rows)
        local = None if teacher is None else teacher[rows].flat()
        for chunk in _chunks(model, head, given, longest):
            normaliser = chunk.logits.logsumexp(1)
            picked = chunk.logits.gather(1, chunk.targets[:, None]).squeeze(1)
            nll[rows].view(-1)[chunk.places] = (normaliser - picked).cpu()
            if local is not None:
                kl[rows].view(-1)[chunk.places] = _divergence(local, chunk, normaliser).cpu()
        first += given.rows
    means = [values.double().sum(1) / counts for values in (kl, nll)]
    return WindowLosses(None if teacher is None else means[0], means[1])


def batch_loss(model: PreTrainedModel, head: nn.Linear | None, batch: Batch, teacher: Teacher | None) -> Tensor:
    """The mean loss over the predictions of one forward pass, as a tensor that gradients can be taken of.

    Args:
        model: the gradients of its trainable parameters are wanted.
        head: what `linear_head` found for it.
        batch: on the model's device.
        teacher: of this batch: the loss is the divergence from it. Without one it is that of the next token.
    """
    longest = batch.inputs["input_ids"].shape[1] - 1 if teacher is None else teacher.negative_entropy.shape[1]
    local = None if teacher is None else teacher.flat()
    losses = []
    for chunk in _chunks(model, head, batch, longest):
        normaliser = chunk.logits.logsumexp(1)
        if local is None:
            losses.append(normaliser - chunk.logits.gather(1, chunk.targets[:, None]).squeeze(1))
        else:
            losses.append(_divergence(local, chunk, normaliser))
    return torch.cat(losses).mean()


def batch_losses(model: PreTrainedModel, head: nn.Linear | None, batch: Batch, teacher: Teacher) -> WindowLosses:
    """What `window_losses` gives of one forward pass, as tensors that gradients can be taken of.

    Args:
        model, head: as of `window_losses`.
        batch: on the model's device.
        teacher: of this batch.
    """
    longest = teacher.negative_entropy.shape[1]
    predicted = batch.predicted
    every = batch.inputs["input_ids"].shape[1] - 1
    counts = torch.full((batch.rows,), every) if predicted is None else predicted.sum(1)
    local = teacher.flat()
    kl, nll = torch.zeros(batch.rows * longest), torch.zeros(batch.rows * longest)
    for chunk in _chunks(model, head, batch, longest):
        normaliser = chunk.logits.logsumexp(1)
        picked = chunk.logits.gather(1, chunk.targets[:, None]).squeeze(1)
        where = torch.arange(len(kl))[chunk.places]
        kl = kl.index_copy(0, where, _divergence(local, chunk, normaliser).cpu())
        nll = nll.index_copy(0, where, (normaliser - picked).cpu())
    means = [values.view(batch.rows, longest).double().sum(1) / counts for values in (kl, nll)]
    return WindowLosses(*means)


def _divergence(teacher: Teacher, chunk: _Chunk, normaliser: Tensor) -> Tensor:
    """[k] float32, of the predictions in `chunk`, from the teacher of its forward pass, flattened."""
    device = normaliser.device
    negative_entropy = teacher.negative_entropy[chunk.places].to(device)
    if teacher.log_probabilities is not None:
        log_p = teacher.log_probabilities[chunk.places].to(device).float()
        logits = chunk.logits
        if teacher.tokens is not None:
            logits = logits.gather(1, teacher.tokens[chunk.places].to(device).long())
            normaliser = logits.logsumexp(1)
        return negative_entropy - (log_p.exp() * logits).sum(1) + normaliser
    assert chunk.hidden is not None and teacher.embedding is not None
    expected = (chunk.hidden * teacher.embedding[chunk.places].to(device)).sum(1)
    if teacher.offset is not None:
        expected = expected + teacher.offset[chunk.places].to(device)
    return negative_entropy - expected + normaliser
