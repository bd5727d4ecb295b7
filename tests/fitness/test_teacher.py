"""The cached teacher against full log-probabilities, for every family."""

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


def test_without_a_teacher_there_is_no_kl():
    model = tiny_model()
    assert window_losses(model, linear_head(model, WINDOWS[:1]), WINDOWS, None).kl is None


def test_batches_do_not_change_the_losses():
    model = tiny_model()
    head = linear_head(model, WINDOWS[:1])
    one, all_at_once = (window_losses(model, head, WINDOWS, None, batch=batch).nll for batch in (1, 5))
    assert torch.allclose(one, all_at_once, atol=1e-6)
