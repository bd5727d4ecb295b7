"""Held-out quality of a model: loss, perplexity, and KL divergence from the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evoprune.fitness.samples import Batch, Sequences, forward_batches, n_predictions
from evoprune.metrics.errors import InvalidCandidate, InvalidInput

# Log-probabilities of this many tokens exist at a time: the logits themselves are the only [tokens, vocabulary] tensor.
TOKENS_PER_CHUNK = 256
# exp() of more is no float.
MAX_LOSS = 700.0


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a model is worth on a text: means over windows, each of the mean over its predicted tokens.

    All windows of a text are equally long; samples of images and text count alike, however long they are.

    Attributes:
        loss: mean negative log-likelihood in nats.
        perplexity: exp(loss).
        kl: mean KL divergence from the dense to this model's distribution in nats, or None without a dense model.
        stderr: standard error of `loss` over windows, or None for a single window.
        tokens: predicted tokens; the first token of a window is not predicted.
        window_losses: mean loss of each window, for paired comparisons.
        window_kls: mean KL divergence of each window, or None.
    """

    loss: float
    perplexity: float
    kl: float | None
    stderr: float | None
    tokens: int
    window_losses: tuple[float, ...]
    window_kls: tuple[float, ...] | None

    def summary(self) -> dict[str, float | int | None]:
        """The five numbers that reports and JSON output show."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "kl": self.kl,
            "stderr": self.stderr,
            "tokens": self.tokens,
        }


@torch.inference_mode()
def evaluate_language_model(
    model: PreTrainedModel, windows: Sequences, *, dense: PreTrainedModel | None = None, batch: int = 8
) -> HeldOut:
    """Measure a model on windows of tokens, or on samples of images and text.

    Args:
        model: in eval mode.
        windows: [n, window] int64 token ids, or samples, of which text alone is predicted.
        dense: the model before pruning, with the same vocabulary; adds the KL divergence.
        batch: windows in a forward pass.

    Raises:
        InvalidInput: a window has no token to predict, or the vocabularies differ.
        InvalidCandidate: the model's output is not finite.
    """
    counts = predictions(windows)
    given = forward_batches(windows, max(batch, 1), _device(model))
    return held_out_of(
        counts, ((_logits(model, one), None if dense is None else _logits(dense, one), one) for one in given)
    )


@torch.inference_mode()
def held_out_of(counts: Tensor, outputs: Iterable[tuple[Tensor, Tensor | None, Batch]]) -> HeldOut:
    """What logits are worth.

    Args:
        counts: [n] int64, how many tokens of each window are predicted.
        outputs: batch by batch, logits [rows, tokens, vocabulary], those of the dense model or None, and what went in.

    Raises:
        InvalidInput: the vocabularies differ.
        InvalidCandidate: logits are not finite.
    """
    n = len(counts)
    losses, divergences, compared = [], [], False
    for logits, dense, batch in outputs:
        compared = dense is not None
        loss, divergence = _window_sums(logits, dense, batch)
        losses.append(loss)
        divergences.append(divergence)
    per_window = torch.cat(losses) / counts
    mean = per_window.mean().item()
    kls = torch.cat(divergences) / counts if compared else None
    if not (math.isfinite(mean) and (kls is None or bool(kls.isfinite().all()))):
        raise InvalidCandidate("NONFINITE", "the model's output is not finite on this text")
    return HeldOut(
        loss=mean,
        perplexity=math.exp(min(mean, MAX_LOSS)),
        kl=None if kls is None else kls.mean().item(),
        stderr=None if n == 1 else (per_window.std() / math.sqrt(n)).item(),
        tokens=int(counts.sum()),
        window_losses=tuple(per_window.tolist()),
        window_kls=None if kls is None else tuple(kls.tolist()),
    )


def predictions(windows: Sequences) -> Tensor:
    """[n] int64: how many tokens of each sequence are predicted.

    Raises:
        InvalidInput: of one it is none.
    """
    if isinstance(windows, Tensor) and (len(windows) < 1 or windows.shape[1] < 2):
        raise InvalidInput(
            f"windows of shape {list(windows.shape)} hold no token to predict: give [1 or more, 2 or more]"
        )
    counts = n_predictions(windows)
    if not counts.all():
        raise InvalidInput("a sample holds no text to predict: give texts of two tokens or more beside the images")
    return counts


def _device(model: PreTrainedModel) -> torch.device:
    return model.get_input_embeddings().get_parameter("weight").device


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[n, window, vocabulary] in the model's dtype, on its device."""
    return model(**batch.to(_device(model)).inputs, use_cache=False).logits


def _window_sums(logits: Tensor, dense: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums over the predicted tokens of each window: negative log-likelihood and KL divergence, [n] float64 on the CPU.

    Log-probabilities are float32 whatever the model's dtype; sums are float64.
    """
    if dense is not None and dense.shape[-1] != logits.shape[-1]:
        raise InvalidInput(
            f"the dense model has a vocabulary of {dense.shape[-1]}, this one of {logits.shape[-1]}: "
            f"KL needs the model that was pruned"
        )
    targets = batch.inputs["input_ids"].to(logits.device)
    predicted = batch.predicted
    n, window = targets.shape
    loss = torch.zeros(n, dtype=torch.float64)
    divergence = torch.zeros(n, dtype=torch.float64)
    for row in range(n):
        places = torch.arange(window - 1) if predicted is None else predicted[row].nonzero()[:, 0]
        for part in places.to(logits.device).split(TOKENS_PER_CHUNK):
            log_q = torch.log_softmax(logits[row, part].float(), dim=-1)
            picked = log_q.gather(-1, targets[row, part + 1, None])
            loss[row] -= picked.double().sum().cpu()
            if dense is not None:
                log_p = torch.log_softmax(dense[row, part.to(dense.device)].float().to(log_q.device), dim=-1)
                divergence[row] += (log_p.exp() * (log_p - log_q)).double().sum().cpu()
    return loss, divergence
