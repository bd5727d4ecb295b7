"""N:M masks chosen by matrix and by weight: every group of the model keeps exactly N (mask policies, item 15)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evoprune.fitness.mask_units import UnitTable, unit_table
from evoprune.fitness.maskers import ByMetrics, ByWeights
from evoprune.fitness.matrix_masks import MatrixMasks, MetricMasks, WeightMasks
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.pruning import mask_rule, prune_model
from evoprune.fitness.resident import ResidentWeights
from evoprune.fitness.unit_scores import mask_unit_scores
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from tests.models import random_windows, tiny_language_model
from tests.prepared import tiny_prepared

METRICS = ("wanda", "magnitude", "ria", "mul(W,W)")
PATTERNS = [(2, 4), (1, 4), (4, 8)]


@pytest.fixture(params=["llama", "gpt2"])
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_language_model(request.param)


@pytest.fixture
def prepared(tmp_path: Path, language_model: LanguageModel) -> Prepared:
    return tiny_prepared(tmp_path / "prepared", language_model)


def masks_of(language_model: LanguageModel, prepared: Prepared, table: UnitTable) -> MatrixMasks:
    if isinstance(table.masker, ByMetrics):
        return MetricMasks(language_model, prepared.dense, table, prepared.statistics())
    return WeightMasks(language_model, prepared.dense, table)


def random_choice(table: UnitTable, seed: int = 0) -> np.ndarray:
    """Exactly so many units of every stratum."""
    assert table.strata is not None
    labels, keep = table.strata
    draws = np.random.default_rng(seed).random(table.n).reshape(int(labels[-1]) + 1, -1)
    mask = np.zeros_like(draws, dtype=bool)
    np.put_along_axis(mask, np.argsort(draws, axis=1)[:, :keep], True, axis=1)
    return mask.reshape(-1)


def weights(language_model: LanguageModel) -> list[Tensor]:
    return [bound.weight().clone() for bound in language_model.sites]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("by", ["metrics", "weights"])
def test_every_group_keeps_exactly_n(
    language_model: LanguageModel, prepared: Prepared, pattern: tuple[int, int], by: str
) -> None:
    masker = ByMetrics(pattern, METRICS) if by == "metrics" else ByWeights(pattern, "wanda")
    table = unit_table(language_model, masker)
    dense = weights(language_model)
    masks = masks_of(language_model, prepared, table)
    with masks.kept(random_choice(table)):
        for before, after in zip(dense, weights(language_model), strict=True):
            kept = (after != 0).view(len(after), -1, pattern[1]).sum(2)
            assert (kept == pattern[0]).all()
            assert torch.equal(after, torch.where(after != 0, before, 0))
    masks.restore()
    assert all(map(torch.equal, dense, weights(language_model)))


def test_a_choice_is_what_prune_makes_by_each_metric(language_model: LanguageModel, prepared: Prepared) -> None:
    table = unit_table(language_model, ByMetrics((2, 4), METRICS))
    choice = np.eye(len(METRICS), dtype=bool)[np.arange(len(language_model.sites)) * 5 % 4].reshape(-1)
    with masks_of(language_model, prepared, table).kept(choice):
        found = weights(language_model)
    chosen = choice.reshape(-1, len(METRICS)).argmax(1)
    assert len(set(chosen.tolist())) == len(METRICS)
    for metric, name in enumerate(METRICS[:3]):
        other = tiny_language_model(language_model.name.removeprefix("tiny-"))
        prune_model(
            other, CRITERIA[name], mask_rule(CRITERIA[name], None, "2:4", None), statistics=prepared.statistics()
        )
        for index in np.flatnonzero(chosen == metric):
            assert torch.equal(found[index], other.sites[index].weight())


@pytest.mark.parametrize("by", ["metrics", "weights"])
def test_only_what_changes_is_rewritten(
    language_model: LanguageModel, prepared: Prepared, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masker = ByMetrics((2, 4), METRICS) if by == "metrics" else ByWeights((2, 4), "wanda")
    table = unit_table(language_model, masker)
    masks = masks_of(language_model, prepared, table)
    first = random_choice(table)
    with masks.kept(first):
        expected = weights(language_model)
    written: list[str] = []
    before = ResidentWeights.write
    monkeypatch.setattr(
        ResidentWeights,
        "write",
        lambda self, bound, keep: (written.append(bound.site.name), before(self, bound, keep))[1],
    )
    second = first.copy()
    second[table.of_row(2)] = np.roll(second[table.of_row(2)], 1 if by == "metrics" else 4)
    with masks.kept(second):
        assert written == [language_model.sites[2].site.name]
    with masks.kept(first):
        assert all(map(torch.equal, expected, weights(language_model)))
    assert len(written) == 2


@pytest.mark.parametrize("by", ["metrics", "weights"])
def test_values_of_a_choice_are_its_mask_and_gradients_are_differences(
    language_model: LanguageModel, prepared: Prepared, by: str
) -> None:
    masker = ByMetrics((2, 4), METRICS) if by == "metrics" else ByWeights((2, 4), "wanda")
    table = unit_table(language_model, masker)
    masks = masks_of(language_model, prepared, table)
    mask = random_choice(table)
    tokens = random_windows(1, 8)

    def total() -> Tensor:
        found: Tensor = language_model.model(input_ids=tokens, use_cache=False).logits.square().mean()
        return found

    with masks.kept(mask), torch.no_grad():
        expected = total()
    names = [name for name, _ in language_model.model.named_parameters()]
    values = torch.from_numpy(mask.astype(np.float32)).requires_grad_()
    with masks.relaxed(values):
        loss = total()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        loss.backward()
    assert [name for name, _ in language_model.model.named_parameters()] == names
    assert values.grad is not None
    direction = torch.randn(table.n, generator=torch.Generator().manual_seed(1))
    steps = []
    for sign in (1, -1):
        with torch.no_grad(), masks.relaxed(values.detach() + sign * 1e-3 * direction):
            steps.append(total().item())
    assert (steps[0] - steps[1]) / 2e-3 == pytest.approx((values.grad * direction).sum().item(), rel=2e-2)


def test_scores_to_start_from(language_model: LanguageModel, prepared: Prepared) -> None:
    statistics = prepared.statistics()
    table = unit_table(language_model, ByMetrics((2, 4), METRICS))
    found = mask_unit_scores(language_model, table, CRITERIA["magnitude"], statistics, 0.5)
    assert found.reshape(-1, len(METRICS)).tolist() == [[0, 1, 0, 0]] * len(language_model.sites)
    with pytest.raises(InvalidInput, match="none of wanda, magnitude"):
        mask_unit_scores(language_model, table, CRITERIA["random"], statistics, 0.5)
    single = unit_table(language_model, ByWeights((2, 4), "magnitude"))
    found = mask_unit_scores(language_model, single, CRITERIA["magnitude"], statistics, 0.5)
    sizes = torch.cat([weight.abs().flatten() for weight in weights(language_model)])
    assert np.allclose(found, sizes.numpy())
