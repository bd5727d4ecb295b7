"""A model cut in place says what its masked twin says, counts what the units count, and is the old one again after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters import list_sites
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape
from tests.models import FAMILIES, random_windows, tiny_language_model
from tests.shapes import FEW, MANY, cases, some


def logits(language_model: LanguageModel) -> Tensor:
    found: Tensor = language_model.model(input_ids=random_windows(2, 20)).logits
    return found


def zeroed(
    language_model: LanguageModel, units: Sequence[BlockUnits], blocks: Sequence[BlockShape], **changes: object
) -> Tensor:
    """Logits with what goes written over by zeros, one unit after the other, on another copy of the model."""
    twin = tiny_language_model(language_model.name.removeprefix("tiny-"), **changes)
    by_name = {bound.site.name: bound for bound in twin.sites}
    for block, shape in zip(units, blocks, strict=True):
        attention, mlp = by_name[block.attention.output.site.name], by_name[block.mlp.output.site.name]
        for head in set(range(block.attention.heads)) - set(shape.heads):
            attention.weight()[:, head * block.attention.head_dim : (head + 1) * block.attention.head_dim] = 0
        for neuron in set(range(block.mlp.neurons)) - set(shape.neurons):
            mlp.weight()[:, neuron] = 0
        for bound, kept in ((attention, shape.heads), (mlp, shape.neurons)):
            bias = bound.bias()
            if not kept and bias is not None:
                bias.zero_()
    return logits(twin)


def by_hand(language_model: LanguageModel, units: Sequence[BlockUnits], blocks: Sequence[BlockShape]) -> int:
    """Parameters that should stay."""
    norms = [
        language_model.model.get_submodule(name)
        for block, shape in zip(units, blocks, strict=True)
        for name in block.gone_norms(shape)
    ]
    return (
        sum(parameter.numel() for parameter in language_model.model.parameters())
        - sum(
            block.parameters(block.widths.whole) - block.parameters(shape)
            for block, shape in zip(units, blocks, strict=True)
        )
        - sum(parameter.numel() for norm in norms for parameter in norm.parameters())
    )


def greedy(model: PreTrainedModel, *, cached: bool) -> list[int]:
    """Twelve tokens, one after the other, by a cache or by reading everything again."""
    tokens = random_windows(1, 7)
    past = None
    for step in range(12):
        if cached:
            out = model(input_ids=tokens if step == 0 else tokens[:, -1:], past_key_values=past, use_cache=True)
            past = out.past_key_values
        else:
            out = model(input_ids=tokens, use_cache=False)
        tokens = torch.cat([tokens, out.logits[:, -1:].argmax(dim=-1)], dim=1)
    return tokens[0].tolist()


def generated(model: PreTrainedModel, *, cached: bool) -> list[list[int]]:
    """What `generate` writes after two prompts, one of which is padded on the left."""
    prompts = random_windows(2, 7)
    attention_mask = torch.ones_like(prompts)
    attention_mask[1, :3] = 0
    return model.generate(  # type: ignore[operator,no-any-return]
        prompts, attention_mask=attention_mask, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=1
    ).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_and_masked_say_the_same(family: str) -> None:
    language_model = tiny_language_model(family)
    model, units = language_model.model, find_units(language_model)
    before = dict(model.named_parameters())
    content = {name: parameter.clone() for name, parameter in before.items()}
    dense, modules = logits(language_model), dict(model.named_modules())
    surgeon = Surgeon(language_model, units)
    for name, blocks in cases(units[0].widths).items():
        expected = zeroed(language_model, units, blocks)
        counted = by_hand(tiny_language_model(family), units, blocks)
        surgeon.apply(blocks)
        assert torch.allclose(logits(language_model), expected, atol=1e-5), name
        assert sum(parameter.numel() for parameter in model.parameters()) == counted, name
        assert greedy(model, cached=True) == greedy(model, cached=False), name
        surgeon.masked(blocks)
        assert torch.allclose(logits(language_model), expected, atol=1e-5), name
        assert {key: value.shape for key, value in model.named_parameters()} == {
            key: value.shape for key, value in before.items()
        }
        surgeon.padded(blocks, [block.widths for block in units])
        assert torch.allclose(logits(language_model), expected, atol=1e-5), name
    surgeon.restore()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] and torch.equal(after[name], content[name]) for name in before)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(language_model), dense)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("case", ["no attention first", "first block gone", "uneven"])
def test_generation_with_padding_and_a_cache(family: str, case: str) -> None:
    language_model = tiny_language_model(family)
    units = find_units(language_model)
    Surgeon(language_model, units).apply(cases(units[0].widths)[case])
    assert generated(language_model.model, cached=True) == generated(language_model.model, cached=False)


def test_only_what_changed_is_cut_again() -> None:
    language_model = tiny_language_model()
    units = find_units(language_model)
    widths = units[0].widths
    surgeon = Surgeon(language_model, units)
    first, second = some(widths, [0], 2, FEW), some(widths, [1], 1, MANY)
    surgeon.apply([first, second])
    before = dict(language_model.model.named_parameters())
    surgeon.apply([first, some(widths, [1], 1, FEW)])
    after = dict(language_model.model.named_parameters())
    changed = {name for name in before if before[name] is not after[name]}
    assert changed == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_given_outputs(family: str) -> None:
    """Columns of another matrix in place of the model's own; twice them is twice what the part adds."""
    language_model = tiny_language_model(family)
    units = find_units(language_model)
    shape, rest = some(units[0].widths, [0], 1, FEW), units[1].widths.whole
    attention, mlp = units[0].attention, units[0].mlp
    outputs = {
        attention.output.site.name: 2 * attention.output.weight()[:, attention.columns(shape.heads)],
        mlp.output.site.name: 2 * mlp.output.weight()[:, list(FEW)],
    }
    surgeon = Surgeon(language_model, units)
    surgeon.apply([shape, rest], outputs)
    cut = logits(language_model)
    surgeon.masked([shape, rest], outputs)
    assert torch.allclose(logits(language_model), cut, atol=1e-5)
    surgeon.restore()
    for parameter in (attention.output.weight(), mlp.output.weight()):
        parameter.mul_(2)
    surgeon.apply([shape, rest])
    assert torch.allclose(logits(language_model), cut, atol=1e-5)
    with pytest.raises(InvalidInput, match=r"the output of .* is \[32, 3\]; its shape asks for \[32, 15\]"):
        surgeon.apply([shape, rest], {mlp.output.site.name: torch.zeros(32, 3)})


def test_impossible_shapes_are_refused() -> None:
    language_model = tiny_language_model()
    units = find_units(language_model)
    surgeon = Surgeon(language_model, units)
    with pytest.raises(InvalidInput, match="the shape has 1 blocks, the model 2"):
        surgeon.apply([units[0].widths.whole])
    with pytest.raises(InvalidInput, match="block 1 keeps query head 3 without its KV group"):
        surgeon.apply([units[0].widths.whole, BlockShape((0,), (0, 3), FEW)])
    surgeon.apply([BlockShape((), (), FEW), units[1].widths.whole])
    language_model = replace(language_model, sites=tuple(list_sites(language_model.model)))
    with pytest.raises(InvalidInput, match=r"model\.layers\.0 has no self_attn\.q_proj, so it is cut already"):
        find_units(language_model)


def test_norms_behind_the_parts_are_refused() -> None:
    with pytest.raises(InvalidInput, match="do_layer_norm_before is false"):
        find_units(tiny_language_model("opt", do_layer_norm_before=False))


def test_hooks_stay() -> None:
    """The layers are the same objects with other parameters in them."""
    language_model = tiny_language_model()
    units = find_units(language_model)
    seen: list[int] = []
    linear = units[0].mlp.output.module
    linear.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[-1]))
    Surgeon(language_model, units).apply([some(units[0].widths, [0], 2, FEW), units[1].widths.whole])
    logits(language_model)
    assert seen == [len(FEW)]
    assert isinstance(linear, nn.Linear) and linear.in_features == len(FEW)


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
@pytest.mark.parametrize("dropped", [0, 1])
def test_a_window_that_slides_past_a_dropped_attention(family: str, dropped: int) -> None:
    """The text outgrows the window, and the block whose cache says how far it is has no attention."""
    language_model = tiny_language_model(family, sliding_window=4)
    units = find_units(language_model)
    blocks = [block.widths.whole for block in units]
    blocks[dropped] = BlockShape((), (), blocks[dropped].neurons)
    Surgeon(language_model, units).apply(blocks)
    assert greedy(language_model.model, cached=True) == greedy(language_model.model, cached=False)
