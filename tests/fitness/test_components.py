"""Components with budgets of their own: searched ones protect what is fragile, and pipelines of diffusers have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

import evoprune
from evoprune.cli import main
from evoprune.fitness.allocating import allocate_model, searched_budgets
from evoprune.fitness.allocators import configured
from evoprune.fitness.component_budgets import guarded, search_budgets
from evoprune.fitness.generator_loss import GeneratorLoss, draw_triples
from evoprune.fitness.pipelines import Pipeline, pipeline_of
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site
from evoprune.pipelines import read_prompts
from tests.models import tiny_language_model, tiny_tokenizer


class Denoiser(nn.Module):
    """Cross attention between a convolution's pixels and a text."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4, sample_size=4)
        self.conv_in = nn.Conv2d(4, 24, 3, padding=1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(24, 24), "k": nn.Linear(16, 24)})])
        self.conv_out = nn.Conv2d(24, 4, 3, padding=1)
        self.time_embedding = nn.Linear(8, 24)

    def forward(
        self, latents: torch.Tensor, step: int, encoder_hidden_states: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """As diffusers calls a UNet."""
        text, time = encoder_hidden_states, torch.linspace(0, 1, 8) * step / 1000
        hidden = self.conv_in(latents) + self.time_embedding(time)[:, None, None]
        block = self.down_blocks[0]
        pixels = hidden.flatten(2).transpose(1, 2)
        seen = torch.softmax(block["q"](pixels) @ block["k"](text).transpose(1, 2), -1) @ block["k"](text)
        return (self.conv_out(hidden + seen.transpose(1, 2).reshape(hidden.shape)),)


def text_encoder() -> CLIPTextModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return CLIPTextModel(CLIPTextConfig(vocab_size=300, max_position_embeddings=16, **sizes, **ids))


def padding_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def toy() -> Pipeline:
    """Two components, and a VAE that nothing may touch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
        parts = {"vae": nn.Linear(4, 4), "text_encoder": text_encoder(), "unet": Denoiser()}
        for name in ("text_encoder", "unet"):
            for parameter in parts[name].parameters():
                if parameter.dim() >= 2:
                    nn.init.normal_(parameter, std=0.3)
    return pipeline_of(
        SimpleNamespace(components={**parts, "scheduler": scheduler, "tokenizer": padding_tokenizer()}), "toy"
    )


def noise_loss(pipeline: Pipeline, dense: torch.Tensor | None = None) -> torch.Tensor:
    """Noise at a fixed latent and prompt."""
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(1, 9)[None].repeat(2, 1)
    return pipeline.model["unet"](latents, 500, pipeline.model["text_encoder"](input_ids=ids).last_hidden_state)[0]


def test_linear_layers_of_both_components_and_nothing_else(toy: Pipeline) -> None:
    names = {bound.site.name for bound in toy.sites}
    wanted = {name for name, module in toy.model.named_modules() if isinstance(module, nn.Linear)}
    assert names == wanted
    assert {bound.site.component for bound in toy.sites} == {"text_encoder", "denoiser"}
    assert not any("vae" in name or "conv" in name for name in names)
    by_name = {bound.site.name: bound.site for bound in toy.sites}
    assert by_name["unet.down_blocks.0.q"].block == by_name["unet.down_blocks.0.k"].block
    assert by_name["unet.down_blocks.0.q"].block != by_name["unet.time_embedding"].block


def planted(fragile: str, sizes: Mapping[str, int]) -> tuple[list[Site], list[dict[str, float]]]:
    return [Site(f"{name}.w", "w", 0, 1, size, 100, name) for name, size in sizes.items()], []


@pytest.mark.parametrize("fragile", ["a", "b"])
def test_searched_budgets_protect_the_fragile(fragile: str) -> None:
    """Losses 100 times as steep in one component; the optimum of a sum of squares is known (chapter, 7.13)."""
    sites, tried = planted(fragile, {"a": 340, "b": 866})
    steep = {name: 10.0 if name == fragile else 1.0 for name in ("a", "b")}

    def loss(budgets: Mapping[str, float]) -> float:
        tried.append(dict(budgets))
        return sum(steep[name] * share**2 for name, share in budgets.items())

    found = search_budgets(sites, 0.385, loss)
    other = "b" if fragile == "a" else "a"
    assert found[fragile] < 0.385 < found[other]
    weights = {"a": 340, "b": 866}
    for budgets in (found, *tried):
        assert sum(budgets[name] * weights[name] for name in weights) / 1206 == pytest.approx(0.385, abs=1e-9)
    grid = np.linspace(0, min(0.385 * 1206 / weights[fragile], 0.99), 2001)
    rest = (0.385 * 1206 - grid * weights[fragile]) / weights[other]
    best = (steep[fragile] * grid**2 + rest**2)[rest <= 0.99].min()
    assert loss(found) <= best * 1.05
    assert len({tuple(budgets.values()) for budgets in tried}) < 60


def test_one_component_has_nothing_to_search() -> None:
    with pytest.raises(InvalidInput, match="there is only_one alone"):
        search_budgets(planted("", {"only_one": 10})[0], 0.5, lambda budgets: 0.0)


def test_budgets_searched_on_a_pipeline_with_a_fragile_part(toy: Pipeline) -> None:
    """The loss weighs the text encoder's change a hundredfold: it is to lose less than the denoiser."""
    dense = [bound.weight().clone() for bound in toy.sites]

    def loss() -> float:
        total = 0.0
        for bound, weight in zip(toy.sites, dense, strict=True):
            change = (bound.weight() - weight).square().sum().item()
            total += change * (100 if bound.site.component == "text_encoder" else 1)
        return total

    allocator, criterion = configured("uniform"), CRITERIA["magnitude"]
    found = searched_budgets(toy, "uniform", allocator, 0.4, criterion=criterion, loss=loss)
    assert found["text_encoder"] < 0.4 < found["denoiser"]
    assert all(torch.equal(bound.weight(), weight) for bound, weight in zip(toy.sites, dense, strict=True))
    allocation = allocate_model(toy, "uniform", allocator, None, criterion=criterion, budgets=found)
    assert allocation.sparsity == pytest.approx(0.4, abs=0.01)


def test_pruning_a_pipeline_in_python(toy: Pipeline) -> None:
    """The budgets of the study, per component, by magnitude within rows."""
    before = noise_loss(toy)
    pruned = evoprune.prune_pipeline(toy, budgets={"text_encoder": 0.475, "denoiser": 0.35})
    assert torch.equal(noise_loss(toy), before)
    assert not torch.equal(noise_loss(pruned.pipeline), before)
    for component, budget in (("text_encoder", 0.475), ("denoiser", 0.35)):
        sites = [bound for bound in pruned.pipeline.sites if bound.site.component == component]
        zeros = sum(int((bound.weight() == 0).sum()) for bound in sites)
        assert zeros / sum(bound.site.weights for bound in sites) == pytest.approx(budget, abs=0.01)
    for name, parameter in pruned.pipeline.model.named_parameters():
        if "conv" in name or "embeddings" in name:
            assert torch.equal(parameter, toy.model.get_parameter(name))


PROMPTS = ["a red cube", "two birds", "a street at night"]


def test_noise_is_compared_at_the_same_triples(toy: Pipeline) -> None:
    """By hand, with a dense copy beside: what each component adds, while the other is dense and while it is not."""
    dense, pruned = toy.copy(), toy.copy()
    triples = draw_triples(pruned, PROMPTS, seed=3)
    assert [triple.step for triple in triples] == [166, 500, 833]
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(triples, draw_triples(toy, PROMPTS, 3), strict=True))
    assert not torch.equal(triples[0].latent, draw_triples(toy, PROMPTS, 4)[0].latent)
    loss = GeneratorLoss(pruned, triples)
    assert loss.by_component() == {"text_encoder": 0, "denoiser": 0} and loss() == 0
    known = {}
    for component in ("text_encoder", "denoiser"):
        for bound in pruned.sites:
            if bound.site.component == component:
                bound.weight()[:, ::3] = 0
        known[component] = loss.by_component()
    expected = {"text_encoder": 0.0, "denoiser": 0.0}
    with torch.no_grad():
        for triple in triples:
            before, after = (each.model["text_encoder"](triple.ids).last_hidden_state for each in (dense, pruned))
            true = dense.model["unet"](triple.latent, triple.step, before)[0]
            of_text = dense.model["unet"](triple.latent, triple.step, after)[0]
            of_unet = pruned.model["unet"](triple.latent, triple.step, before)[0]
            expected["text_encoder"] += ((of_text - true) ** 2).mean().item() / 3
            expected["denoiser"] += ((of_unet - true) ** 2).mean().item() / 3
    assert known["denoiser"] == pytest.approx(expected, rel=1e-4)
    assert known["text_encoder"] == {"text_encoder": known["denoiser"]["text_encoder"], "denoiser": 0}
    assert loss() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_no_component_falls_off_a_cliff() -> None:
    """From 0.42 on the loss of `a` grows fourfold each twentieth: its sum with `b` is lowest at 0.55."""

    def losses(budgets: Mapping[str, float]) -> dict[str, float]:
        return {"a": 0.01 * 4 ** max(20 * (budgets["a"] - 0.42), 0), "b": 10 * budgets["b"]}

    sites = planted("", {"a": 100, "b": 100})[0]
    free = search_budgets(sites, 0.4, lambda at: sum(losses(at).values()))
    held = search_budgets(sites, 0.4, guarded(losses))
    edge = 0.42 + 0.05 * math.log(3, 4)
    assert free["a"] == pytest.approx(0.55, abs=0.0125)
    assert edge - 0.0125 <= held["a"] <= edge
    for a, fallen in ((edge + 0.001, True), (edge - 0.001, False)):
        at = {"a": a, "b": 0.3}
        assert guarded(losses)(at) == (math.inf if fallen else sum(losses(at).values()))
    near = guarded(lambda at: {"a": at["a"] ** 9})
    assert near({"a": 0.19}) == 0.19**9
    assert near({"a": 0.3}) == math.inf
    assert guarded(lambda at: {"a": math.nan})({"a": 0.1}) == math.inf
    with pytest.raises(
        InvalidInput, match=r"the model is lost at all .* budgets that were tried: give a lower sparsity"
    ):
        search_budgets(sites, 0.4, lambda at: math.inf)


def test_budgets_searched_by_noise(toy: Pipeline) -> None:
    """A UNet that hardly listens to the text: more can go from the text encoder, each time the same."""
    deaf = toy.copy()
    deaf.model["unet"].down_blocks[0]["k"].weight.mul_(0.05)
    pruned = evoprune.prune_pipeline(deaf, sparsity=0.4, budgets="searched", prompts=PROMPTS)
    budgets = pruned.allocation.parameters["budgets"]
    assert budgets["text_encoder"] > 0.4 > budgets["denoiser"]
    assert pruned.sparsity == pytest.approx(0.4, abs=0.02)
    again = evoprune.prune_pipeline(deaf, sparsity=0.4, budgets="searched", prompts=PROMPTS)
    assert again.allocation == pruned.allocation
    even = evoprune.prune_pipeline(deaf, sparsity=0.4)

    def distance(pipeline: Pipeline) -> float:
        copied = deaf.copy()
        loss = GeneratorLoss(copied, draw_triples(deaf, PROMPTS))
        for bound, other in zip(copied.sites, pipeline.sites, strict=True):
            bound.weight().copy_(other.weight())
        return loss()

    assert distance(pruned.pipeline) < distance(even.pipeline)


def test_pipelines_whose_noise_cannot_be_compared(toy: Pipeline) -> None:
    parts = toy.pipe.components
    alone = pipeline_of(SimpleNamespace(components={"transformer": parts["unet"]}), "alone")
    with pytest.raises(InvalidInput, match="'alone' has transformer: give a loss of your own"):
        draw_triples(alone, PROMPTS)
    mute = pipeline_of(SimpleNamespace(components={name: parts[name] for name in ("unet", "text_encoder")}), "mute")
    with pytest.raises(InvalidInput, match="no tokenizer or no scheduler"):
        draw_triples(mute, PROMPTS)
    with pytest.raises(InvalidInput, match="no prompt"):
        draw_triples(toy, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "wanda"}, "no calibration for X_l2"),
        ({"allocation": "das"}, "runs a language model on text"),
        ({"budgets": "searched"}, "prompts are needed"),
        ({"budgets": "sought"}, "give sparsities by group, or searched"),
        ({"budgets": {"vae": 0.5}}, r"no prunable matrix fits 'vae'; give a component \(text_encoder, denoiser\)"),
    ],
)
def test_what_a_pipeline_refuses(toy: Pipeline, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        evoprune.prune_pipeline(toy, **arguments)


def test_a_language_model_has_one_component() -> None:
    with pytest.raises(InvalidInput, match="there is language_model alone"):
        evoprune.allocate(tiny_language_model(), "uniform", budgets="searched", calibration_window=16)


def test_pipelines_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused before diffusers is needed, in one line."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "empty.txt").write_text("\n")
    prune = ["prune", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out"), "--metric", "magnitude"]
    for words, said in (
        ([*prune, "--budget", "searched"], "prompts are needed"),
        ([*prune, "--budget", "searched", "--calibration", "nope.txt"], "no prompts in 'nope.txt' (No such file"),
        ([*prune, "--budget", "searched", "--calibration", str(tmp_path / "empty.txt")], "one a line"),
        (
            ["search", "allocation", prune[1], "--executor", "inline"],
            "is a pipeline of diffusers, which `evoprune prune`",
        ),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and said in error
    (tmp_path / "prompts.txt").write_text("a cat\n\n two dogs \n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a cat", "two dogs"]


def test_a_folder_that_holds_no_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'evoprune[diffusion]'")
    with pytest.raises(InvalidInput, match=r"no pipeline .*: give a folder with a model_index\.json"):
        evoprune.load_pipeline(str(tmp_path))


def test_stable_diffusion_saved_and_loaded_by_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'evoprune[diffusion]'")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=[8], norm_num_groups=4)
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder(), tokenizer=padding_tokenizer(), unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "dense")  # fmt: skip
    budgets = {"text_encoder": 0.475, "denoiser": 0.35}
    pruned = evoprune.prune_pipeline(str(tmp_path / "dense"), budgets=budgets, out=tmp_path / "out")
    loaded = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "out"), use_safetensors=True)
    zeros, weights = {"text_encoder": 0, "unet": 0}, {"text_encoder": 0, "unet": 0}
    for bound in pruned.pipeline.sites:
        part, _, path = bound.site.name.partition(".")
        weight = getattr(loaded, part).get_submodule(path).weight
        assert torch.equal(weight, bound.weight())
        zeros[part] += int((weight == 0).sum())
        weights[part] += weight.numel()
    assert zeros["text_encoder"] / weights["text_encoder"] == pytest.approx(0.475, abs=0.01)
    assert zeros["unet"] / weights["unet"] == pytest.approx(0.35, abs=0.01)
    found = evoprune.prune_pipeline(str(tmp_path / "dense"), sparsity=0.4, budgets="searched", prompts=PROMPTS)
    assert found.sparsity == pytest.approx(0.4, abs=0.02)
    for name, value in loaded.vae.state_dict().items():
        assert torch.equal(value, vae.state_dict()[name])
