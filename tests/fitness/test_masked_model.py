"""Masked models say what compact models say (mask policies, item 8), and all that is kept says what the model says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from evoprune.fitness.mask_units import Mask, UnitTable, shape_of, unit_table
from evoprune.fitness.masked_model import MaskedModel
from evoprune.fitness.maskers import ByUnits
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from tests.models import random_windows, tiny_language_model

KINDS = [("kv-group", "neurons:7"), ("query-head", "neuron"), ("attention", "mlp"), ("block",)]
FAMILIES: dict[str, dict[str, object]] = {
    "gpt2": {},
    "qwen2": {},
    "llama": {"num_hidden_layers": 3},
    "phi": {"num_key_value_heads": 4},
    "gemma2": {},
}


def biased(family: str, attention: str = "sdpa") -> LanguageModel:
    """A tiny model whose biases are no zeros."""
    language_model = tiny_language_model(family, attn_implementation=attention, **FAMILIES[family])
    generator = torch.Generator().manual_seed(4)
    for name, parameter in language_model.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    return language_model


def logits(language_model: LanguageModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = language_model.model(input_ids=random_windows(2, 12), use_cache=False).logits
    return found


def random_mask(table: UnitTable, seed: int) -> Mask:
    """Some units of every row; nothing of the first, all of the last; as many query heads of every group."""
    draw = np.random.default_rng(seed)
    mask = draw.random(table.n) < 0.6
    for index, row in enumerate(table.rows):
        if row.kind == "query-head":
            mask[table.of_row(index)] = np.tile([True, False], row.count // 2)
    mask[table.of_row(0)] = False
    mask[table.of_row(len(table.rows) - 1)] = True
    return mask


@pytest.mark.parametrize(
    ("family", "attention"),
    # Gemma 2 caps what attention computes, so that it runs eagerly alone.
    [(family, how) for family in FAMILIES for how in ("eager", "sdpa") if (family, how) != ("gemma2", "sdpa")],
)
@pytest.mark.parametrize("kinds", KINDS)
def test_hooks_are_the_compact_model(family: str, attention: str, kinds: tuple[str, ...]) -> None:
    language_model = biased(family, attention)
    units = find_units(language_model)
    table = unit_table(language_model, ByUnits(kinds))
    mask = random_mask(table, seed=len(kinds[0]))
    dense = logits(language_model)
    with MaskedModel(language_model, units, table).kept(mask):
        masked = logits(language_model)
    assert torch.equal(logits(language_model), dense)
    blocks = shape_of(table, mask, [block.widths for block in units])
    assert blocks is not None
    surgeon = Surgeon(language_model, units)
    surgeon.apply(blocks)
    compact = logits(language_model)
    surgeon.restore()
    scale = compact.abs().max()
    assert (masked - dense).abs().max() > 1e-2 * scale
    assert torch.allclose(masked, compact, rtol=0, atol=1e-5 * max(1.0, scale.item()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_kept_is_the_model_to_the_last_bit(family: str) -> None:
    language_model = biased(family)
    table = unit_table(language_model, ByUnits(("query-head", "neurons:5")))
    masked = MaskedModel(language_model, find_units(language_model), table)
    dense = logits(language_model)
    with masked.kept(np.ones(table.n, dtype=bool)):
        assert torch.equal(logits(language_model), dense)
    with masked.relaxed(torch.ones(table.n)):
        assert torch.equal(logits(language_model), dense)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_values_of_zeros_and_ones_are_a_mask(family: str) -> None:
    language_model = biased(family)
    table = unit_table(language_model, ByUnits(("kv-group", "neurons:7")))
    masked = MaskedModel(language_model, find_units(language_model), table)
    mask = random_mask(table, seed=3)
    with masked.kept(mask):
        expected = logits(language_model)
    with masked.relaxed(torch.from_numpy(mask.astype(np.float32))):
        assert torch.allclose(logits(language_model), expected, atol=1e-6)


def test_query_heads_that_no_shape_can_say_are_zero_columns() -> None:
    language_model = biased("llama")
    table = unit_table(language_model, ByUnits(("query-head",)))
    mask = np.ones(table.n, dtype=bool)
    mask[[0, 6, 7]] = False
    with MaskedModel(language_model, find_units(language_model), table).kept(mask):
        masked = logits(language_model)
    for block, head in ((0, 0), (1, 2), (1, 3)):
        weight = language_model.model.get_submodule(f"model.layers.{block}.self_attn.o_proj").get_parameter("weight")
        weight.data[:, 8 * head : 8 * head + 8] = 0
    assert torch.allclose(logits(language_model), masked, atol=1e-5)


def test_what_goes_may_be_no_number() -> None:
    language_model = biased("llama")
    table = unit_table(language_model, ByUnits(("neuron",)))
    mask = np.ones(table.n, dtype=bool)
    mask[5] = False
    language_model.model.get_submodule("model.layers.0.mlp.up_proj").get_parameter("weight").data[5] = torch.inf
    with MaskedModel(language_model, find_units(language_model), table).kept(mask):
        assert logits(language_model).isfinite().all()


def test_gradients_are_differences() -> None:
    """Of the sum of logits, in float64, by central differences; at zero too, in a part of which nothing stays."""
    language_model = biased("gpt2")
    language_model.model.double()
    table = unit_table(language_model, ByUnits(("kv-group", "neurons:20")))
    masked = MaskedModel(language_model, find_units(language_model), table)
    tokens = random_windows(1, 8)

    def total(values: Tensor) -> Tensor:
        with masked.relaxed(values):
            found: Tensor = language_model.model(input_ids=tokens, use_cache=False).logits.square().sum()
        return found

    values = torch.linspace(0.1, 0.9, table.n, dtype=torch.float64, requires_grad=True)
    total(values).backward()
    assert values.grad is not None
    for unit in range(table.n):
        step = torch.zeros(table.n, dtype=torch.float64)
        step[unit] = 1e-5
        with torch.no_grad():
            difference = (total(values + step) - total(values - step)) / 2e-5
        assert values.grad[unit].item() == pytest.approx(difference.item(), rel=1e-5)
    zeros = torch.zeros(table.n, dtype=torch.float64, requires_grad=True)
    total(zeros).backward()
    assert zeros.grad is not None
    assert (zeros.grad != 0).all()


def test_another_number_of_units_is_refused() -> None:
    language_model = tiny_language_model()
    table = unit_table(language_model, ByUnits(("mlp",)))
    masked = MaskedModel(language_model, find_units(language_model), table)
    with pytest.raises(InvalidInput, match="for 2 units"), masked.kept(np.ones(3, dtype=bool)):
        pass
    with pytest.raises(InvalidInput, match="for 2 units"), masked.relaxed(torch.tensor([1.0, torch.nan])):
        pass
