"""Recoveries: masks that hold to the bit, a hand-written training loop, a kill in the middle."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from evoprune.fitness import recovery_trainer
from evoprune.fitness.evaluation import evaluate_language_model
from evoprune.fitness.forms import cut_model
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.recoveries import RECOVERIES, Recovery, configured, kept_weights, learning_rate
from evoprune.fitness.recoveries.full import Full
from evoprune.fitness.recoveries.lora import Lora
from evoprune.fitness.recoveries.spp import Scaled, Spp
from evoprune.fitness.recovery import Recovered, recover, training_windows
from evoprune.fitness.text import side_documents, source_hash
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import EvopruneError, InvalidInput, UnknownName
from tests.models import random_windows, tiny_language_model
from tests.multimodal import tiny_multimodal_model
from tests.shapes import cases

WINDOWS = random_windows(12, 16, seed=1)
FAST = {"batch_tokens": 32, "learning_rate": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """Each training collects garbage, and what other tests have left would take longer than all of this."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=[*((name, {}) for name in RECOVERIES), ("full", {"train": "outputs"})], ids=str)
def recovery(request: pytest.FixtureRequest) -> Recovery:
    name, parameters = request.param
    return configured(name, FAST | parameters)


def masked(family: str = "llama") -> LanguageModel:
    """Half of each row is gone, and every third row with its bias, if it has one."""
    language_model = tiny_language_model(family)
    for bound in language_model.sites:
        bound.weight()[:, ::2] = 0
        bound.weight()[::3] = 0
        if (bias := bound.bias()) is not None:
            bias.fill_(0.5)[::3] = 0
    return language_model


def state(language_model: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in language_model.model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def run(language_model: LanguageModel, recovery: Recovery, *, distil: bool = True, **more: object) -> Recovered:
    dense = tiny_language_model(language_model.name.removeprefix("tiny-")).model if distil else None
    return recover(language_model, recovery, WINDOWS, dense=dense, seed=3, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # one stores [in, out], and has biases
def test_zeros_stay_and_nothing_else_changes_its_kind(recovery: Recovery, family: str) -> None:
    language_model = masked(family)
    before, modules = state(language_model), [type(module) for module in language_model.model.modules()]
    draws = torch.get_rng_state(), random.getstate()
    done = run(language_model, recovery)
    after = state(language_model)
    assert (done.tokens, done.steps, done.continued) == (12 * 16, 6, 0)
    assert {n: (v.shape, v.dtype) for n, v in after.items()} == {n: (v.shape, v.dtype) for n, v in before.items()}
    assert [type(module) for module in language_model.model.modules()] == modules
    learned = [name for name in before if not torch.equal(before[name], after[name])]
    assert learned
    for bound in language_model.sites:
        weight = before[f"{bound.site.name}.weight"]
        assert torch.equal(weight == 0, after[f"{bound.site.name}.weight"] == 0)
        if (bias := bound.bias()) is not None:
            assert not bias[::3].any()
            assert bias.count_nonzero() == len(bias) - len(bias[::3])
    assert not language_model.model.training
    assert not any(parameter.requires_grad for parameter in language_model.model.parameters())
    assert language_model.model.config.use_cache
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]


def test_what_learns() -> None:
    def learned(recovery: Recovery) -> set[str]:
        language_model = tiny_language_model()
        before = state(language_model)
        run(language_model, recovery, distil=False)
        after = state(language_model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        return {name.removesuffix(".weight").rpartition(".")[2] for name in changed}

    matrices = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert learned(Lora(**FAST)) == matrices  # type: ignore[arg-type]
    assert learned(Spp(**FAST)) == matrices  # type: ignore[arg-type]
    assert learned(Full(**FAST)) == matrices | norms | {"embed_tokens", "lm_head"}  # type: ignore[arg-type]
    assert learned(Full(**FAST, train="outputs")) == {"o_proj", "down_proj"} | norms  # type: ignore[arg-type]


def test_a_model_of_images_learns_from_text_in_its_language_model() -> None:
    language_model, dense = tiny_multimodal_model(), tiny_multimodal_model().model
    for bound in language_model.sites:
        bound.weight()[:, ::2] = 0
    before, config = state(language_model), language_model.model.config.to_dict()
    done = recover(language_model, Full(**FAST), WINDOWS, dense=dense)  # type: ignore[arg-type]
    learned = {name for name, value in state(language_model).items() if not torch.equal(value, before[name])}
    assert {name for name in learned if "vision" in name or "projector" in name} == set()
    assert done.parameters == sum(before[name].numel() for name in learned)
    assert language_model.model.config.to_dict() == config


@pytest.mark.parametrize("distil", [True, False])
def test_against_a_loop_by_hand(distil: bool) -> None:
    """AdamW with the betas, the warm-up, the clipping and the masks of the chapter, in the order of the windows."""
    found, expected, dense = masked(), masked().model, tiny_language_model().model
    run(found, Full(**FAST), distil=distil)  # type: ignore[arg-type]
    zeros = {name: value == 0 for name, value in expected.named_parameters() if "_proj" in name}
    expected.requires_grad_(True)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, 6)
    for ids in WINDOWS.split(2):
        logits = expected(input_ids=ids).logits
        if distil:
            p = dense(input_ids=ids).logits.softmax(-1)
            loss = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
        else:
            loss = functional.cross_entropy(logits[:, :-1].reshape(-1, 257), ids[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in expected.named_parameters():
            if name in zeros:
                parameter.grad[zeros[name]] = 0  # type: ignore[index]
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found.model.get_parameter(name), value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_lora_merged_says_what_it_said_apart(family: str) -> None:
    language_model = masked(family)
    kept, lora = kept_weights(language_model), Lora()
    before = language_model.model(input_ids=WINDOWS).logits
    lora.begin(language_model, kept)
    learning = [parameter for parameter in language_model.model.parameters() if parameter.requires_grad]
    assert len(learning) == 2 * len(language_model.sites)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in learning:
            parameter.normal_(std=0.1)
        apart = language_model.model(input_ids=WINDOWS).logits
        lora.end(language_model, kept)
        merged = language_model.model(input_ids=WINDOWS).logits
    assert torch.allclose(merged, apart, atol=1e-4)
    assert not torch.allclose(merged, before, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_spp_merged_says_what_it_said_apart(family: str) -> None:
    """A change by hand, row by row; nothing at its start; every zero of the mask is one of the bits."""
    language_model = masked(family)
    kept, spp = kept_weights(language_model), Spp(rank=5)  # which divides no width
    before, weights = language_model.model(input_ids=WINDOWS).logits, state(language_model)
    spp.begin(language_model, kept)
    assert torch.equal(language_model.model(input_ids=WINDOWS).logits, before)
    layers = {bound.site.name: language_model.model.get_submodule(bound.site.name) for bound in language_model.sites}
    generator = torch.Generator().manual_seed(0)
    expected = {}
    for bound in language_model.sites:
        layer = layers[bound.site.name]
        assert isinstance(layer, Scaled)
        layer.rows.data.normal_(generator=generator)
        rank, (rows, columns) = len(layer.columns), bound.weight().shape
        assert (rank, layer.columns.shape[1]) == (max(r for r in range(1, 6) if rows % r == 0), columns)
        bound_at = columns**-0.5
        assert 0.5 * bound_at < layer.columns.abs().max() <= bound_at
        changed = bound.weight().clone()
        for row in range(rows):
            changed[row] *= 1 + 2 * layer.rows[row, 0].detach() * layer.columns[row // (rows // rank)].detach()
        expected[bound.site.name] = changed
    apart = language_model.model(input_ids=WINDOWS).logits
    spp.end(language_model, kept)
    assert torch.allclose(language_model.model(input_ids=WINDOWS).logits, apart, atol=1e-4)
    for bound in language_model.sites:
        torch.testing.assert_close(bound.weight(), expected[bound.site.name])
        was, now = weights[f"{bound.site.name}.weight"], language_model.model.get_parameter(f"{bound.site.name}.weight")
        assert torch.equal(was.view(torch.int32) == 0, now.view(torch.int32) == 0)


@pytest.mark.parametrize(("name", "family"), [*((name, "llama") for name in RECOVERIES), ("full", "gpt2")])
def test_a_kill_changes_nothing(name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_trainer, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(recovery_trainer, "CHECKPOINT_SHARE", 0.0)
    # GPT-2 drops out, so each step draws.
    recovery, undisturbed = configured(name, FAST), masked(family)
    run(undisturbed, recovery)

    def killed(step: int, steps: int) -> None:
        assert steps == 6
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(masked(family), recovery, folder=tmp_path / "r", progress=killed)
    # Numbers and text, and no more of them than one checkpoint.
    assert {path.relative_to(tmp_path / "r").as_posix() for path in (tmp_path / "r").rglob("*")} == {
        "recovery.json",
        "checkpoint-3",
        "checkpoint-3/training.safetensors",
        "checkpoint-3/trainer_state.json",
    }
    continued = masked(family)
    done = run(continued, recovery, folder=tmp_path / "r")
    assert (done.continued, done.steps, done.discarded) == (3, 6, False)
    assert same(state(continued), state(undisturbed))
    # Killed after the last step, before the result was written.
    again = masked(family)
    assert run(again, recovery, folder=tmp_path / "r").continued == 6
    assert same(state(again), state(undisturbed))


def test_another_training_begins_anew(tmp_path: Path) -> None:
    recovery, place = Full(**FAST), tmp_path / "r"  # type: ignore[arg-type]
    assert not run(masked(), recovery, folder=place).discarded
    other = Full(batch_tokens=64)
    done = run(masked(), other, folder=place)
    assert (done.continued, done.steps, done.discarded) == (0, 3, True)
    assert run(masked(), other, folder=place, distil=False).discarded
    language_model = masked()
    language_model.sites[0].weight()[0, 0] = 0.25
    assert run(language_model, other, folder=place, distil=False).discarded


def test_a_damaged_checkpoint_is_not_trained_on(tmp_path: Path) -> None:
    recovery, place = Full(**FAST), tmp_path / "r"  # type: ignore[arg-type]
    run(masked(), recovery, folder=place)
    (place / "checkpoint-6" / "training.safetensors").write_bytes(b"no numbers")
    with pytest.raises(InvalidInput, match=r"checkpoint-6 is damaged: delete .*r to train from the start"):
        run(masked(), recovery, folder=place)
    # One that was not written to its end does not count.
    (place / "checkpoint-6" / "trainer_state.json").unlink()
    assert run(masked(), recovery, folder=place).continued == 0


@pytest.mark.parametrize("form", ["compact", "padded", "masked"])
def test_cut_models_learn_as_small_as_they_are(recovery: Recovery, form: str) -> None:
    whole = tiny_language_model()
    language_model, _ = cut_model(whole, cases(find_units(whole)[0].widths)["uneven"], form=form)
    before = state(language_model)
    held_out, dense = random_windows(8, 32, seed=2), tiny_language_model().model
    worse = evaluate_language_model(language_model.model, held_out, dense=dense)
    run(language_model, recovery)
    after = state(language_model)
    assert {name: value.shape for name, value in after.items()} == {n: value.shape for n, value in before.items()}
    for bound in language_model.sites:
        name = f"{bound.site.name}.weight"
        assert torch.equal(before[name] == 0, after[name] == 0)
    better = evaluate_language_model(language_model.model, held_out, dense=dense)
    assert worse.kl is not None and better.kl is not None
    assert better.kl < worse.kl


def test_half_precision_learns_in_single_and_comes_back() -> None:
    half, single, recovery = masked(), masked(), Full(batch_tokens=32, learning_rate=1e-4)
    for parameter in half.model.parameters():
        parameter.data = parameter.data.bfloat16()
    buffers = {name: value.dtype for name, value in half.model.named_buffers()}
    single.model.load_state_dict(half.model.state_dict())
    before = state(single)
    run(half, recovery)
    run(single, recovery)
    assert not same(before, state(single))
    assert same(state(half), {name: value.bfloat16() for name, value in state(single).items()})
    assert {name: value.dtype for name, value in half.model.named_buffers()} == buffers


class _Careless(Full):
    """Lets what was pruned grow again."""

    def end(self, language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
        language_model.sites[0].weight().fill_(1)


def test_a_plugin_that_lets_weights_grow_again_is_found_out() -> None:
    with pytest.raises(EvopruneError, match="weights that had been pruned"):
        run(masked(), _Careless(**FAST))  # type: ignore[arg-type]


def test_windows_fill_the_budget_and_no_more(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number}\n" for number in range(150)))
    language_model = tiny_language_model()
    windows = training_windows(language_model, str(text), 1000, seed=0)
    assert windows.shape == (15, 64)
    again = training_windows(language_model, str(text), 1000, seed=0)
    assert torch.equal(windows, again)
    assert not torch.equal(windows, training_windows(language_model, str(text), 1000, seed=1))
    # A third of 1,240 bytes has six windows: all come once before any comes twice.
    rounds = [{tuple(window.tolist()) for window in part} for part in windows.split(6)]
    assert rounds[0] == rounds[1] > rounds[2]
    assert len(rounds[0]) == 6
    with pytest.raises(InvalidInput, match="63 tokens of recovery do not fill one window of 64: give 64 or more"):
        training_windows(language_model, str(text), 63, seed=0)


def test_nothing_is_learned_from_what_is_measured_on() -> None:
    learned = set(side_documents("corpus", "train"))
    for side in "ABC":
        assert learned.isdisjoint(side_documents("corpus", side))
    with pytest.raises(InvalidInput, match="no side 'train'"):
        source_hash("text.txt", "train")


@pytest.mark.parametrize(
    ("name", "parameters", "told"),
    [
        ("lora", {"rank": 0}, r"rank 0 is outside \[1, 65536\]"),
        ("lora", {"train": "all"}, "recovery 'lora' has no parameter 'train'; it has learning_rate"),
        ("full", {"train": "some"}, "no train 'some'; there are all, outputs"),
        ("full", {"schedule": "steps"}, "no schedule 'steps'; there are cosine, constant"),
        ("full", {"learning_rate": "nan"}, "give a value like"),
    ],
)
def test_parameters_that_cannot_be(name: str, parameters: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        configured(name, parameters)
    with pytest.raises(UnknownName, match="no recovery 'lara'; did you mean 'lora'"):
        configured("lara")


def test_rates_follow_the_width() -> None:
    """At 4,096 LoRA has LLM-Pruner's rate, and all weights together about that of the chapter."""
    wide, narrow = tiny_language_model(), tiny_language_model()
    wide.model.config.hidden_size = 4096
    assert learning_rate(Lora(), wide) == pytest.approx(1e-4, rel=0.05)
    assert 1e-5 < learning_rate(Full(), wide) < 3e-5
    assert learning_rate(Full(), narrow) == 4096 / 32 * learning_rate(Full(), wide)
    assert learning_rate(Lora(learning_rate=0.5), narrow) == 0.5
    assert run(narrow, Full(batch_tokens=96)).learning_rate == learning_rate(Full(), narrow)


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="holds other files"):
        run(masked(), Full(**FAST), folder=tmp_path)  # type: ignore[arg-type]
    (tmp_path / "recovery.json").write_text(json.dumps({"format": "something"}))
    with pytest.raises(InvalidInput, match="holds other files"):
        run(masked(), Full(**FAST), folder=tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "notes.txt").read_text() == "mine"
