"""Costs of what stays, against live models, published totals and counts by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from evoprune.fitness.adapters import list_sites
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.unit_costs import AttentionCost, CostTable, MlpCost, UnitCosts, kept_by, unit_costs
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape, BlockWidths
from tests.models import FAMILIES, tiny_language_model, tiny_tokenizer

# Layers, hidden size, neurons, query heads, KV heads, vocabulary.
LARGE = {
    "llama-2-7b": ("llama", 32, 4096, 11008, 32, 32, 32000),
    "llama-3.1-8b": ("llama", 32, 4096, 14336, 32, 8, 128256),
    "qwen2.5-14b": ("qwen2", 48, 5120, 13824, 40, 8, 152064),
}


def large(name: str) -> LanguageModel:
    """A model of the published size, without memory for its weights."""
    family, layers, hidden, inner, heads, groups, vocabulary = LARGE[name]
    config = AutoConfig.for_model(
        family,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return LanguageModel(model, tiny_tokenizer(), tuple(list_sites(model)), name, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_leaves_the_model_that_much_smaller(family: str) -> None:
    """Everything cut by hand from the live modules, and counted again."""
    language_model = tiny_language_model(family)
    model, costs = language_model.model, unit_costs(language_model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert costs.rest + costs.dense == whole
    first, second = find_units(language_model)
    groups, heads, neurons = 1, first.widths.heads_per_group, 17
    cut = [
        *zip(first.attention.inputs, first.attention.rows(range(groups), range(heads)), strict=True),
        *zip(first.mlp.inputs, first.mlp.rows(range(neurons)), strict=True),
    ]
    for bound, rows in cut:
        name = "weight"
        weight = bound.weight()[rows]
        bound.module.register_parameter(name, torch.nn.Parameter(weight.T if bound.transposed else weight))
        bias = bound.bias()
        if bias is not None:
            bound.module.register_parameter("bias", torch.nn.Parameter(bias[rows]))
    for part, columns in ((first.attention, first.attention.columns(range(heads))), (first.mlp, list(range(neurons)))):
        weight = part.output.weight()[:, columns]
        weight = weight.T if part.output.transposed else weight
        part.output.module.register_parameter("weight", torch.nn.Parameter(weight))
    kept = (groups, heads, neurons)
    dense = (second.widths.groups, second.widths.heads_per_group, second.widths.neurons)
    assert costs.rest + costs.of([kept, dense]) == sum(parameter.numel() for parameter in model.parameters())
    for path in [second.attention.name, *second.attention.norms, second.mlp.output.site.name, *second.mlp.norms]:
        drop(model, path)
    for bound in second.mlp.inputs:
        drop(model, bound.site.name)
    assert costs.rest + costs.of([kept, (0, 0, 0)]) == sum(parameter.numel() for parameter in model.parameters())


def drop(model: torch.nn.Module, path: str) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.Identity())


@pytest.mark.parametrize(
    ("name", "dense", "heads_gone", "neurons_gone", "cut"),
    [
        ("llama-2-7b", 6_738_415_616, 20, 6880, 2_690_912_256),
        ("llama-3.1-8b", 8_030_261_248, 18, 7168, 4_607_709_184),
        ("qwen2.5-14b", 14_770_033_664, 20, 6912, 8_415_540_224),
    ],
)
def test_published_totals(name: str, dense: int, heads_gone: int, neurons_gone: int, cut: int) -> None:
    """Allocation chapter, 1.1, 5.1 and list 5: the two models with grouped heads keep all keys and values."""
    costs = unit_costs(large(name))
    assert costs.rest + costs.dense == dense
    width = costs.widths[0]
    neurons = width.neurons - neurons_gone
    found = costs.rest + costs.dense
    for attention, mlp in zip(costs.attention, costs.mlp, strict=True):
        assert isinstance(attention, AttentionCost)
        grouped = width.heads_per_group > 1
        gone = heads_gone * (attention.per_head + (0 if grouped else attention.per_group))
        found -= gone + mlp.at(width.neurons) - mlp.at(neurons)
    assert found == cut


@pytest.mark.parametrize(("name", "ratios"), [("llama-2-7b", (512, 3)), ("llama-3.1-8b", (256, 1280))])
def test_swap_ratios(name: str, ratios: tuple[int, int]) -> None:
    """Allocation chapter, 5.1, in units of the hidden size."""
    costs = unit_costs(large(name))
    attention, mlp = costs.attention[0], costs.mlp[0]
    assert isinstance(attention, AttentionCost) and isinstance(mlp, MlpCost)
    group = attention.per_group + costs.widths[0].heads_per_group * attention.per_head
    found = (group, mlp.per_neuron) if name == "llama-2-7b" else (attention.per_head, group)
    assert found == tuple(4096 * ratio for ratio in ratios)
    assert mlp.per_neuron == 3 * 4096


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3"])
def test_flops_are_those_of_a_forward_pass(family: str) -> None:
    language_model = tiny_language_model(family)
    costs = unit_costs(language_model, "flops", batch=3, sequence=20)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # The fused kernel of a CPU is not counted; the plain one is made of products that are.
        language_model.model.set_attn_implementation("eager")
        language_model.model(input_ids=torch.ones(3, 20, dtype=torch.int64))
    assert counter.get_total_flops() == costs.rest + costs.dense
    assert costs.of([(0, 0, 0), (0, 0, 0)]) == 0


def test_cache_by_hand() -> None:
    """Two KV heads of 8 numbers of 4 bytes, as key and as value; neurons and query heads are in no cache."""
    costs = unit_costs(tiny_language_model("llama"), "kv_bytes")
    assert costs.of([(2, 2, 48), (1, 1, 3)]) == 2 * (2 * 8 * 4) + 1 * (2 * 8 * 4)
    assert unit_costs(large("llama-3.1-8b"), "kv_bytes").dense == 32 * 2 * 8 * 128 * 2


def test_shapes_cost_what_they_keep() -> None:
    shape = BlockShape((0, 2), (1, 2, 8, 11), (3,))
    assert kept_by(shape) == (2, 2, 1)
    assert kept_by(BlockShape((), (), ())) == (0, 0, 0)


def test_tables() -> None:
    attention, mlp = CostTable((((1, 1), 10), ((1, 2), 12), ((2, 2), 15))), CostTable((((4,), 40), ((8,), 51)))
    assert [attention.at(1, 2), attention.at(0, 0), mlp.at(4), mlp.at(5), mlp.at(7), mlp.at(0), mlp.at(3)] == [
        12,
        0,
        40,
        42,
        48,
        0,
        40,
    ]
    with pytest.raises(InvalidInput, match="no cost of a part that keeps 2 x 1"):
        attention.at(2, 1)
    with pytest.raises(InvalidInput, match="keeps 9"):
        mlp.at(9)
    costs = UnitCosts("latency", 7, (BlockWidths(2, 4, 8),), (attention,), (mlp,))
    assert costs.dense == 15 + 51
    assert UnitCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs


def test_speedups_by_hand() -> None:
    """Of 40 + 60 a speedup of 2 leaves 50, so 50 of the 60 go; what stays in any case bounds it at 2.5."""
    costs = UnitCosts("latency", 40, (BlockWidths(1, 1, 1),), (AttentionCost(20, 0, 0),), (MlpCost(40, 0),))
    assert costs.fraction_at(2) == pytest.approx(50 / 60)
    assert costs.speedup_at(50 / 60) == pytest.approx(2) and costs.speedup_at(1) == pytest.approx(2.5)
    for speedup in (1.0, 2.5, float("nan")):
        with pytest.raises(InvalidInput, match=r"more than 1 and less than 2\.5"):
            costs.fraction_at(speedup)


def test_to_json_and_back() -> None:
    costs = unit_costs(tiny_language_model("qwen2"))
    assert UnitCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs


@pytest.mark.parametrize("values", [{}, [], {"quantity": "flops", "rest": 0, "blocks": [{"widths": [1]}]}])
def test_what_is_no_costs(values: Any) -> None:
    with pytest.raises(InvalidInput, match="no costs of units"):
        UnitCosts.from_json(values)


def test_no_tokens_cost_nothing_that_can_be_said() -> None:
    with pytest.raises(InvalidInput, match="at least 1 of each"):
        unit_costs(tiny_language_model("llama"), "flops", sequence=0)
