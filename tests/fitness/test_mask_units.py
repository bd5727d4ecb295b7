"""Unit tables, against live models cut and counted, and against lists written by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from evoprune.fitness.forms import cut_model
from evoprune.fitness.mask_units import UnitTable, kept_cost, kept_units, shape_of, unit_columns, unit_table
from evoprune.fitness.maskers import ByMetrics, ByUnits, ByWeights, masker_from
from evoprune.fitness.unit_costs import unit_costs
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.shape import BlockShape, BlockWidths
from tests.models import tiny_language_model

WIDTHS = [BlockWidths(2, 4, 48)] * 2


def test_units_are_listed_by_block_and_the_last_is_shorter() -> None:
    table = unit_table(tiny_language_model(), ByUnits(("neurons:20", "kv-group")))
    assert [(unit.row.kind, unit.row.block, unit.index, list(unit.members)) for unit in table.units()] == [
        unit
        for block in (0, 1)
        for unit in [
            ("kv-group", block, 0, [0]),
            ("kv-group", block, 1, [1]),
            ("neurons:20", block, 0, list(range(20))),
            ("neurons:20", block, 1, list(range(20, 40))),
            ("neurons:20", block, 2, list(range(40, 48))),
        ]
    ]
    assert table.n == 10
    assert table.groups.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    # A KV group: 2 heads of 8 rows of q, 8 of k and 8 of v, and 16 columns of o; a neuron: 3 * 32.
    assert table.costs[:5].tolist() == [32 * (16 + 8 + 8 + 16)] * 2 + [96 * 20, 96 * 20, 96 * 8]
    assert table.costs.tolist() == [unit.cost for unit in table.units()]
    assert {row.name for row in table.rows} == {
        f"model.layers.{block}.{part}" for block in (0, 1) for part in ("self_attn", "mlp")
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi", "gemma2"])
@pytest.mark.parametrize("kinds", [("kv-group", "neuron"), ("query-head", "neurons:7"), ("attention", "mlp")])
def test_kept_costs_are_what_a_cut_model_has_less_of(family: str, kinds: tuple[str, ...]) -> None:
    language_model = tiny_language_model(family)
    table, costs = unit_table(language_model, ByUnits(kinds)), unit_costs(language_model)
    assert (table.dense, table.rest) == (costs.dense, costs.rest)
    assert table.fixed + table.costs.sum() == costs.dense
    mask = np.ones(table.n, dtype=bool)
    mask[table.of_row(0)] = False  # the first attention, and of the second MLP the first unit
    mask[table.of_row(3).start] = False
    blocks = shape_of(table, mask, [block.widths for block in find_units(language_model)])
    assert blocks is not None
    before = sum(parameter.numel() for parameter in language_model.model.parameters())
    cut_model(language_model, blocks, form="compact")
    after = sum(parameter.numel() for parameter in language_model.model.parameters())
    assert costs.dense - kept_cost(table, mask, costs) == before - after
    # What a budget counts is never less, and as much but for what goes with the first attention alone.
    counted = table.fixed + int(table.costs[mask].sum())
    gone = costs.attention[0].at(costs.widths[0].groups, costs.widths[0].heads_per_group)
    assert counted - kept_cost(table, mask, costs) == gone - table.costs[table.of_row(0)].sum()


def test_a_block_costs_its_attention_and_its_mlp() -> None:
    language_model = tiny_language_model("gpt2")
    costs = unit_costs(language_model)
    assert unit_table(language_model, ByUnits(("block",))).costs.tolist() == [costs.dense // 2] * 2
    both = unit_table(language_model, ByUnits(("attention", "mlp"))).costs
    assert both.reshape(2, 2).sum(1).tolist() == [costs.dense // 2] * 2


def test_a_mask_is_a_shape_where_all_kept_groups_have_as_many_heads() -> None:
    table = unit_table(tiny_language_model(), ByUnits(("query-head", "neurons:20")))
    mask = np.ones(table.n, dtype=bool)
    mask[[0, 2, 5]] = False
    assert shape_of(table, mask, WIDTHS) == (
        BlockShape((0, 1), (1, 3), (*range(20), *range(40, 48))),
        WIDTHS[1].whole,
    )
    mask[2] = True
    assert shape_of(table, mask, WIDTHS) is None
    assert kept_units(table, mask, WIDTHS)[0].heads == (1, 2, 3)
    mask[[2, 3]] = False
    assert kept_units(table, mask, WIDTHS)[0].groups == (0,)


def test_what_no_unit_is_of_stays_whole() -> None:
    language_model = tiny_language_model()
    table = unit_table(language_model, ByUnits(("mlp",)))
    assert shape_of(table, np.array([True, False]), WIDTHS) == (WIDTHS[0].whole, WIDTHS[1].first(2, 2, 0))
    assert [*unit_columns(table, find_units(language_model))] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


def test_columns_follow_their_units() -> None:
    language_model = tiny_language_model()
    columns = unit_columns(unit_table(language_model, ByUnits(("kv-group", "neurons:20"))), find_units(language_model))
    assert columns["model.layers.0.self_attn.o_proj"].tolist() == [0] * 16 + [1] * 16
    assert columns["model.layers.1.mlp.down_proj"].tolist() == [7] * 20 + [8] * 20 + [9] * 8


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (("kv-group", "query-head"), "overlap in the attention"),
        (("neuron", "neurons:64"), "overlap in the mlp"),
        (("attention", "block"), "overlap in the attention"),
        (("mlp", "mlp"), "overlap in the mlp"),
        ((), "no kind of unit"),
        (("heads",), "no kind of unit 'heads'"),
        (("neurons:0",), "no kind of unit 'neurons:0'"),
    ],
)
def test_kinds_that_cannot_be(kinds: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        ByUnits(kinds)


def test_one_kv_group_is_no_unit() -> None:
    language_model = tiny_language_model(num_key_value_heads=1)
    with pytest.raises(InvalidInput, match=r"one KV group.*query-head"):
        unit_table(language_model, ByUnits(("kv-group",)))
    assert unit_table(language_model, ByUnits(("query-head",))).n == 8


def test_a_quantity_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(UnknownName, match="latency"):
        unit_table(tiny_language_model(), ByUnits(("mlp",)), "latency")


@pytest.mark.parametrize(
    "masker",
    [ByUnits(("kv-group", "neurons:7")), ByMetrics((2, 4), ("wanda", "mul(abs(W),X_l2)")), ByWeights((1, 4), "wanda")],
)
def test_json_and_hex_both_ways(masker: ByUnits | ByMetrics | ByWeights) -> None:
    table = unit_table(tiny_language_model(), masker)
    again = UnitTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert again.hash == table.hash
    mask = np.random.default_rng(0).random(table.n) < 0.5
    if table.strata is not None:
        labels, keep = table.strata
        mask = np.arange(table.n) % (table.n // (int(labels[-1]) + 1)) < keep
    assert np.array_equal(again.unpacked(table.packed(mask)), mask)


def test_hash_names_the_content() -> None:
    language_model = tiny_language_model()
    masks = [ByUnits(("kv-group",)), ByUnits(("query-head",))]
    tables = [unit_table(language_model, mask, quantity) for mask in masks for quantity in ("parameters", "flops")]
    assert len({table.hash for table in tables}) == 4


def test_choices_keep_exactly_so_many() -> None:
    language_model = tiny_language_model()
    table = unit_table(language_model, ByMetrics((2, 4), ("wanda", "magnitude")))
    assert table.n == 2 * len(language_model.sites)
    mask = np.tile([True, False], len(language_model.sites))
    table.check(mask)
    mask[3] = True
    with pytest.raises(InvalidInput, match=r"keeps 2 units of choice 1, in model\.layers.0\.self_attn\.k_proj"):
        table.check(mask)
    weights = unit_table(language_model, ByWeights((2, 4), "wanda"))
    assert weights.n == sum(bound.site.weights for bound in language_model.sites)
    with pytest.raises(InvalidInput, match="keeps 4 units of choice 0"):
        weights.check(np.ones(weights.n, dtype=bool))


def test_a_width_that_m_does_not_divide_is_refused() -> None:
    with pytest.raises(InvalidInput, match="down_proj has 48 inputs"):
        unit_table(tiny_language_model(), ByMetrics((16, 32), ("wanda", "magnitude")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dense": -1}, "'dense'"),
        ({"rows": []}, "'rows'"),
        ({"rows": [{"kind": "mlp"}]}, "entry 1"),
        ({"quantity": 3}, "'quantity'"),
        ({"masker": {"kind": "units"}}, "'units' alone"),
        ({"more": 1}, "alone"),
    ],
)
def test_a_damaged_table_is_refused(change: dict[str, Any], said: str) -> None:
    values = unit_table(tiny_language_model(), ByUnits(("mlp",))).to_json()
    with pytest.raises(InvalidInput, match=said):
        UnitTable.from_json(values | change)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"kind": "experts"}, "kinds are units, metrics, weights"),
        ({"kind": "units", "units": "mlp"}, "'units' of a masker"),
        ({"kind": "metrics", "pattern": "2:4", "metrics": ["wanda"]}, "two or more"),
        ({"kind": "metrics", "pattern": "4:2", "metrics": ["wanda", "magnitude"]}, "4:2"),
        ({"kind": "weights", "pattern": "2:4", "metric": "wandu"}, "did you mean 'wanda'"),
        ({"kind": "weights", "pattern": 2, "metric": "wanda"}, "2:4"),
    ],
)
def test_maskers_that_cannot_be(value: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        masker_from(value)


@pytest.mark.parametrize("text", ["zz", "ff", "", None, "ffff"])
def test_hex_of_another_length_is_refused(text: Any) -> None:
    table = unit_table(tiny_language_model(), ByUnits(("mlp",)))
    with pytest.raises(InvalidInput):
        table.unpacked(text)
