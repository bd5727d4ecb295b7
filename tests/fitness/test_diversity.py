"""Diversity of tokens against all pairs, on planted tokens, and of a model whatever the batch."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from evoprune.fitness.allocating import ModelEvidence
from evoprune.fitness.diversity import DiversityMean, token_diversity
from evoprune.metrics.criterion import CRITERIA
from tests.models import random_windows, tiny_language_model


def by_pairs(tokens: np.ndarray, modality: np.ndarray, positive: bool) -> dict[str, float]:
    """Every pair by itself; within a modality, those of positive cosine alone if asked for."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    terms = {}
    for kind in np.unique(modality):
        part = unit[modality == kind]
        cosines = [a @ b for a, b in combinations(part, 2)]
        cosines = [cosine for cosine in cosines if cosine > 0 or not positive]
        if cosines:
            terms[f"{kind}"] = 1 - np.mean(cosines)
    for one, other in combinations(np.unique(modality), 2):
        terms[f"{one}-{other}"] = 1 - np.mean(unit[modality == one] @ unit[modality == other].T)
    return terms


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("pairs", ["all", "positive"])
def test_streamed_means_are_those_of_all_pairs(modalities: int, pairs: str) -> None:
    """Multimodal allocation chapter, 7.1."""
    generator = torch.Generator().manual_seed(modalities)
    tokens = torch.randn(30, 6, generator=generator) + 0.5
    modality = torch.randint(0, modalities, (30,), generator=generator)
    found = token_diversity(tokens, modality, pairs)
    expected = by_pairs(tokens.double().numpy(), modality.numpy(), pairs == "positive")
    assert found.keys() == expected.keys()
    assert len(found) == modalities * (modalities + 1) // 2
    for term, value in expected.items():
        assert found[term] == pytest.approx(value, abs=1e-6)


def test_planted_diversity() -> None:
    """Multimodal allocation chapter, 7.2: alike 0, orthogonal 1, and the order of what lies between."""
    assert token_diversity(torch.ones(5, 8)) == pytest.approx({"0": 0.0})
    assert token_diversity(torch.eye(8)) == pytest.approx({"0": 1.0})
    noise = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    found = [token_diversity(1 + width * noise)["0"] for width in (0.1, 0.5, 1.0, 4.0)]
    assert found == sorted(found)


def test_absent_modalities_have_no_terms() -> None:
    tokens = torch.eye(4)
    assert set(token_diversity(tokens, torch.tensor([0, 0, 0, 1]))) == {"0", "0-1"}
    assert token_diversity(tokens[:1]) == {}
    assert token_diversity(torch.eye(4), pairs="positive") == {}
    mean = DiversityMean("all")
    mean.add(torch.ones(2, 1, 8))
    assert np.isnan(mean.result())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_is_measured_sample_by_sample(family: str) -> None:
    """Multimodal allocation chapter, 7.6: in one batch of four or one at a time; OPT flattens its tokens inside."""
    model, windows = tiny_language_model(family), random_windows(4, 12)
    evidence = ModelEvidence(model, 0.5, CRITERIA["magnitude"], None, windows, None, lambda what, done, total: None)
    found = evidence.diversity("all")
    heard: dict[str, torch.Tensor] = {}
    for bound in model.sites:
        bound.module.register_forward_hook(
            lambda module, args, output, name=bound.site.name: heard.__setitem__(name, output.view(4, 12, -1))
        )
    model.model(input_ids=windows, use_cache=False)
    for bound, diversity in zip(model.sites, found, strict=True):
        values = [by_pairs(sample.double().numpy(), np.zeros(12), False)["0.0"] for sample in heard[bound.site.name]]
        assert diversity == pytest.approx(np.mean(values), abs=1e-5)
