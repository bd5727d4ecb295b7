"""Every family lists its matrices, all of them, in the order in which they run, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters import ADAPTERS, decoder_blocks, list_sites, zero_fraction
from evoprune.metrics.errors import InvalidInput
from tests.models import FAMILIES, HIDDEN, INNER, LAYERS, random_windows, tiny_model

LLAMA_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), LLAMA_SHAPES),
    "phi": {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.dense": (HIDDEN, HIDDEN),
        "mlp.fc1": (INNER, HIDDEN),
        "mlp.fc2": (HIDDEN, INNER),
    },
    "phi3": {
        "self_attn.qkv_proj": (2 * HIDDEN, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_up_proj": (2 * INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    },
    "opt": {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN, HIDDEN),
        "self_attn.out_proj": (HIDDEN, HIDDEN),
        "fc1": (INNER, HIDDEN),
        "fc2": (HIDDEN, INNER),
    },
    "gpt2": {
        "attn.c_attn": (3 * HIDDEN, HIDDEN),
        "attn.c_proj": (HIDDEN, HIDDEN),
        "mlp.c_fc": (INNER, HIDDEN),
        "mlp.c_proj": (HIDDEN, INNER),
    },
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_family_has_a_tiny_model() -> None:
    assert set(ADAPTERS) == set(FAMILIES) == set(SHAPES)


def test_names_kinds_and_shapes(family: str) -> None:
    model = tiny_model(family)
    blocks = decoder_blocks(model)
    expected = [
        (f"{block}.{kind}", kind, index, LAYERS, *shape)
        for index, (block, _) in enumerate(blocks)
        for kind, shape in SHAPES[family].items()
    ]
    found = [
        (s.name, s.kind, s.block, s.n_blocks, s.out_features, s.in_features)
        for s in (bound.site for bound in list_sites(model))
    ]
    assert found == expected


def test_every_matrix_of_the_blocks_and_nothing_else(family: str) -> None:
    model = tiny_model(family)
    listed = {id(bound.module.get_parameter("weight")) for bound in list_sites(model)}
    in_blocks = {
        id(parameter)
        for _, block in decoder_blocks(model)
        for parameter in block.parameters()
        if parameter.dim() >= 2  # norms and biases have one dimension
    }
    assert listed == in_blocks
    assert id(model.get_input_embeddings().weight) not in listed
    assert id(model.get_output_embeddings().weight) not in listed


def test_sites_are_in_execution_order(family: str) -> None:
    model = tiny_model(family)
    order: list[str] = []
    for bound in list_sites(model):
        bound.module.register_forward_hook(lambda *_, name=bound.site.name: order.append(name))
    model(random_windows())
    assert order == [bound.site.name for bound in list_sites(model)]


def test_orientation_is_out_in(family: str) -> None:
    model = tiny_model(family)
    for bound in list_sites(model):
        x = torch.randn(3, bound.site.in_features)
        bias = bound.module.get_parameter("bias") if getattr(bound.module, "bias", None) is not None else 0
        torch.testing.assert_close(bound.module(x), x @ bound.weight().T + bias)


def test_writes_reach_the_model(family: str) -> None:
    model, windows = tiny_model(family), random_windows()
    before = model(windows).logits
    for bound in list_sites(model):
        weight = bound.weight()
        kept = weight.clone()
        weight.zero_()
        changed = model(windows).logits
        assert not torch.equal(changed, before), bound.site.name
        weight.copy_(kept)
    assert torch.equal(model(windows).logits, before)


def test_zero_fraction_counts_prunable_weights_only() -> None:
    sites = list_sites(tiny_model())
    assert zero_fraction(sites) == 0
    sites[0].weight().zero_()
    total = sum(bound.site.weights for bound in sites)
    assert zero_fraction(sites) == sites[0].site.weights / total


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe"])
def test_fused_experts_are_refused_by_name(family: str) -> None:
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    with pytest.raises(InvalidInput, match=r"^mixture-of-experts models are not supported yet: .*experts.*down_proj"):
        list_sites(tiny_model(family, num_local_experts=4, head_dim=8, **sizes))


def test_experts_in_a_list_are_refused() -> None:
    model = tiny_model("gpt_neox")
    for _, block in decoder_blocks(model):
        block.experts = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(3)])
    with pytest.raises(InvalidInput, match=r"^mixture-of-experts models are not supported yet: .*experts\.0"):
        list_sites(model)


@pytest.mark.parametrize("family", ["gpt_neox", "stablelm", "olmo2"])
def test_an_unknown_family_is_walked(family: str) -> None:
    model = tiny_model(family)
    sites = list_sites(model)
    matrices = [p for _, block in decoder_blocks(model) for p in block.parameters() if p.dim() >= 2]
    assert len(decoder_blocks(model)) == LAYERS
    assert {id(bound.module.get_parameter("weight")) for bound in sites} == {id(p) for p in matrices}


def test_weights_outside_linear_layers_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'mamba' is not supported: .*A_log \[.*conv1d.*no site covers"):
        list_sites(tiny_model("mamba"))


def test_a_known_family_with_more_layers_than_its_adapter_lists_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'gpt2' is not supported: transformer\.h\.0 holds crossattention"):
        list_sites(tiny_model("gpt2", add_cross_attention=True))


def test_blocks_that_share_weights_are_refused() -> None:
    model = tiny_model()
    first, second = (block for _, block in decoder_blocks(model))
    shared = first.get_parameter("mlp.up_proj.weight")
    second.get_submodule("mlp.up_proj").register_parameter("weight", shared)
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj shares its weight with .*layers\.0"):
        list_sites(model)


def test_quantised_weights_are_refused() -> None:
    model = tiny_model()
    linear = decoder_blocks(model)[0][1].get_submodule("mlp.up_proj")
    quantised = nn.Parameter(linear.get_parameter("weight").to(torch.int8), requires_grad=False)
    linear.register_parameter("weight", quantised)
    with pytest.raises(InvalidInput, match="before it is quantised"):
        list_sites(model)


def test_a_model_without_decoder_blocks_is_refused() -> None:
    model = tiny_model("gpt_neox")
    model.get_submodule("gpt_neox").add_module("layers", nn.ModuleList())
    with pytest.raises(InvalidInput, match=r"'gpt_neox' is not supported: no list of decoder blocks.*llama"):
        list_sites(model)


def test_a_base_model_is_refused() -> None:
    base = tiny_model().get_decoder()
    assert isinstance(base, PreTrainedModel)
    with pytest.raises(InvalidInput, match="give a causal language model"):
        list_sites(base)
