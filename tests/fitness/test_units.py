"""Which parameters are cut together, in every family, against what zeroing them does to the live model."""

from __future__ import annotations

import pytest
import torch

from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape, BlockWidths
from tests.models import FAMILIES, tiny_language_model


@pytest.mark.parametrize("family", FAMILIES)
def test_all_matrices_and_biases_are_counted(family: str) -> None:
    language_model = tiny_language_model(family)
    units = find_units(language_model)
    assert [block.block for block in units] == [0, 1]
    for block in units:
        module = language_model.model.get_submodule(block.name)
        norms = {*block.attention.norms, *block.mlp.norms}
        counted = sum(
            parameter.numel()
            for name, parameter in module.named_parameters(prefix=block.name)
            if name.rpartition(".")[0] not in norms and "norm" not in name and "ln_" not in name
        )
        assert block.parameters(block.widths.whole) == counted
        for norm in norms:
            assert "norm" in type(language_model.model.get_submodule(norm)).__name__.lower()


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_read_nothing_change_nothing(family: str) -> None:
    """With the rows of all units but some at zero, so that these say nothing, their columns do not matter."""
    language_model = tiny_language_model(family)
    tokens = torch.arange(20)[None] % 250
    block = find_units(language_model)[1]
    heads, groups, neurons = [0, 1], [0], list(range(3, 40))
    if block.widths.heads_per_group == 1:
        heads = [0]
    with torch.no_grad():
        for parts, kept in (
            (block.attention, block.attention.rows(groups, heads)),
            (block.mlp, block.mlp.rows(neurons)),
        ):
            for bound, rows in zip(parts.inputs, kept, strict=True):
                gone = [row for row in range(bound.site.out_features) if row not in set(rows)]
                bound.weight()[gone] = 0
                bias = bound.bias()
                if bias is not None:
                    bias[gone] = 0
        expected = language_model.model(input_ids=tokens).logits
        for parts, kept_columns in ((block.attention, block.attention.columns(heads)), (block.mlp, neurons)):
            weight = parts.output.weight()
            weight[:, [at for at in range(weight.shape[1]) if at not in set(kept_columns)]] = 1e3
        assert torch.allclose(language_model.model(input_ids=tokens).logits, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_counts_of_what_stays(family: str) -> None:
    """By hand: hidden 32, 4 query heads of 8, two KV heads (Llama) or four (GPT-2), 48 neurons; GPT-2 has biases."""
    block = find_units(tiny_language_model(family))[0]
    if family == "llama":
        assert block.widths == BlockWidths(2, 4, 48)
        expected = 32 * 8 * (1 + 2 + 1) + 3 * 32 * 5
        assert block.parameters(BlockShape((1,), (2,), tuple(range(5)))) == expected
    else:
        assert block.widths == BlockWidths(4, 4, 48)
        attention = 32 * 24 + 24 + 8 * 32 + 32
        assert block.parameters(BlockShape((1,), (1,), tuple(range(5)))) == attention + 32 * 5 + 5 + 5 * 32 + 32
    assert block.parameters(BlockShape((), (), ())) == 0


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (BlockShape((0, 2), (0,), ()), "KV groups that are not ascending from 0 to 1"),
        (BlockShape((1, 0), (0,), ()), "KV groups that are not ascending"),
        (BlockShape((0,), (0, 2), ()), "query head 2 without its KV group 1"),
        (BlockShape((0, 1), (0, 1, 2), ()), "keeps 1 and 2 query heads"),
        (BlockShape((0, 1), (0, 1), ()), "keeps 0 and 2 query heads"),
        (BlockShape((), (), (47, 48)), "neurons that are not ascending from 0 to 47"),
    ],
)
def test_impossible_shapes(shape: BlockShape, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        shape.check(3, BlockWidths(2, 4, 48))


def test_weights_of_heads_beside_the_matrices() -> None:
    """A norm of each head does not mind which of them stay; one over all of them does."""
    assert len(find_units(tiny_language_model("phi", qk_layernorm=True))) == 2
    language_model = tiny_language_model("phi")
    language_model.model.get_submodule("model.layers.1.self_attn").add_module("q_norm", torch.nn.LayerNorm(32))
    with pytest.raises(InvalidInput, match=r"self_attn holds q_norm.weight \[32\] beside its matrices"):
        find_units(language_model)
