"""Which units go: the lowest scores, at budgets met to a neuron."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from evoprune.fitness.unit_choice import choose_units
from evoprune.fitness.unit_costs import AttentionCost, MlpCost, UnitCosts, kept_by, unit_costs
from evoprune.fitness.unit_criteria import UNIT_CRITERIA, UnitScores, score_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import removed_count
from evoprune.metrics.shape import BlockShape, BlockWidths
from tests.models import FAMILIES, tiny_language_model


def planted(seed: int, groups: int = 4, heads: int = 8, neurons: int = 60, blocks: int = 5) -> list[UnitScores]:
    draw = torch.Generator().manual_seed(seed)
    return [
        UnitScores(*(torch.randn(count, generator=draw) for count in (groups, heads, neurons))) for _ in range(blocks)
    ]


def counted(groups: int = 4, heads: int = 8, neurons: int = 60, blocks: int = 5) -> UnitCosts:
    width = BlockWidths(groups, heads, neurons)
    attention, mlp = AttentionCost(33, 140, 130), MlpCost(17, 50)
    return UnitCosts("parameters", 0, (width,) * blocks, (attention,) * blocks, (mlp,) * blocks)


@pytest.mark.parametrize("options", [{}, {"heads": "balanced"}, {"spread": "global"}, {"spare": (0, 4)}])
def test_budgets_are_met_to_a_neuron(options: dict[str, Any]) -> None:
    costs = counted()
    rng = random.Random(0)
    for seed in range(60):
        fraction = rng.uniform(0.001, 0.5 if "spare" in options else 0.75)
        shapes = choose_units(planted(seed), costs, fraction, **options)
        for block, (shape, width) in enumerate(zip(shapes, costs.widths, strict=True)):
            shape.check(block, width)
            assert shape.groups and shape.heads and shape.neurons
            assert block not in options.get("spare", ()) or shape == width.whole
        removed = costs.dense - costs.of([kept_by(shape) for shape in shapes])
        assert 0 <= removed - removed_count(fraction, costs.dense) < 50


@pytest.mark.parametrize("heads", ["groups", "balanced"])
def test_uniformly_all_blocks_keep_as_much_and_the_best_of_it(heads: Any) -> None:
    scores = planted(1)
    shapes = choose_units(scores, counted(), 0.5, heads=heads)
    assert len({kept_by(shape)[:2] for shape in shapes}) == 1
    assert kept_by(shapes[0])[:2] == ((2, 2) if heads == "groups" else (4, 1))
    kept = [len(shape.neurons) for shape in shapes]
    assert max(kept) - min(kept) <= 1 and 20 <= min(kept) <= 35
    for score, shape in zip(scores, shapes, strict=True):
        assert set(shape.neurons) == set(score.neurons.topk(len(shape.neurons)).indices.tolist())
        if heads == "groups":
            assert set(shape.groups) == set(score.groups.topk(2).indices.tolist())
        else:
            assert all(
                shape.heads[group] == 2 * group + score.heads[2 * group : 2 * group + 2].argmax() for group in range(4)
            )


def test_globally_the_lowest_scores_of_the_model_go() -> None:
    """By hand: a group costs 8, a neuron 3; the budget of 13 takes the scores -5, -4 and -3, and -1 comes too late."""
    width = BlockWidths(2, 2, 4)
    costs = UnitCosts("parameters", 0, (width,) * 2, (AttentionCost(2, 5, 3),) * 2, (MlpCost(1, 3),) * 2)
    assert costs.dense == 2 * (2 + 16 + 1 + 12)
    scores = [
        UnitScores(torch.tensor([9.0, -4.0]), torch.zeros(2), torch.tensor([5.0, -5.0, 6.0, 7.0])),
        UnitScores(torch.tensor([8.0, 9.0]), torch.zeros(2), torch.tensor([-1.0, 5.0, -3.0, 6.0])),
    ]
    found = choose_units(scores, costs, 13 / 62, spread="global")
    assert found == [BlockShape((0,), (0,), (0, 2, 3)), BlockShape((0, 1), (0, 1), (0, 1, 3))]
    # A budget of 9 is passed by the group: of the neurons that went before, none would do without, so one comes back.
    scores[0] = UnitScores(torch.tensor([9.0, -4.0]), torch.zeros(2), torch.tensor([-7.0, -5.0, 6.0, 7.0]))
    found = choose_units(scores, costs, 9 / 62, spread="global")
    assert found == [BlockShape((0,), (0,), (1, 2, 3)), BlockShape((0, 1), (0, 1), (0, 1, 2, 3))]
    # A group that is too much, with no neuron to come back, stays, and neurons go for it.
    scores[0] = UnitScores(torch.tensor([-9.0, 9.0]), torch.zeros(2), scores[1].neurons)
    found = choose_units(scores, costs, 3 / 62, spread="global")
    assert [kept_by(shape) for shape in found] == [(2, 1, 3), (2, 1, 4)]


def test_the_last_of_a_part_stays() -> None:
    scores = [UnitScores(torch.full((4,), -9.0), torch.zeros(8), torch.arange(60.0)) for _ in range(5)]
    shapes = choose_units(scores, counted(), 0.6, spread="global")
    assert {len(shape.groups) for shape in shapes} == {1}


@pytest.mark.parametrize("family", FAMILIES)
def test_live_models(family: str) -> None:
    language_model = tiny_language_model(family)
    costs = unit_costs(language_model)
    criterion = UNIT_CRITERIA["magnitude"]
    shapes = choose_units(score_units(language_model, criterion), costs, 0.3, spread=criterion.spread)
    removed = costs.dense - costs.of([kept_by(shape) for shape in shapes])
    assert 0 <= removed - removed_count(0.3, costs.dense) < costs.mlp[0].at(2) - costs.mlp[0].at(1)


def test_nothing_and_too_much() -> None:
    costs = counted()
    assert choose_units(planted(0), costs, 0.0) == [width.whole for width in costs.widths]
    for options in ({}, {"spread": "global"}, {"spare": range(5)}):
        with pytest.raises(InvalidInput, match=r"0\.99 of the parameters of heads and MLPs cannot go"):
            choose_units(planted(0), costs, 0.99, **options)
    with pytest.raises(InvalidInput, match="scores of 4 blocks and costs of 5"):
        choose_units(planted(0)[:4], costs, 0.5)
    with pytest.raises(InvalidInput, match="different groups are not compared"):
        choose_units(planted(0), costs, 0.5, spread="global", heads="balanced")
    cache = UnitCosts("kv_bytes", 0, costs.widths, (AttentionCost(0, 16, 0),) * 5, (MlpCost(0, 0),) * 5)
    with pytest.raises(InvalidInput, match="neurons do not meet a budget of kv_bytes"):
        choose_units(planted(0), cache, 0.5)
