"""Latencies of parts: every family has them, they add up, and what has more to do takes longer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evoprune.fitness import latency
from evoprune.fitness.latency import part_latencies, whole_latencies
from evoprune.search.costs import parts_of
from tests.models import tiny_language_model


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "gemma2"])
def test_every_part_of_every_family_is_measured(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "TURNS", 3)
    language_model = tiny_language_model(family)
    before = {name: value.clone() for name, value in language_model.model.state_dict().items()}
    parts = parts_of([bound.site for bound in language_model.sites])
    rest, found = part_latencies(language_model, list(parts.values()), 16)
    assert len(found) == len(parts) == 4 and min(found) > 0 and rest >= 0
    assert all(isinstance(value, int) for value in (rest, *found))
    for name, value in language_model.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_pre_hooks for module in language_model.model.modules())


def test_a_part_is_the_module_that_its_matrices_share() -> None:
    llama, opt = tiny_language_model("llama"), tiny_language_model("opt")

    def modules(language_model: object, at: int) -> list[nn.Module]:
        parts = parts_of([bound.site for bound in language_model.sites])  # type: ignore[attr-defined]
        places = list(parts.values())[at]
        return latency._modules(language_model, places)  # type: ignore[arg-type]

    assert modules(llama, 1) == [llama.model.get_submodule("model.layers.0.mlp")]
    assert modules(opt, 0) == [opt.model.get_submodule("model.decoder.layers.0.self_attn")]
    assert [type(module) for module in modules(opt, 1)] == [nn.Linear, nn.Linear]  # they lie in the block itself


def test_what_has_more_to_do_takes_longer() -> None:
    language_model = tiny_language_model(intermediate_size=8192)
    parts = parts_of([bound.site for bound in language_model.sites])
    _, found = part_latencies(language_model, list(parts.values()), 32)
    attention, mlp = found[0], found[1]
    assert mlp > 2 * attention


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "gemma2"])
def test_parts_that_do_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits while they are absent are those of a model whose parts give zeros, and of the whole one after it."""
    monkeypatch.setattr(latency, "TURNS", 2)
    language_model = tiny_language_model(family)
    sites = language_model.sites
    parts = list(parts_of([bound.site for bound in sites]).values())
    ids = torch.arange(16)[None]
    before = language_model.model(input_ids=ids, use_cache=False).logits
    heard: list[torch.Tensor] = []
    hook = language_model.model.register_forward_hook(lambda module, args, output: heard.append(output.logits))
    found = whole_latencies(language_model, [[], parts[1:3], parts], 16)
    hook.remove()
    assert len(found) == 3 and min(found) > 0
    assert torch.equal(language_model.model(input_ids=ids, use_cache=False).logits, before)
    assert torch.equal(heard[1], before)
    for at in (at for places in parts[1:3] for at in places):
        sites[at].weight().zero_()
        if (bias := sites[at].bias()) is not None:
            bias.zero_()
    expected = language_model.model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(expected, before)
    torch.testing.assert_close(heard[2], expected)


def test_the_whole_without_parts_takes_about_what_the_others_do() -> None:
    """With half of the parts gone, within a wide margin: other work on the machine comes and goes."""
    language_model = tiny_language_model(hidden_size=256, intermediate_size=1024)
    parts = list(parts_of([bound.site for bound in language_model.sites]).values())
    rest, each = part_latencies(language_model, parts, 64)
    whole, half = whole_latencies(language_model, [[], parts[:2]], 64)
    assert half < whole
    assert 1 / 3 < half / (rest + sum(each[2:])) < 3


@pytest.mark.parametrize(("seconds", "turns"), [(1e9, latency.WARM_UP + latency.TURNS), (0.0, 2)])
def test_of_what_is_slow_fewer_turns_are_taken(seconds: float, turns: int) -> None:
    taken = []
    found = latency.median_times([lambda: lambda: taken.append(1)], torch.device("cpu"), seconds=seconds)
    assert len(taken) == turns
    assert found[0] > 0
