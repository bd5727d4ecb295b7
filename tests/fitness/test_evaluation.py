"""Held-out numbers against the same numbers computed the long way, in double precision."""

from __future__ import annotations

import json
import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from evoprune.fitness import evaluation
from evoprune.fitness.adapters import list_sites
from evoprune.fitness.evaluation import evaluate_language_model
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from tests.models import random_windows, tiny_model

MODEL, DENSE = tiny_model(seed=1), tiny_model(seed=0)
WINDOWS = random_windows(5, 16)


def log_probabilities(windows: Tensor, model: torch.nn.Module) -> Tensor:
    """[n, window - 1, vocabulary] float64."""
    return model(windows).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("chunk", [4, 256])
def test_against_double_precision(batch: int, chunk: int) -> None:
    log_q, log_p = log_probabilities(WINDOWS, MODEL), log_probabilities(WINDOWS, DENSE)
    losses = -log_q.gather(-1, WINDOWS[:, 1:, None])[..., 0]
    kls = (log_p.exp() * (log_p - log_q)).sum(-1)
    with patch.object(evaluation, "TOKENS_PER_CHUNK", chunk):
        found = evaluate_language_model(MODEL, WINDOWS, dense=DENSE, batch=batch)
    assert found.tokens == losses.numel() == 5 * 15
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(losses.sum().item() / found.tokens), rel=1e-5)
    assert found.kl == pytest.approx(kls.mean().item(), rel=1e-5)
    assert found.window_losses == pytest.approx(losses.mean(1).tolist(), rel=1e-6)
    assert found.window_kls == pytest.approx(kls.mean(1).tolist(), rel=1e-5)
    assert found.stderr == pytest.approx(losses.mean(1).std().item() / math.sqrt(5), rel=1e-4)


def test_the_loss_is_that_of_transformers() -> None:
    expected = [DENSE(row[None], labels=row[None]).loss.item() for row in WINDOWS]
    assert evaluate_language_model(DENSE, WINDOWS).window_losses == pytest.approx(expected, rel=1e-5)


def test_the_dense_model_is_at_no_distance_from_itself() -> None:
    found = evaluate_language_model(DENSE, WINDOWS, dense=DENSE)
    assert found.kl == 0
    assert evaluate_language_model(DENSE, WINDOWS).kl is None


def test_the_first_token_is_not_predicted() -> None:
    altered = torch.tensor([[7, 8], [9, 8]])
    found = evaluate_language_model(DENSE, altered)
    expected = [-DENSE(row[None, :1]).logits[0, 0].double().log_softmax(-1)[8].item() for row in altered]
    assert found.window_losses == pytest.approx(expected, rel=1e-5)


def test_half_precision_models_are_measured_in_float32() -> None:
    half = tiny_model().bfloat16()
    found = evaluate_language_model(half, WINDOWS, dense=DENSE)
    losses = -half(WINDOWS).logits[:, :-1].double().log_softmax(-1).gather(-1, WINDOWS[:, 1:, None])
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.kl is not None
    assert 0 < found.kl < 0.1


def test_the_summary_is_json() -> None:
    found = evaluate_language_model(DENSE, WINDOWS[:1])
    assert found.stderr is None
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert set(summary) == {"loss", "perplexity", "kl", "stderr", "tokens"}


def test_output_that_is_not_finite_is_no_number() -> None:
    broken = tiny_model()
    list_sites(broken)[0].weight()[0, 0] = math.nan
    with pytest.raises(InvalidCandidate, match="NONFINITE"):
        evaluate_language_model(broken, WINDOWS)


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    hopeless = tiny_model()
    hopeless.lm_head.weight.mul_(1e4)
    assert math.isfinite(evaluate_language_model(hopeless, WINDOWS).perplexity)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (3, 0)])
def test_windows_without_a_token_to_predict(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match="hold no token to predict"):
        evaluate_language_model(DENSE, torch.zeros(shape, dtype=torch.int64))


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidInput, match="vocabulary of 300, this one of 257"):
        evaluate_language_model(MODEL, WINDOWS, dense=tiny_model(vocab_size=300))
