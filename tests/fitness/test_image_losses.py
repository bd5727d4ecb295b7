"""What a search measures on images with texts, against full distributions over the text tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from evoprune.fitness.level_evaluator import LevelEvaluator
from evoprune.fitness.levels import build_levels
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Samples
from evoprune.fitness.teacher import build_teacher, linear_head, window_losses
from evoprune.metrics.criterion import CRITERIA
from tests.multimodal import FAMILIES, IMAGE, LAYERS, encoded, padded, tiny_multimodal_model
from tests.prepared import tiny_prepared


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def mixed(model: LanguageModel, family: str) -> Samples:
    """Samples of different lengths, one with padding in front, one without an image."""
    batches = [encoded(family, (seed,), words=8 + seed) for seed in range(3)]
    batches[1] = padded(batches[1], 3)
    batches.append(encoded(family, (7,), text_only=True))
    return Samples(batches, model.model.config)


def text_log_probabilities(model: LanguageModel, samples: Samples) -> list[tuple[Tensor, Tensor]]:
    """([k, vocabulary] float64 log-probabilities, [k] targets) of the text tokens of each sample, token by token."""
    found = []
    for batch in samples:
        ids = batch.inputs["input_ids"][0].tolist()
        with torch.no_grad():
            log_p = model.model(**batch.inputs).logits[0].double().log_softmax(-1)
        real = batch.inputs["attention_mask"][0].tolist()
        places = [t for t in range(1, len(ids)) if real[t] and real[t - 1] and ids[t] != IMAGE]
        found.append((log_p[[t - 1 for t in places]], torch.tensor([ids[t] for t in places])))
    return found


def test_losses_are_those_of_the_text(family: str) -> None:
    dense, pruned = tiny_multimodal_model(family), tiny_multimodal_model(family)
    for bound in pruned.sites:
        bound.weight()[:, ::2] = 0
    samples = mixed(dense, family)
    head = linear_head(dense.model, samples)
    assert head is not None
    teacher = build_teacher(dense.model, head, samples)
    losses = window_losses(pruned.model, linear_head(pruned.model, samples), samples, teacher)
    reduced = window_losses(pruned.model, head, samples, build_teacher(dense.model, head, samples, top_k=9))
    assert losses.kl is not None and reduced.kl is not None
    before, after = (text_log_probabilities(model, samples) for model in (dense, pruned))
    for sample, ((log_p, targets), (log_q, _)) in enumerate(zip(before, after, strict=True)):
        kl = (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
        nll = -log_q[torch.arange(len(targets)), targets].mean().item()
        assert kl > 0.001
        assert losses.kl[sample].item() == pytest.approx(kl, abs=1e-4)
        assert losses.nll[sample].item() == pytest.approx(nll, abs=1e-4)
        top = log_p.topk(9).indices
        p, q = (values.gather(1, top).softmax(1) for values in (log_p, log_q))
        assert reduced.kl[sample].item() == pytest.approx((p * (p / q).log()).sum(1).mean().item(), abs=1e-5)
    part = window_losses(pruned.model, head, samples[1:3], teacher[slice(1, 3)])
    assert torch.equal(part.nll, losses.nll[1:3])
    assert part.kl is not None
    assert torch.equal(part.kl, losses.kl[1:3])


def test_samples_come_back_from_their_tensors(family: str) -> None:
    samples = mixed(tiny_multimodal_model(family), family)
    again = Samples.from_tensors(samples.tensors())
    assert again.digest() == samples.digest()
    assert again.tokens == samples.tokens
    for one, other in zip(samples, again, strict=True):
        assert (one.predicted == other.predicted).all()  # type: ignore[union-attr]


def test_a_candidate_starts_at_its_first_change(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images go through tower and embedding as ever; what is left out of the language model changes no bit."""
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    model, plain = tiny_multimodal_model(family), tiny_multimodal_model(family)
    samples = mixed(model, family)
    prepared = tiny_prepared(tmp_path / "set", model)
    teacher = build_teacher(model.model, linear_head(model.model, samples), samples)
    database = build_levels(prepared, CRITERIA["wanda"], "wanda")
    evaluator = LevelEvaluator(model, prepared.dense, database, samples, teacher)
    assert evaluator.prefix.boundaries == tuple(range(1, LAYERS))
    parent = {site.name: 128 for site in evaluator.sites}
    child = {**parent, evaluator.sites[-1].name: 64}
    evaluator.adopt(parent, 0, len(samples))
    found = evaluator.evaluate(child, 0, len(samples))
    whole = LevelEvaluator(plain, prepared.dense, database, samples, teacher)
    expected = whole.evaluate(child, 0, len(samples))
    assert torch.equal(found.nll, expected.nll)
    with evaluator.prefix.started((0, 1), LAYERS - 1) as start:
        assert start == LAYERS - 1
