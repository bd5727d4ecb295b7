"""Methods that make a model smaller in one go: what all of them owe, and what each does, against slower ways."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import rebind
from evoprune.fitness.hidden_states import block_influence
from evoprune.fitness.merging import merged
from evoprune.fitness.methods import METHODS, Evidence, Method, apply_edit, configured
from evoprune.fitness.methods.laco import LaCo
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import parameters_of
from tests.models import FAMILIES, random_windows, tiny_language_model

WINDOWS = random_windows(3, 12)
LAYER_NAMES = {"gpt2": "n_layer"}


def deep(family: str = "llama", blocks: int = 5, **changes: Any) -> LanguageModel:
    return tiny_language_model(family, **{LAYER_NAMES.get(family, "num_hidden_layers"): blocks}, **changes)


def evidence(language_model: LanguageModel, sparsity: float | None = 0.4) -> Evidence:
    return Evidence(language_model, find_units(language_model), WINDOWS, sparsity)


def done(language_model: LanguageModel, method: Method, sparsity: float | None = 0.4) -> LanguageModel:
    """A copy of a model as a method leaves it."""
    model = deepcopy(language_model.model)
    edit = method.edit(evidence(language_model, sparsity))
    return apply_edit(
        LanguageModel(model, language_model.tokenizer, rebind(language_model.sites, model), "copy", "copy"), edit
    )[0]


def layers_of(language_model: LanguageModel) -> list[nn.Module]:
    return [block for _, block in language_model.blocks()]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_the_model_as_it_is_and_says_the_same_twice(name: str) -> None:
    language_model = deep()
    before = deepcopy(language_model.model.state_dict())
    edits = [METHODS[name].edit(evidence(language_model)) for _ in range(2)]
    after = language_model.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert edits[0].blocks == edits[1].blocks
    for one, other in ((edits[0].replaced, edits[1].replaced), (edits[0].outputs, edits[1].outputs)):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert METHODS[name].source
    assert configured(
        name, {key: str(value).replace("None", "auto") for key, value in parameters_of(METHODS[name]).items()}
    )


@pytest.mark.parametrize(("name", "family"), [*(("laco", family) for family in FAMILIES), ("shortgpt", "llama")])
def test_two_of_five_blocks_go_in_every_family(name: str, family: str) -> None:
    left = done(deep(family), METHODS[name])
    assert len(left.blocks()) == left.model.config.num_hidden_layers == 3
    ours = [module.layer_idx for _, module in left.model.named_modules() if hasattr(module, "layer_idx")]
    assert sorted(set(ours)) == [0, 1, 2]
    prompt = WINDOWS[:1, :6]
    texts = [
        left.model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=1).tolist()
        for cached in (True, False)
    ]
    assert texts[0] == texts[1]


def test_merging_by_hand() -> None:
    base = {"weight": torch.tensor([1.0, 2.0]), "bias": torch.tensor([0.5], dtype=torch.bfloat16)}
    others = [{"weight": torch.tensor([3.0, 2.0]), "bias": torch.tensor([1.5])}, {"weight": torch.tensor([0.0, 7.0])}]
    others[1]["bias"] = torch.tensor([0.5])
    assert {name: value.tolist() for name, value in merged(base, others).items()} == {
        "weight": [2.0, 7.0],
        "bias": [1.5],
    }
    assert merged(base, others, 0.5)["weight"].tolist() == [1.5, 4.5]
    assert merged(base, others)["bias"].dtype == torch.bfloat16
    with pytest.raises(InvalidInput, match="the blocks differ in weight"):
        merged(base, [{"weight": torch.zeros(3), "bias": torch.zeros(1)}])


@torch.no_grad()
def test_equal_blocks_merge_into_the_same() -> None:
    language_model = deep()
    first = layers_of(language_model)[0].state_dict()
    for block in layers_of(language_model)[1:]:
        block.load_state_dict(first)
    left = done(language_model, LaCo(layers=3))
    for block in layers_of(left):
        assert all(torch.allclose(value, first[name], atol=1e-6) for name, value in block.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("norms", ["kept", "merged"])
def test_the_released_code_deletes_the_blocks_before_the_last(norms: str) -> None:
    language_model = deep()
    layers = layers_of(language_model)
    for block in layers:
        for name, parameter in block.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
        layers[0].input_layernorm.weight[0] += 1  # no two blocks have the same
    edit = LaCo(mode="last", norms=norms, layers=3, lowest=1, highest=4).edit(evidence(language_model))
    assert edit.found["merges"] == [{"into": 1, "blocks": [2, 3]}]
    left = layers_of(done(language_model, LaCo(mode="last", norms=norms, layers=3, lowest=1, highest=4)))
    for name, value in left[1].state_dict().items():
        source = 1 if "norm" in name and norms == "kept" else 3
        assert torch.equal(value, layers[source].state_dict()[name])


def rebuilt(language_model: LanguageModel, groups: list[list[int]], mode: str) -> nn.Module:
    """A model with a block for each group of blocks, merged by hand; in groups of groups, the inner ones first."""
    model = deepcopy(language_model.model)
    model.model.layers = nn.ModuleList(combined(model.model.layers, group, mode) for group in groups)
    model.config.num_hidden_layers = len(groups)
    for index, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = index
    return model


def combined(layers: nn.ModuleList, group: Any, mode: str) -> nn.Module:
    if isinstance(group, int):
        return deepcopy(layers[group])
    parts = [combined(layers, part, mode) for part in group]
    state, others = parts[0].state_dict(), [part.state_dict() for part in parts[1:]]
    for name in state:
        if others and "norm" not in name:
            total = state[name] * (1 - len(others)) + sum(other[name] for other in others)
            state[name] = others[-1][name] if mode == "last" else total
    parts[0].load_state_dict(state)
    return parts[0]


def published(language_model: LanguageModel, threshold: float, laco: LaCo, highest: int) -> list[Any]:
    """The loop as the authors wrote it, on whole models."""
    assert laco.layers is not None
    groups: list[Any] = list(range(len(layers_of(language_model))))
    dense = language_model.model.model(WINDOWS).last_hidden_state
    at = highest - laco.layers
    while at >= laco.lowest:
        count = min(laco.layers - 1, len(groups) - 1 - at)
        tried = [*groups[:at], [groups[at], *groups[at + 1 : at + 1 + count]], *groups[at + 1 + count :]]
        hidden = rebuilt(language_model, tried, laco.mode).model(WINDOWS).last_hidden_state
        similarity = torch.cosine_similarity(hidden.flatten(1), dense.flatten(1), dim=1).mean().item()
        if similarity > threshold:
            groups = tried
            at -= laco.interval
            if at >= len(groups):
                at = len(groups) - 1 - laco.layers
        else:
            at -= 1
    return groups


@torch.no_grad()
@pytest.mark.parametrize("mode", ["rdsc", "last"])
@pytest.mark.parametrize(
    ("layers", "interval", "threshold"), [(2, 1, -1.0), (2, 2, 0.3), (3, 1, 0.0), (3, 2, -1.0), (4, 1, 0.1)]
)
def test_the_loop_is_that_of_the_released_code(mode: str, layers: int, interval: int, threshold: float) -> None:
    language_model = deep(blocks=7)
    laco = LaCo(threshold, layers, interval, mode=mode)
    groups = published(language_model, threshold, laco, highest=6)
    expected = rebuilt(language_model, groups, mode)(WINDOWS).logits
    left = done(language_model, laco, None)
    assert len(left.blocks()) == len(groups)
    assert torch.allclose(left.model(WINDOWS).logits, expected, atol=1e-3 * expected.abs().max().item())


def test_a_number_of_blocks_takes_the_largest_threshold_that_gives_it() -> None:
    language_model = deep(blocks=6)
    found = LaCo(layers=2).edit(evidence(language_model, 0.5)).found
    threshold = found["threshold"]
    assert sum(len(merge["blocks"]) for merge in found["merges"]) == 3
    assert found["similarity"] > threshold

    def gone(at: float) -> int:
        merges = LaCo(at, 2).edit(evidence(language_model, None)).found["merges"]
        return sum(len(merge["blocks"]) for merge in merges)

    assert gone(threshold) >= 3
    assert gone(threshold + 0.002) < 3


@torch.no_grad()
def test_shortgpt_drops_what_changes_nothing() -> None:
    language_model = deep()
    for index in (1, 3):
        block = layers_of(language_model)[index]
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            block.get_submodule(path).get_parameter("weight").zero_()
    edit = METHODS["shortgpt"].edit(evidence(language_model))
    assert edit.found["dropped"] == [1, 3]
    assert edit.found["influence"] == block_influence(language_model, WINDOWS)
    dense, left = language_model.model(WINDOWS).logits, done(language_model, METHODS["shortgpt"])
    assert torch.allclose(left.model(WINDOWS).logits, dense, atol=1e-5)
    protecting = configured("shortgpt", {"protect_first": "2"}).edit(evidence(language_model))
    assert protecting.found["dropped"][0] >= 2


@pytest.mark.parametrize(
    ("name", "parameters", "sparsity", "told"),
    [
        ("laco", {"threshold": "1.5"}, None, r"threshold of laco 1.5 is outside \[-1, 1\]"),
        ("laco", {"threshold": "0.5"}, 0.25, "give it or a sparsity, not both"),
        ("laco", {"threshold": "1"}, None, "no merge is above the threshold 1: give a lower one"),
        ("laco", {"mode": "average"}, None, "no mode of laco 'average'; there are rdsc, last"),
        ("laco", {"norms": "gone"}, None, "no treatment of norms 'gone'"),
        ("laco", {"layers": "1"}, None, "1 blocks cannot become one: give layers of 2 or more"),
        ("laco", {"layers": "many"}, None, "layers of method 'laco' is 'many': give a value like 1"),
        ("laco", {"layers": "5"}, 0.25, "merges of 5 blocks from 0 up to 4 do not fit a model of 5"),
        ("laco", {"interval": "0"}, None, "are whole numbers from 1 on"),
        ("laco", {"lowest": "2"}, 0.6, "take away 1 blocks at most and not 3: widen the range"),
        ("laco", {}, 0.1, "a sparsity of 0.1 is less than one of 5 blocks: give 0.2 or more"),
        ("shortgpt", {}, 0.1, "a sparsity of 0.1 is less than one of 5 blocks"),
        (
            "shortgpt",
            {"protect_first": "2", "protect_last": "2"},
            0.5,
            "2 blocks cannot go where 1 of 5 are not protected",
        ),
        ("shortgpt", {"protect_first": "-1"}, 0.5, "-1 first and 0 last blocks cannot be protected"),
        ("shortgpt", {"alpha": "1"}, 0.5, "method 'shortgpt' has no parameter 'alpha'; it has protect_first"),
    ],
)
def test_what_cannot_be_is_refused(name: str, parameters: dict[str, str], sparsity: float | None, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        configured(name, parameters).edit(evidence(deep(), sparsity))


def test_one_block_has_none_to_merge() -> None:
    with pytest.raises(InvalidInput, match="a model of 1 block has none to merge"):
        METHODS["laco"].edit(evidence(deep(blocks=1)))
    with pytest.raises(InvalidInput, match="less than one of 1 blocks"):
        METHODS["shortgpt"].edit(evidence(deep(blocks=1)))


def test_unlike_blocks_are_not_merged() -> None:
    language_model = deep()
    block = layers_of(language_model)[2]
    up = block.get_submodule("mlp.up_proj")
    up.weight = nn.Parameter(torch.zeros(7, 32), requires_grad=False)
    before: Tensor = up.weight
    with pytest.raises(InvalidInput, match="the blocks differ in mlp"):
        METHODS["laco"].edit(evidence(language_model))
    assert up.weight is before
