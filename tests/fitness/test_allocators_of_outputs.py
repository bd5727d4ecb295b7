"""Allocators that read outputs or losses, each against a reference written here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from evoprune.fitness.allocating import ModelEvidence
from evoprune.fitness.allocators import ALLOCATORS, configured
from evoprune.fitness.allocators.atp import slopes
from evoprune.fitness.allocators.das import kept_by_score
from evoprune.fitness.allocators.dp import least_error
from evoprune.fitness.models import LanguageModel
from evoprune.metrics.allocation import repair
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from tests.fitness.planted_evidence import SHAPES, TEXT_A, TEXT_B, Planted
from tests.models import tiny_language_model

pytestmark = pytest.mark.usefixtures("one_thread")


# Trying out


def test_atp() -> None:
    assert slopes(0.7, 32, 0.002, 100) == pytest.approx([0.002 * step for step in range(1, 10)])
    assert slopes(0.5, 2, 0.002, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert slopes(0.5, 1, 0.002, 4) == [0.0]
    tried = []

    def loss(requested: Sequence[float]) -> float:
        tried.append(list(requested))
        return abs(requested[-1] - requested[0] - 0.3)

    evidence = Planted(n_blocks=4, loss_of=loss)
    found = configured("atp", {"evaluations": 10}).request(evidence)
    assert len(tried) == 10
    # The tenths of the largest slope, 1/3, and three steps from first to last: 0.3 is the third.
    assert found[:: len(SHAPES)] == pytest.approx([0.35, 0.45, 0.55, 0.65])


@pytest.mark.parametrize("name", ["block-influence", "shortened-llama"])
def test_blocks_by_importance(name: str) -> None:
    evidence = Planted(n_blocks=3, per_block=[4.0, 1.0, 2.0])
    found = configured(name, {"spread": 0.15}).request(evidence)[:: len(SHAPES)]
    assert found == pytest.approx([0.5 - 0.3 * (x - 4 / 9) for x in (1, 0, 1 / 3)])
    dropped = repair(configured(name, {"drop": "true"}).request(evidence), evidence.sites, 0.5)
    # The second block keeps a weight in each row, the third gives the rest of the half, the first stays dense.
    assert [share for share, site in zip(dropped, evidence.sites, strict=True) if site.block == 0] == [0] * 3
    second = [share for share, site in zip(dropped, evidence.sites, strict=True) if site.block == 1]
    assert second == pytest.approx([11 / 12, 11 / 12, 7 / 8], abs=1e-5)
    with pytest.raises(InvalidInput, match=r"importance of the block of m\.2\.0 is nan"):
        ALLOCATORS[name].request(Planted(n_blocks=3, per_block=[1.0, 2.0, math.nan]))


def evidence_of(model: LanguageModel) -> ModelEvidence:
    return ModelEvidence(model, 0.5, CRITERIA["magnitude"], None, TEXT_A, TEXT_B, lambda what, done, total: None)


def test_influence_is_that_of_the_hidden_states() -> None:
    model = tiny_language_model("llama", num_hidden_layers=3)
    states = model.model(input_ids=TEXT_A, use_cache=False, output_hidden_states=True).hidden_states
    expected = [
        (1 - torch.cosine_similarity(states[index].double(), states[index + 1].double(), dim=-1)).mean().item()
        for index in (0, 1)  # the last state has been through the final norm
    ]
    assert evidence_of(model).influence()[:2] == pytest.approx(expected)


def test_the_loss_without_a_block_is_that_of_a_model_without_it() -> None:
    model = tiny_language_model("llama", num_hidden_layers=3)
    found = evidence_of(model).losses_without()
    for block in range(3):
        shorter = tiny_language_model("llama", num_hidden_layers=3).model
        del shorter.model.layers[block]
        shorter.config.num_hidden_layers = 2
        assert found[block] == pytest.approx(
            shorter(input_ids=TEXT_B, labels=TEXT_B, use_cache=False).loss.item(), rel=1e-5
        )


def test_losses_are_those_of_the_pruned_model() -> None:
    model = tiny_language_model("gpt2")
    requested = [0.2, 0.9, 0.5, 0.4, 0.6, 0.3, 0.7, 0.5]
    found = evidence_of(model).losses([requested, [0.5] * 8])
    pruned = tiny_language_model("gpt2")
    for bound, share in zip(pruned.sites, repair(requested, [bound.site for bound in pruned.sites], 0.5), strict=True):
        weight = bound.weight()
        order = weight.abs().argsort(dim=1, stable=True)[:, : round(share * weight.shape[1])]
        weight.scatter_(1, order, 0.0)
    assert found[0] == pytest.approx(
        pruned.model(input_ids=TEXT_B, labels=TEXT_B, use_cache=False).loss.item(), rel=1e-5
    )
    assert found[1] != found[0]


# Dynamic programming


def test_dynamic_programming_finds_what_trying_all_finds() -> None:
    draw = np.random.default_rng(0)
    for _ in range(60):
        sizes = draw.choice([4, 6, 10], 4)
        errors = [[0.0, *np.sort(draw.random(4))] for _ in sizes]
        costs = [[int(level * size) for level in range(5)] for size in sizes]
        budget = int(draw.integers(0, 4 * int(sizes.sum())))
        levels = least_error(errors, costs, budget)
        assert sum(cost[level] for cost, level in zip(costs, levels, strict=True)) >= budget
        found = sum(error[level] for error, level in zip(errors, levels, strict=True))
        assert found == pytest.approx(
            min(
                sum(error[level] for error, level in zip(errors, every, strict=True))
                for every in itertools.product(range(5), repeat=4)
                if sum(cost[level] for cost, level in zip(costs, every, strict=True)) >= budget
            )
        )


@pytest.mark.parametrize("error", ["H", "X_ss"])
def test_dp_minimises_the_sum_of_the_output_errors(error: str) -> None:
    evidence = Planted(n_blocks=2, shapes=((8, 12), (4, 12)), target=0.5)
    tables = []
    for site in evidence.sites:
        weight, scores = evidence.weight(site).double(), evidence.scores(site)
        gram = evidence.statistic(site, error).double()
        gram = gram if error == "H" else gram.flatten().diag()
        row = []
        for level in range(4):
            pruned = weight.clone()
            pruned.scatter_(1, scores.argsort(dim=1, stable=True)[:, : 3 * level], 0.0)
            lost = weight - pruned
            row.append((torch.trace(lost @ gram @ lost.T) / torch.trace(weight @ gram @ weight.T)).item())
        tables.append(row)
    best = min(
        (sum(row[level] for row, level in zip(tables, levels, strict=True)), levels)
        for levels in itertools.product(range(4), repeat=4)
        if sum(3 * level * site.out_features for level, site in zip(levels, evidence.sites, strict=True)) >= 144
    )[1]
    assert configured("dp", {"levels": 4, "error": error}).request(evidence) == [level / 4 for level in best]


# TAMP

SHAPES_OF = {
    "llama-3-8b": (4096, 1024, 14336),
    "qwen2-7b": (3584, 512, 18944),
    "llama-2-7b": (4096, 4096, 11008),
}
# Sparsity of (q and o, k and v, gate and up and down) at equal scores: multimodal allocation chapter, 1.2.
GOLDEN = {
    ("llama-3-8b", 0.5): (0.400, 0.0, 0.543),
    ("llama-3-8b", 0.6): (0.510, 0.0, 0.646),
    ("llama-3-8b", 0.7): (0.614, 0.057, 0.747),
    ("qwen2-7b", 0.5): (0.271, 0.0, 0.538),
    ("qwen2-7b", 0.6): (0.377, 0.0, 0.639),
    ("qwen2-7b", 0.7): (0.483, 0.0, 0.740),
    ("llama-2-7b", 0.5): (0.428, 0.428, 0.536),
    ("llama-2-7b", 0.6): (0.528, 0.528, 0.636),
    ("llama-2-7b", 0.7): (0.628, 0.628, 0.736),
}


def block_sizes(model: str, blocks: int = 1) -> list[int]:
    hidden, keys, inner = SHAPES_OF[model]
    return [hidden * hidden, hidden * keys, hidden * keys, hidden * hidden, *[hidden * inner] * 3] * blocks


@pytest.mark.parametrize(("model", "target"), GOLDEN)
def test_equal_scores_give_the_published_allocation(model: str, target: float) -> None:
    """Multimodal allocation chapter, 7.3."""
    sizes = block_sizes(model)
    kept = kept_by_score([1.0] * 7, sizes, target)
    q, k, v, o, gate, up, down = (1 - stays / size for stays, size in zip(kept, sizes, strict=True))
    assert (q, k, gate) == pytest.approx(GOLDEN[model, target], abs=1e-3)
    assert (o, v, up) == pytest.approx((q, k, down), abs=1e-6)
    fair = kept_by_score([1.0] * 7, sizes, target, omega=1)
    assert [1 - stays / size for stays, size in zip(fair, sizes, strict=True)] == pytest.approx([target] * 7, abs=1e-6)


def test_a_ramp_of_scores_is_fair_to_sizes() -> None:
    sizes = block_sizes("llama-3-8b", 32)
    scores = [1 + block / 31 for block in range(32) for _ in range(7)]
    kept = kept_by_score(scores, sizes, 0.5, omega=1)
    sparsities = [1 - stays / size for stays, size in zip(kept, sizes, strict=True)]
    assert sparsities[:7] == pytest.approx([0.533] * 7, abs=1e-3)
    assert sparsities[-7:] == pytest.approx([0.467] * 7, abs=1e-3)


def test_kept_weights_hold_to_what_was_asked() -> None:
    draw = np.random.default_rng(1)
    for _ in range(300):
        sizes = [int(size) for size in draw.integers(1, 4000, 9)]
        scores = draw.random(9).tolist()
        target, delta = float(draw.uniform(0.05, 0.9)), float(draw.uniform(0.02, 0.3))
        floor = float(draw.uniform(0, target / 2))
        kept = kept_by_score(scores, sizes, target, delta=delta, omega=float(draw.uniform(0, 1.5)), floor=floor)
        assert sum(kept) == round((1 - target) * sum(sizes))
        for stays, size in zip(kept, sizes, strict=True):
            assert (1 - target - delta) * size - 1 <= stays <= (1 - floor) * size + 1
        options = {"delta": delta, "floor": floor, "gamma": 2.0}
        plain = kept_by_score(scores, sizes, target, **options)
        scaled = kept_by_score([7 * score for score in scores], sizes, target, **options)
        assert np.abs(np.subtract(plain, scaled)).max() <= 1
        order = draw.permutation(9)
        permuted = kept_by_score([scores[i] for i in order], [sizes[i] for i in order], target, **options)
        assert np.abs(np.subtract(permuted, [plain[i] for i in order])).max() <= 1


def test_scores_that_say_nothing() -> None:
    sizes = [100, 300, 50]
    assert kept_by_score([0.0] * 3, sizes, 0.5) == [50, 150, 25]
    assert sum(kept_by_score([1.0, 0.0, 0.0], sizes, 0.5)) == 225
    for scores in ([1.0, math.nan, 1.0], [1.0, -1.0, 1.0], [math.inf, 1.0, 1.0]):
        with pytest.raises(InvalidInput, match="no allocation follows"):
            kept_by_score(scores, sizes, 0.5)
    with pytest.raises(InvalidInput, match=r"should lose at least 0\.6"):
        kept_by_score([1.0] * 3, sizes, 0.5, floor=0.6)
    with pytest.raises(InvalidInput, match=r"the diversity of m\.0\.1 is nan"):
        ALLOCATORS["das"].request(Planted(per_site=[0.1, math.nan, *[0.1] * 10]))


def test_more_diversity_keeps_more() -> None:
    """Multimodal allocation chapter, 7.2, for the allocation."""
    evidence = Planted(n_blocks=4, shapes=((8, 12),), per_site=[0.0, 0.4, 1.0, 0.2])
    for name in ("das", "das-size-fair"):
        requested = ALLOCATORS[name].request(evidence)
        assert sorted(range(4), key=lambda index: -requested[index]) == [0, 3, 1, 2]
        assert max(requested) == pytest.approx(0.6, abs=0.01)
