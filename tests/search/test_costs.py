"""Costs against counts of other kinds: weights that are not zero, and PyTorch's own count of multiply-adds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from evoprune.fitness.adapters import list_sites
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.ranks import GONE, rank_bytes
from evoprune.metrics.records import Site
from evoprune.search.costs import Latency, MultiplyAdds, Parameters, parts_of, saved_percent
from tests.models import HIDDEN, VOCABULARY, tiny_model

TOKENS = 24


class Nothing(nn.Module):
    """In place of a part that is gone."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self._outputs = outputs

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return zeros if self._outputs == 1 else (zeros, None)


def levels_without(sites: Sequence[Site], gone: set[tuple[int, str]]) -> list[int]:
    parts = {at: part for part, places in parts_of(sites).items() for at in places}
    return [GONE if parts[at] in gone else 0 for at in range(len(sites))]


def test_parameters_are_the_weights_that_are_not_zero() -> None:
    model = tiny_model()
    bound = list_sites(model)
    cost = Parameters([one.site for one in bound])
    assert cost.dense == sum(int((one.weight() != 0).sum()) for one in bound) == cost.of([0] * len(bound))
    rng = random.Random(0)
    levels = [rng.choice([0, 1, 57, 128, 200, 255, GONE]) for _ in bound]
    for one, level in zip(bound, levels, strict=True):
        keep = rank_bytes(one.weight().abs().float()).int() >= level
        one.weight().masked_fill_(~keep, 0)
    assert cost.of(levels) == sum(int((one.weight() != 0).sum()) for one in bound)


@pytest.mark.parametrize(
    "gone",
    [set(), {(0, "attention")}, {(1, "mlp")}, {(0, "attention"), (1, "attention"), (0, "mlp")}],
    ids=["dense", "one attention", "one MLP", "three parts"],
)
def test_multiply_adds_are_those_of_a_model_without_the_parts(gone: set[tuple[int, str]]) -> None:
    model = tiny_model(attn_implementation="eager")  # the counter knows no fused attention on a CPU
    sites = [one.site for one in list_sites(model)]
    layers: Any = model.model.layers
    for block, part in gone:
        if part == "attention":
            layers[block].self_attn = Nothing(2)
        else:
            layers[block].mlp = Nothing(1)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.arange(TOKENS)[None], use_cache=False)
    # It counts a multiply-add as two. Beside the parts there are the head and the angles of positions, which stay.
    head = 2 * TOKENS * HIDDEN * VOCABULARY
    blocks = sum(
        count
        for name, operators in counter.get_flop_counts().items()
        if name.endswith(("self_attn", "mlp"))
        for count in operators.values()
    )
    assert counter.get_total_flops() - head - blocks < TOKENS * HIDDEN
    assert MultiplyAdds(sites, TOKENS).of(levels_without(sites, gone)) == blocks / 2


def test_masks_alone_cost_multiply_adds_in_proportion_to_weights() -> None:
    sites = [one.site for one in list_sites(tiny_model())]
    cost, weights = MultiplyAdds(sites, TOKENS), Parameters(sites)
    levels = [17 * at % 256 for at in range(len(sites))]
    assert cost.dense - cost.of(levels) == TOKENS * (weights.dense - weights.of(levels))
    # An attention of which one matrix is left still multiplies queries with keys.
    one_left = [GONE if site.block == 0 and "attn" in site.kind and "q_proj" not in site.kind else 0 for site in sites]
    assert cost.dense - cost.of(one_left) == TOKENS * (weights.dense - weights.of(one_left))


def test_latency_is_a_sum_over_the_parts_that_are_there() -> None:
    sites = [one.site for one in list_sites(tiny_model())]
    table = {(0, "attention"): 100, (0, "mlp"): 20, (1, "attention"): 300, (1, "mlp"): 40}
    cost = Latency(sites, 1000, table)
    assert cost.dense == 1460
    assert cost.of([255] * len(sites)) == 1460  # zeros make nothing faster
    assert cost.of(levels_without(sites, {(0, "mlp"), (1, "attention")})) == 1140
    with pytest.raises(InvalidInput, match="nobody has measured the mlp of block 1"):
        Latency(sites, 0, {part: 1 for part in table if part != (1, "mlp")})


def test_percent_saved_is_rounded_in_whole_numbers() -> None:
    for dense in (7, 100, 15360, 10**18 + 1):
        for cost in (0, dense // 3, dense // 2, dense - 1, dense):
            assert abs(saved_percent(cost, dense) - 100 * (dense - cost) / dense) <= 0.5 + 1e-9
    assert saved_percent(395, 1000) == 61 and saved_percent(396, 1000) == 60
