"""The cached teacher against full log-probabilities, for every family."""

import itertools

import pytest
import torch

from evoprune.fitness.adapters import list_sites
from evoprune.fitness.samples import Batch
from evoprune.fitness.teacher import batch_loss, batch_losses, build_teacher, linear_head, window_losses
from evoprune.metrics.errors import InvalidInput
from tests.models import FAMILIES, VOCABULARY, random_windows, tiny_model

WINDOWS = random_windows(5, 16)


def full_log_probabilities(model):
    with torch.no_grad():
        return model(input_ids=WINDOWS).logits.double().log_softmax(-1)[:, :-1]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_losses_equal_those_from_full_distributions(family):
    dense, pruned = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for bound in list_sites(pruned):
            bound.weight()[:, ::2] = 0
    head = linear_head(dense, WINDOWS[:1])
    teacher = build_teacher(dense, head, WINDOWS, batch=2)
    losses = window_losses(pruned, linear_head(pruned, WINDOWS[:1]), WINDOWS, teacher, batch=2)

    log_p, log_q = full_log_probabilities(dense), full_log_probabilities(pruned)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    nll = -log_q.gather(2, WINDOWS[:, 1:, None]).squeeze(2).mean(1)
    assert kl.min() > 0.01
    assert torch.allclose(losses.kl, kl, atol=1e-4)
    assert torch.allclose(losses.nll, nll, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_a_loss_with_gradients_is_the_mean_of_those_without(family):
    """And its gradient is that of full distributions, with a bias in the head and with capped logits too."""
    dense, pruned = tiny_model(family), tiny_model(family)
    with torch.no_grad():
        for bound in list_sites(pruned):
            bound.weight()[:, ::2] = 0
    head = linear_head(dense, WINDOWS[:1])
    teacher = build_teacher(dense, head, WINDOWS)
    weight = next(value for name, value in pruned.named_parameters() if "layers" in name and value.dim() == 2)
    weight.requires_grad_(True)
    log_p, given = full_log_probabilities(dense), Batch({"input_ids": WINDOWS})
    log_q = pruned(input_ids=WINDOWS).logits.double().log_softmax(-1)[:, :-1]
    expected = {
        True: (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        False: -log_q.gather(2, WINDOWS[:, 1:, None]).mean(),
    }
    for taught, value in expected.items():
        found = batch_loss(pruned, linear_head(pruned, WINDOWS[:1]), given, teacher if taught else None)
        assert torch.allclose(found.double(), value, atol=1e-5)
        (one,), (other,) = (torch.autograd.grad(loss, weight, retain_graph=True) for loss in (found, value))
        assert torch.allclose(one, other, atol=1e-4 * other.abs().max())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_losses_by_row_with_gradients_are_those_without(family):
    model, other = tiny_model(family), tiny_model(family, seed=1)
    windows = random_windows(3, 12)
    head = linear_head(model, windows)
    teacher = build_teacher(model, head, windows)
    expected = window_losses(other, linear_head(other, windows), windows, teacher)
    other.requires_grad_(True)
    found = batch_losses(other, linear_head(other, windows), Batch({"input_ids": windows}), teacher)
    assert found.kl.tolist() == expected.kl.tolist()
    assert found.nll.tolist() == expected.nll.tolist()
    found.kl.sum().backward()
    assert next(other.parameters()).grad.abs().sum() > 0


# A linear head, one with a bias, and capped logits.
HEADS = {"llama": {}, "phi": {}, "gemma2": {"final_logit_softcapping": 2.0}}


def divergence_over_the_top(log_p, log_q, k):
    """Token by token as it is defined: a softmax of each model's values over the k that the dense one likes best."""
    found = torch.zeros(log_p.shape[:2], dtype=log_p.dtype)
    for row, column in itertools.product(*map(range, found.shape)):
        top = log_p[row, column].argsort(descending=True)[:k]
        p, q = (values[row, column, top].exp() for values in (log_p, log_q))
        p, q = p / p.sum(), q / q.sum()
        found[row, column] = (p * (p / q).log()).sum()
    return found


@pytest.mark.parametrize("family", HEADS)
def test_kl_over_the_most_likely_tokens(family):
    dense, pruned = tiny_model(family, **HEADS[family]), tiny_model(family, **HEADS[family])
    with torch.no_grad():
        for bound in list_sites(pruned):
            bound.weight()[:, ::2] = 0
    head = linear_head(dense, WINDOWS[:1])
    assert (head is None) == (family == "gemma2")
    assert (head is not None and head.bias is not None) == (family == "phi")
    log_p, log_q = full_log_probabilities(dense), full_log_probabilities(pruned)
    whole = window_losses(pruned, head, WINDOWS, build_teacher(dense, head, WINDOWS))
    for k in (1, 2, 3, 40, VOCABULARY - 1, VOCABULARY):
        teacher = build_teacher(dense, head, WINDOWS, batch=2, top_k=k)
        assert {name: tensor.dtype for name, tensor in teacher.tensors().items()} == {
            "negative_entropy": torch.float32,
            "log_probabilities": torch.float32,
            "tokens": torch.int32,
        }
        assert teacher.tokens.shape == teacher.log_probabilities.shape == (5, 15, k)
        found = window_losses(pruned, head, WINDOWS, teacher)
        assert torch.allclose(found.kl, divergence_over_the_top(log_p, log_q, k).mean(1), atol=1e-5)
        assert torch.equal(found.nll, whole.nll)
        assert window_losses(dense, head, WINDOWS, teacher).kl.abs().max() < 1e-5
    assert torch.allclose(found.kl, whole.kl, atol=1e-5)


@pytest.mark.parametrize("family", HEADS)
def test_gradients_of_the_kl_over_the_most_likely_tokens(family):
    dense, pruned = tiny_model(family, **HEADS[family]), tiny_model(family, seed=1, **HEADS[family])
    head = linear_head(dense, WINDOWS[:1])
    teacher = build_teacher(dense, head, WINDOWS, top_k=7)
    weight = next(value for name, value in pruned.named_parameters() if "layers" in name and value.dim() == 2)
    weight.requires_grad_(True)
    given, head = Batch({"input_ids": WINDOWS}), linear_head(pruned, WINDOWS[:1])
    log_p = full_log_probabilities(dense)
    log_q = pruned(input_ids=WINDOWS).logits.double().log_softmax(-1)[:, :-1]
    expected = divergence_over_the_top(log_p, log_q, 7)
    assert torch.allclose(batch_losses(pruned, head, given, teacher).kl, expected.mean(1), atol=1e-5)
    (other,) = torch.autograd.grad(expected.mean(), weight)
    (found,) = torch.autograd.grad(batch_loss(pruned, head, given, teacher), weight)
    assert torch.allclose(found, other, atol=1e-4 * other.abs().max())


def test_kl_of_the_teacher_itself_is_zero():
    model = tiny_model()
    head = linear_head(model, WINDOWS[:1])
    losses = window_losses(model, head, WINDOWS, build_teacher(model, head, WINDOWS))
    assert losses.kl.abs().max() < 1e-5


def test_linear_heads_keep_one_vector_a_token_and_capped_logits_keep_log_probabilities():
    linear, capped = tiny_model("llama"), tiny_model("gemma2", final_logit_softcapping=2.0)
    assert set(build_teacher(linear, linear_head(linear, WINDOWS[:1]), WINDOWS).tensors()) == {
        "negative_entropy",
        "embedding",
    }
    assert linear_head(capped, WINDOWS[:1]) is None
    assert "log_probabilities" in build_teacher(capped, None, WINDOWS).tensors()


def test_log_probabilities_that_do_not_fit_are_refused(monkeypatch):
    capped = tiny_model("gemma2", final_logit_softcapping=2.0)
    needed = WINDOWS.shape[0] * (WINDOWS.shape[1] - 1) * VOCABULARY * 2
    monkeypatch.setattr("evoprune.fitness.teacher.MAX_LOG_PROBABILITY_BYTES", needed)
    assert build_teacher(capped, None, WINDOWS).log_probabilities.dtype == torch.float16
    monkeypatch.setattr("evoprune.fitness.teacher.MAX_LOG_PROBABILITY_BYTES", needed - 1)
    with pytest.raises(InvalidInput, match="use fewer or shorter windows"):
        build_teacher(capped, None, WINDOWS)


def test_the_most_likely_tokens_take_the_memory_of_as_many(monkeypatch):
    """Eight bytes each, or six in half precision; for logits that are linear too."""
    capped, linear = tiny_model("gemma2", final_logit_softcapping=2.0), tiny_model()
    predictions, limit = WINDOWS.shape[0] * (WINDOWS.shape[1] - 1), "evoprune.fitness.teacher.MAX_LOG_PROBABILITY_BYTES"
    for model, head in ((capped, None), (linear, linear_head(linear, WINDOWS[:1]))):
        monkeypatch.setattr(limit, predictions * 5 * 8)
        assert build_teacher(model, head, WINDOWS, top_k=5).log_probabilities.dtype == torch.float32
        monkeypatch.setattr(limit, predictions * 5 * 6)
        half = build_teacher(model, head, WINDOWS, top_k=5)
        assert half.log_probabilities.dtype == torch.float16
        assert window_losses(model, head, WINDOWS, half).kl.abs().max() < 1e-3
        monkeypatch.setattr(limit, predictions * 5 * 6 - 1)
        with pytest.raises(InvalidInput, match=r"for their 5 most likely tokens take more"):
            build_teacher(model, head, WINDOWS, top_k=5)


def test_more_tokens_than_there_are():
    with pytest.raises(InvalidInput, match=f"top_k {VOCABULARY + 1} exceeds the vocabulary of {VOCABULARY}"):
        build_teacher(tiny_model(), None, WINDOWS, top_k=VOCABULARY + 1)


def test_without_a_teacher_there_is_no_kl():
    model = tiny_model()
    assert window_losses(model, linear_head(model, WINDOWS[:1]), WINDOWS, None).kl is None


def test_batches_do_not_change_the_losses():
    model = tiny_model()
    head = linear_head(model, WINDOWS[:1])
    one, all_at_once = (window_losses(model, head, WINDOWS, None, batch=batch).nll for batch in (1, 5))
    assert torch.allclose(one, all_at_once, atol=1e-6)
