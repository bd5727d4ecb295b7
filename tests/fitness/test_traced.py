"""Layouts that are looked up: the same as those written by hand, and of unknown families right or refused."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from evoprune.fitness.adapters import ADAPTERS
from evoprune.fitness.adapters.traced import traced_layout
from evoprune.fitness.layouts import layout_of
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.unit_check import check_units
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import InvalidInput
from tests.fitness.test_surgeon import by_hand, greedy, logits, zeroed
from tests.models import FAMILIES, tiny_language_model, tiny_model
from tests.shapes import cases

pytest.importorskip("torch_pruning")

# Families that nobody has described, with what a tiny model of them needs beside the common settings.
FOUND: dict[str, dict[str, object]] = {
    "apertus": {},  # neither gate nor LayerNorm names of Llama's, norms of queries and keys
    "arcee": {},
    "cohere": {},  # attention and MLP side by side behind one norm
    "falcon": {"ffn_hidden_size": 48},  # fused, one key head
    "glm": {},  # gate and up fused
    "glm4": {},  # norms before and behind the parts
    "granite": {},
    "nemotron": {},
    "olmo": {},  # norms without parameters
    "stablelm": {},
    "starcoder2": {},
}
# Those that cannot be cut, and the line that says so.
REFUSED: dict[str, str] = {
    "bloom": "without a KV group it does not run: .*: the rows of self_attention.query_key_value are not all queries",
    "gpt_neox": "without a KV group its logits are .* the rows of attention.query_key_value are not all queries, then",
    "olmo2": r"self_attn holds q_norm.weight \[32\] beside its matrices",
    "persimmon": "the rows of self_attn.query_key_value are not all queries, then all keys, then all values",
}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2"}))
def test_it_finds_what_adapters_say(family: str) -> None:
    adapter = ADAPTERS[family]
    bare = replace(adapter, attention=None, mlp=None, shared_norms=())
    assert traced_layout(tiny_model(family), bare) == adapter


def test_what_the_graph_does_not_know() -> None:
    """GPT-2 has layers of its own, which Torch-Pruning takes for bare parameters."""
    with pytest.raises(InvalidInput, match=r"'gpt2' cannot be cut: .*attn.c_attn is .* a Conv1D that is no nn.Linear"):
        traced_layout(tiny_model("gpt2"), ADAPTERS["gpt2"])


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions_and_no_memory(family: str, attention: str) -> None:
    """A fused product and one with a softmax, and weights that are not there, show the same."""
    model = tiny_model(family, **FOUND[family])
    model.set_attn_implementation(attention)
    found = layout_of(model)
    assert layout_of(tiny_model(family, **FOUND[family]).to("meta")) == found
    names = [path.rpartition(".")[2] for path in found.attention.inputs]
    assert names in (["q_proj", "k_proj", "v_proj"], ["query_key_value"])
    if len(found.mlp.inputs) == 2:
        assert found.mlp.inputs == ("mlp.gate_proj", "mlp.up_proj")
    assert found.mlp.width == ("ffn_hidden_size" if family == "falcon" else "intermediate_size")


@pytest.mark.parametrize("family", FOUND)
def test_cut_and_zeroed_say_the_same(family: str) -> None:
    changes = FOUND[family]
    language_model = tiny_language_model(family, **changes)
    units = find_units(language_model)
    dense, before = logits(language_model), dict(language_model.model.named_parameters())
    surgeon = Surgeon(language_model, units)
    for name in ("uneven", "first block gone"):
        blocks = cases(units[0].widths)[name]
        expected = zeroed(language_model, units, blocks, **changes)
        surgeon.masked(blocks)
        assert torch.allclose(logits(language_model), expected, rtol=1e-4, atol=1e-4), name
        surgeon.apply(blocks)
        assert torch.allclose(logits(language_model), expected, rtol=1e-4, atol=1e-4), name
    counted = by_hand(tiny_language_model(family, **changes), units, blocks)
    assert sum(parameter.numel() for parameter in language_model.model.parameters()) == counted
    assert greedy(language_model.model, cached=True) == greedy(language_model.model, cached=False)
    surgeon.restore()
    assert torch.equal(logits(language_model), dense)
    assert dict(language_model.model.named_parameters()) == before
    assert not any(parameter.requires_grad for parameter in before.values())


@pytest.mark.parametrize("family", REFUSED)
def test_refused_in_one_line(family: str) -> None:
    language_model = tiny_language_model(family)
    before = {name: (value, value.clone()) for name, value in language_model.model.named_parameters()}
    with pytest.raises(InvalidInput, match=REFUSED[family]) as error:
        find_units(language_model)
    assert "\n" not in str(error.value)
    after = dict(language_model.model.named_parameters())
    assert all(after[name] is value and torch.equal(value, old) for name, (value, old) in before.items())


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    told = r"'olmo' cannot be cut into heads and neurons; supported: .*llama.*pip install 'evoprune\[torch-pruning\]'"
    with pytest.raises(InvalidInput, match=told):
        find_units(tiny_language_model("olmo"))
    assert len(find_units(tiny_language_model("llama"))) == 2


def halved(block: BlockUnits) -> BlockUnits:
    """The same rows as twice as many heads of half the width."""
    own = block.attention
    heads = replace(own, heads=2 * own.heads, groups=2 * own.groups, head_dim=own.head_dim // 2)
    return replace(block, attention=heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wrong_units_do_not_pass(dtype: torch.dtype) -> None:
    """Rows of another matrix, or norms of another part: what is right in every number of units but not on the model."""
    language_model = tiny_language_model("starcoder2", num_key_value_heads=4)
    language_model.model.to(dtype)
    right = find_units(language_model)
    check_units(language_model, right)
    for wrong, told in (
        ([halved(block) for block in right], "without a KV group it does not run"),
        ([replace(block, mlp=replace(block.mlp, norms=block.attention.norms)) for block in right], "without the MLPs"),
    ):
        with pytest.raises(InvalidInput, match=told):
            check_units(language_model, wrong)
