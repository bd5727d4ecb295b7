"""Thresholds for inputs: the share that was asked for, centres by hand, what masks lose stays lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evoprune.fitness.activations import Threshold, set_thresholds, threshold_of
from evoprune.fitness.compressors import COMPRESSORS, AtRunTime
from evoprune.fitness.compressors.scap import Scap, _mode
from evoprune.fitness.models import LanguageModel
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import is_attention
from tests.models import random_windows, tiny_language_model

WINDOWS = random_windows(8, 32)


def inputs_of(language_model: LanguageModel) -> dict[str, Tensor]:
    """[tokens, in] of every site, as its layer is called: before its own threshold, behind all others."""
    found: dict[str, Tensor] = {}
    hooks = []
    for bound in language_model.sites:

        def see(_: object, args: tuple[Tensor], name: str = bound.site.name) -> None:
            found[name] = args[0].flatten(0, -2)

        hooks.append(bound.module.register_forward_pre_hook(see, prepend=True))
    language_model.model(input_ids=WINDOWS)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_share_that_was_asked_for_goes(family: str) -> None:
    language_model = tiny_language_model(family)
    found = Scap().attach(language_model, WINDOWS, 0.4)
    assert [one.name for one in found] == [bound.site.name for bound in language_model.sites]
    seen = inputs_of(language_model)
    for one, bound in zip(found, language_model.sites, strict=True):
        inputs = seen[one.name]
        share = ((inputs - one.threshold.mode).abs() <= one.threshold.threshold).float().mean().item()
        # ReLU, in OPT, has let more go than that already.
        assert share == pytest.approx(max(0.4, (inputs == 0).float().mean().item()), abs=0.01)
        assert one.sparsity == pytest.approx(share, abs=0.01)
        changed = torch.where(
            (inputs - one.threshold.mode).abs() <= one.threshold.threshold, one.threshold.mode, inputs
        )
        weight = bound.weight()
        lost = ((inputs - changed) @ weight.T).square().sum() / (inputs @ weight.T).square().sum()
        if bound.site.name.endswith(("down_proj", "o_proj", "c_proj", "fc2", "out_proj")):  # reads what no other does
            assert one.error == pytest.approx(lost.item(), rel=1e-3)


def test_what_shares_an_input_shares_its_threshold_and_shares_are_by_kind() -> None:
    language_model = tiny_language_model()
    found = {one.name: one for one in Scap(attention=0.2).attach(language_model, WINDOWS)}
    for bound in language_model.sites:
        kind = bound.site.kind
        expected = 0.2 if is_attention(kind) else 0.55 if "down" in kind else 0.35
        assert found[bound.site.name].sparsity == pytest.approx(expected, abs=0.01)
    for block in range(2):
        attention = [found[f"model.layers.{block}.self_attn.{name}_proj"].threshold for name in "qkvo"]
        assert attention[0] == attention[1] == attention[2] != attention[3]
        gate, up = (found[f"model.layers.{block}.mlp.{name}_proj"].threshold for name in ("gate", "up"))
        assert gate == up
    assert {one.name.split(".")[3] for one in Scap().attach(language_model, WINDOWS)} == {"mlp"}
    assert all(threshold_of(bound.module) is None for bound in language_model.sites if "self_attn" in bound.site.name)


def test_nothing_that_goes_changes_nothing() -> None:
    language_model = tiny_language_model()
    before = language_model.model(input_ids=WINDOWS).logits
    Scap().attach(language_model, WINDOWS, 0.3)
    assert not torch.equal(language_model.model(input_ids=WINDOWS).logits, before)
    assert Scap().attach(language_model, WINDOWS, 0.0) == ()
    assert torch.equal(language_model.model(input_ids=WINDOWS).logits, before)
    set_thresholds((bound.module, Threshold(0.5, 0.0)) for bound in language_model.sites)
    assert torch.equal(language_model.model(input_ids=WINDOWS).logits, before)


def test_thresholds_come_on_top_of_masks() -> None:
    language_model = tiny_language_model()
    for bound in language_model.sites:
        bound.weight()[:, ::2] = 0
    weights = [bound.weight().clone() for bound in language_model.sites]
    found = Scap().attach(language_model, WINDOWS, 0.5)
    assert all(0 < one.error < 1 for one in found)
    assert all(torch.equal(bound.weight(), weight) for bound, weight in zip(language_model.sites, weights, strict=True))


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_centres_at_the_offset_of_the_inputs_lose_less(offset: float) -> None:
    """The same share goes; around zero it is the wrong one where inputs are not centred there."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 16, generator=generator) ** 3 + offset
    layer = torch.nn.Linear(16, 8, bias=True).requires_grad_(False)
    errors = {centre: Scap(centre=centre)._calibrated(inputs, [layer], 0.5)[1] for centre in ("zero", "median", "mode")}
    best, error = Scap()._calibrated(inputs, [layer], 0.5)
    assert error == min(errors.values())
    if offset:
        assert max(errors["median"], errors["mode"]) < 0.1 * errors["zero"]
        assert best.mode == pytest.approx(offset, abs=0.1)
    assert best.dropped(inputs).float().mean() == 0.5


def test_the_mode_is_where_values_are_most_frequent() -> None:
    """Neither the mean nor the median of a skewed mixture; some values are far away."""
    generator = torch.Generator().manual_seed(0)
    most = 2 + 0.1 * torch.randn(40_000, generator=generator)
    values = torch.cat([most, 5 + torch.randn(60_000, generator=generator), torch.full((20,), 1e4)])
    assert _mode(values) == pytest.approx(2, abs=0.03)
    assert _mode(torch.full((100,), 0.7)) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Scap(centre="mean"), "no centre 'mean'; there are best, zero, median, mode"),
        (lambda: Scap(attention=1.5), "attention 1.5 is outside"),
        (lambda: Scap().check(8, 8, (2, 4)), "lets single inputs go, not 2:4: give a sparsity"),
        (lambda: Scap().compress(torch.ones(2, 2), [], {}), "'scap' removes no weights: prune by another one"),
    ],
)
def test_what_it_cannot_do(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        wrong()
    assert isinstance(COMPRESSORS["scap"], AtRunTime)
