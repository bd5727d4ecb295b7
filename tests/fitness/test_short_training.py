"""A short training of a cut model, against the same one written out with full distributions and torch's own loop."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evoprune.fitness.short_training import Trainable, Training, TrainingText, trainable_places, trained
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.teacher import build_teacher, linear_head
from evoprune.fitness.units import find_units
from evoprune.metrics.shape import BlockShape
from tests.models import random_windows, tiny_language_model

WINDOWS = random_windows(60, 16)
ROWS = 3
SHAPE = (BlockShape((1,), (2, 3), tuple(range(5, 30))), BlockShape((0, 1), (0, 2), tuple(range(48))))
# The same of a family in which every head is a group of its own.
ALONE = (BlockShape((2, 3), (2, 3), SHAPE[0].neurons), BlockShape((0, 2), (0, 2), SHAPE[1].neurons))
OUTPUTS = {
    "llama": ("o_proj", "down_proj", "layernorm", "model.norm"),
    "gpt2": ("attn.c_proj", "mlp.c_proj", "ln_1", "ln_2", "ln_f"),
}


class Pupil:
    """A tiny model cut to a shape, and what it is trained on."""

    def __init__(
        self, family: str = "llama", shape: Sequence[BlockShape] = SHAPE, loss: str = "kl", rows: int = ROWS
    ) -> None:
        self.model = tiny_language_model(family)
        self.units = find_units(self.model)
        self.dense = deepcopy(self.model.model)
        self.head = linear_head(self.model.model, WINDOWS)
        teacher = build_teacher(self.model.model, self.head, WINDOWS) if loss == "kl" else None
        self.text = TrainingText(WINDOWS, teacher, rows)
        self.surgeon = Surgeon(self.model, self.units)
        self.surgeon.apply(ALONE if family == "gpt2" else shape)

    def training(self, loss: str = "kl", trainable: Trainable = "outputs", rate: float = 1e-3) -> Training:
        return Training.from_json(
            {
                "tokens": WINDOWS.numel(), "batch_tokens": ROWS * 16, "trainable": trainable, "loss": loss,
                "learning_rate": rate,
            }
        )  # fmt: skip

    def after(self, training: Training) -> dict[str, Tensor]:
        with trained(self.model, self.units, self.head, training, self.text):
            return {name: value.detach().clone() for name, value in self.model.model.named_parameters()}


def by_hand(
    cut: PreTrainedModel, dense: PreTrainedModel, loss: str, names: Sequence[str], rate: float, rows: int
) -> None:
    chosen = [value for name, value in cut.named_parameters() if any(word in name for word in names)]
    for parameter in chosen:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(chosen, lr=rate, betas=(0.9, 0.95), weight_decay=0)
    steps = len(WINDOWS) // rows
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / (0.05 * steps), 1)
        ids = WINDOWS[step * rows : (step + 1) * rows]
        log_q = cut(input_ids=ids).logits.log_softmax(-1)[:, :-1]
        if loss == "kl":
            log_p = dense(input_ids=ids).logits.log_softmax(-1)[:, :-1]
            value = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        else:
            value = -log_q.gather(2, ids[:, 1:, None]).mean()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()


@pytest.mark.parametrize(
    ("family", "loss", "rows"), [("llama", "kl", 3), ("llama", "kl", 1), ("llama", "ce", 3), ("gpt2", "kl", 3)]
)
def test_the_weights_are_those_of_a_loop_written_out(family: str, loss: str, rows: int) -> None:
    """With a window a step the learning rate grows for three steps."""
    pupil = Pupil(family, loss=loss, rows=rows)
    expected = deepcopy(pupil.model.model)
    before = {name: value.clone() for name, value in expected.named_parameters()}
    by_hand(expected, pupil.dense, loss, OUTPUTS[family], 1e-3, rows)
    found = pupil.after(pupil.training(loss))
    names = {name for name in found if any(word in name for word in OUTPUTS[family])}
    for name, value in expected.named_parameters():
        # The first step of Adam is a sign, so a gradient that is all rounding may go either way.
        close = torch.isclose(found[name], value, rtol=0, atol=2e-5).double().mean()
        assert close > (0.995 if name in names else 1 - 1e-12), name
        if name in names:
            assert (found[name] - before[name]).abs().max() > 1e-3, name
        else:
            assert torch.equal(found[name], before[name]), name


@pytest.mark.parametrize("trainable", ["outputs", "all"])
def test_what_is_pruned_stays_away_and_what_is_kept_moves(trainable: Trainable) -> None:
    pupil = Pupil()
    live = dict(pupil.model.model.named_parameters())
    before = {name: value.clone() for name, value in live.items()}
    training = pupil.training(trainable=trainable)
    places = trainable_places(pupil.model, pupil.units, trainable)
    names = {name for name, value in live.items() if any(value is m.get_parameter(n) for m, n in places)}
    assert {name for name in live if "embed" in name or "lm_head" in name}.isdisjoint(names)
    assert (len(names) == len(live) - 2) == (trainable == "all")
    found = pupil.after(training)
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in before.items()}
    moved = sum(int((found[name] != before[name]).sum()) for name in names)
    assert moved >= 0.9 * sum(before[name].numel() for name in names)
    # Behind it the model has the very parameters that it had, and the dense one is as it was.
    assert all(value is live[name] for name, value in pupil.model.model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in live.items())
    pupil.surgeon.restore()
    for (name, value), (_, dense) in zip(
        pupil.model.model.named_parameters(), pupil.dense.named_parameters(), strict=True
    ):
        assert torch.equal(value, dense), name
        assert not value.requires_grad


def test_candidates_recover_and_do_so_again_to_the_bit() -> None:
    pupil = Pupil()

    def kl(model: nn.Module) -> float:
        log_p, log_q = (net(input_ids=WINDOWS).logits.double().log_softmax(-1) for net in (pupil.dense, model))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    before, training = kl(pupil.model.model), pupil.training()
    with trained(pupil.model, pupil.units, pupil.head, training, pupil.text):
        assert kl(pupil.model.model) < 0.9 * before
    assert kl(pupil.model.model) == before
    first = pupil.after(training)
    pupil.surgeon.apply([block.widths.whole for block in pupil.units])
    pupil.after(training)
    pupil.surgeon.apply(SHAPE)
    again = pupil.after(training)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_dropped_parts_have_nothing_to_train() -> None:
    gone = BlockShape((), (), ())
    pupil = Pupil(shape=(gone, BlockShape((), (), tuple(range(10)))))
    found = pupil.after(pupil.training())
    assert {name for name in found if "layers" in name} == {
        f"model.layers.1.{name}.weight"
        for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    }
    pupil.surgeon.apply((gone, gone))
    assert not torch.equal(pupil.after(pupil.training())["model.norm.weight"], pupil.dense.model.norm.weight)


def test_half_precision_has_masters() -> None:
    """Updates of less than half a unit in the last place add up; without masters they are lost."""
    pupil = Pupil()
    pupil.surgeon.restore()
    pupil.model.model.to(torch.bfloat16)
    live = pupil.model.model.model.layers[0].mlp.down_proj.weight
    # Where a unit in the last place is a thousandth, a step of a ten-thousandth is nothing.
    large = live.abs() > 0.125
    found = pupil.after(pupil.training(rate=1e-4))["model.layers.0.mlp.down_proj.weight"]
    assert found.dtype == torch.bfloat16
    assert (found != live)[large].float().mean() > 0.1
