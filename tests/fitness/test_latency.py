"""Latencies of parts: every family has them, they add up, and what has more to do takes longer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from evoprune.fitness import latency
from evoprune.fitness.latency import part_latencies
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
        return latency._modules(language_model, [language_model.sites[place] for place in places])  # type: ignore

    assert modules(llama, 1) == [llama.model.get_submodule("model.layers.0.mlp")]
    assert modules(opt, 0) == [opt.model.get_submodule("model.decoder.layers.0.self_attn")]
    assert [type(module) for module in modules(opt, 1)] == [nn.Linear, nn.Linear]  # they lie in the block itself


def test_what_has_more_to_do_takes_longer() -> None:
    language_model = tiny_language_model(intermediate_size=8192)
    parts = parts_of([bound.site for bound in language_model.sites])
    _, found = part_latencies(language_model, list(parts.values()), 32)
    attention, mlp = found[0], found[1]
    assert mlp > 2 * attention
