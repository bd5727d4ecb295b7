"""Models that read images: which matrices they have, how unlike their tokens are, and which tokens stand for all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import decoder_blocks, list_sites
from evoprune.fitness.allocating import ModelEvidence, allocate_model
from evoprune.fitness.allocators import configured
from evoprune.fitness.amia import TokenChoice, select_tokens
from evoprune.fitness.evaluation import evaluate_language_model
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Samples, token_modalities
from evoprune.fitness.statistics import PassSettings, collect_statistics
from evoprune.fitness.statistics_amia import attention_maps, last_row
from evoprune.fitness.statistics_merge import merge
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from tests.models import random_windows, tiny_language_model
from tests.multimodal import (
    FAMILIES,
    IMAGE,
    LAYERS,
    VISION_LAYERS,
    encoded,
    padded,
    samples,
    tiny_multimodal,
    tiny_multimodal_model,
)

MATRICES = {"llava": (7, 6, 2), "llava_next": (7, 6, 2), "qwen2_vl": (7, 4, 2), "qwen2_5_vl": (7, 5, 2)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def evidence_of(model: LanguageModel, calibration: Any) -> ModelEvidence:
    return ModelEvidence(model, 0.5, CRITERIA["magnitude"], None, calibration, None, lambda what, done, total: None)


# Which matrices


def test_the_language_model_alone_unless_more_is_asked_for(family: str) -> None:
    model = tiny_multimodal(family)
    language, vision, projector = MATRICES[family]
    sites = [bound.site for bound in list_sites(model)]
    assert len(sites) == language * LAYERS
    assert {site.component for site in sites} == {"language_model"}
    assert sites[0].name == "model.language_model.layers.0.self_attn.q_proj"
    everything = [bound.site for bound in list_sites(model, ("all",))]
    assert len(everything) == vision * VISION_LAYERS + projector + language * LAYERS
    assert [site.block for site in everything] == sorted(site.block for site in everything)
    assert {site.n_blocks for site in everything} == {VISION_LAYERS + 1 + LAYERS}
    assert len(decoder_blocks(model, ("projector", "vision_tower"))) == VISION_LAYERS + 1


def test_every_matrix_of_a_component_and_nothing_else(family: str) -> None:
    """All linear weights of the model but the output head; no convolution, no embedding."""
    model = tiny_multimodal(family)
    listed = {id(bound.module.get_parameter("weight")) for bound in list_sites(model, ("all",))}
    head = model.get_output_embeddings()
    assert listed == {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}


def test_blocks_run_in_the_order_of_their_numbers(family: str) -> None:
    model = tiny_multimodal(family)
    order: list[int] = []
    for bound in list_sites(model, ("all",)):
        bound.module.register_forward_hook(lambda *_, block=bound.site.block: order.append(block))
    model(**encoded(family, (0,)))
    assert order == sorted(order)


def test_components_that_are_not_there() -> None:
    with pytest.raises(InvalidInput, match=r"no component 'ears'; it has vision_tower, projector, language_model, or"):
        list_sites(tiny_multimodal(), ("ears",))
    with pytest.raises(InvalidInput, match="no component 'vision_tower'; it has language_model"):
        list_sites(tiny_language_model().model, ("vision_tower",))
    with pytest.raises(InvalidInput, match="no component is named"):
        list_sites(tiny_multimodal(), ())


# Which token is what (chapter, 7.5)


def test_masks_select_exactly_the_image_positions(family: str) -> None:
    """The placeholders' features replace embeddings where the mask says image, and nowhere else."""
    model, batch = tiny_multimodal(family), encoded(family)
    mask = token_modalities({"input_ids": batch["input_ids"]}, model.config)
    assert torch.equal(mask == 1, batch["input_ids"] == IMAGE)
    if "mm_token_type_ids" in batch:
        assert torch.equal(token_modalities(batch, model.config), mask)
    seen: list[Tensor] = []
    first = decoder_blocks(model)[0][1]
    first.register_forward_hook(lambda _, args, kwargs, out: seen.append(args[0]), with_kwargs=True)
    model(**batch)
    other = batch | {"pixel_values": batch["pixel_values"].flip(-1) * 0.5}
    model(**other)
    changed = (seen[0] != seen[1]).any(-1)
    assert not changed[mask == 0].any()
    # LLaVA-NeXT ends each of two rows of patches with a newline embedding, which no pixel reaches but an image is.
    assert int((~changed[mask == 1]).sum()) == (2 * 2 if family == "llava_next" else 0)


def test_samples_that_are_none() -> None:
    config = tiny_multimodal().config
    for batches in ([], [{"attention_mask": torch.ones(1, 3)}], [{"input_ids": torch.ones(1, 3)}]):
        with pytest.raises(InvalidInput, match=r"no (calibration sample|input_ids)|has no input_ids"):
            Samples(batches, config)


# How unlike tokens are (chapter, 7.1, 7.5, 7.6)


def by_pairs(tokens: np.ndarray, modality: np.ndarray) -> float:
    """The score of one sample, pair by pair: the mean of one term for each modality and each two."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    kinds, terms = np.unique(modality), []
    for kind in kinds:
        cosines = [a @ b for a, b in combinations(unit[modality == kind], 2)]
        terms.append(1 - np.mean(cosines))
    for one, other in combinations(kinds, 2):
        terms.append(1 - np.mean(unit[modality == one] @ unit[modality == other].T))
    return float(np.mean(terms))


def outputs_of(model: LanguageModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """[rows, tokens, features] that each matrix of the language model gives."""
    heard: dict[str, Tensor] = {}
    handles = [
        bound.module.register_forward_hook(lambda m, a, out, name=bound.site.name: heard.__setitem__(name, out))
        for bound in model.sites
    ]
    model.model(**batch)
    for handle in handles:
        handle.remove()
    return heard


def test_diversity_within_and_between_modalities(family: str) -> None:
    model, batch = tiny_multimodal_model(family), encoded(family, (3,))
    found = evidence_of(model, Samples([batch], model.model.config)).diversity("all")
    image = (batch["input_ids"][0] == IMAGE).numpy().astype(int)
    heard = outputs_of(model, batch)
    expected = [by_pairs(heard[bound.site.name][0].double().numpy(), image) for bound in model.sites]
    assert found == pytest.approx(expected, abs=1e-6)


def test_diversity_of_all_tokens_alike() -> None:
    model, batch = tiny_multimodal_model(), encoded("llava", (3,))
    found = evidence_of(model, Samples([batch], model.model.config)).diversity("all", False)
    heard = outputs_of(model, batch)
    expected = [
        by_pairs(heard[b.site.name][0].double().numpy(), np.zeros(heard[b.site.name].shape[1])) for b in model.sites
    ]
    assert found == pytest.approx(expected, abs=1e-6)


def test_text_only_samples_and_mixed_sets() -> None:
    """Text alone gives finite scores, and a mixed set is the weighted union of its parts."""
    model = tiny_multimodal_model()
    config = model.model.config
    pictures = [encoded("llava", (seed,)) for seed in (0, 1)]
    texts = [encoded("llava", (seed,), text_only=True) for seed in (2, 3, 4)]
    with_images = evidence_of(model, Samples(pictures, config)).diversity("all")
    of_text = evidence_of(model, Samples(texts, config)).diversity("all")
    mixed = evidence_of(model, Samples(pictures + texts, config)).diversity("all")
    assert all(math.isfinite(value) for value in of_text)
    assert mixed == pytest.approx([(2 * a + 3 * b) / 5 for a, b in zip(with_images, of_text, strict=True)], abs=1e-9)


def test_batches_and_padding_change_nothing(family: str, tmp_path: Path) -> None:
    """Four samples one at a time, in one batch, and behind padding."""
    model = tiny_multimodal_model(family)
    config, seeds = model.model.config, (0, 1, 2, 3)
    whole = encoded(family, seeds)
    single = [split(whole, index, family) for index in range(4)]
    behind = [padded(whole, 3)] if family != "llava_next" else [whole]
    found = []
    for number, batches in enumerate((single, [whole], behind)):
        calibration = Samples(batches, config)
        assert calibration.sequences == 4
        statistics = collect_statistics(model, calibration, ["X_l2", "X_mean", "Y_l2"], folder=tmp_path / str(number))
        columns = [
            statistics.tensor(bound.site.name, name).flatten()
            for bound in model.sites
            for name in sorted(statistics.names)
        ]
        found.append((evidence_of(model, calibration).diversity("all"), torch.cat(columns)))
    for diversity, columns in found[1:]:
        assert diversity == pytest.approx(found[0][0], abs=1e-5)
        torch.testing.assert_close(columns, found[0][1], atol=1e-4, rtol=1e-5)


def split(batch: dict[str, Tensor], index: int, family: str) -> dict[str, Tensor]:
    """One sample of a batch; Qwen keeps the patches of all images in one tensor."""
    one = {name: value[index : index + 1] for name, value in batch.items()}
    if family.startswith("qwen"):
        per = len(batch["pixel_values"]) // len(batch["input_ids"])
        one["pixel_values"] = batch["pixel_values"][index * per : (index + 1) * per]
    return one


# Norms by modality (chapter, 5.5)


def test_norms_of_images_and_of_text(family: str, tmp_path: Path) -> None:
    """One sample behind padding, one of text alone; over two sets merged as over one."""
    model, names = tiny_multimodal_model(family), ["X_v", "X_l", "X_l2"]
    given = [encoded(family, (0,)), encoded(family, (1,), text_only=True)]
    if family != "llava_next":
        given[0] = padded(given[0], 3)
    found = collect_statistics(model, Samples(given, model.model.config), names, folder=tmp_path / "set")
    squares = {bound.site.name: torch.zeros(2, bound.site.in_features) for bound in model.sites}
    for batch in given:
        heard: dict[str, Tensor] = {}
        for bound in model.sites:
            bound.module.register_forward_hook(
                lambda m, args, out, name=bound.site.name, heard=heard: heard.__setitem__(name, args[0][0])
            )
        model.model(**batch)
        image = batch["input_ids"][0] == IMAGE
        text = ~image & batch["attention_mask"][0].bool()
        for name, x in heard.items():
            squares[name] += torch.stack([x[image].square().sum(0), x[text].square().sum(0)]) / 2
    other = collect_statistics(model, samples(model, family, 5, 6, 7), names, folder=tmp_path / "other")
    merged = merge(found, other, tmp_path / "merged")
    for name, (images, texts) in squares.items():
        assert images.any()
        torch.testing.assert_close(found.tensor(name, "X_v")[0], images.sqrt())
        torch.testing.assert_close(found.tensor(name, "X_l")[0], texts.sqrt())
        for kind in names:
            whole = (0.4 * found.tensor(name, kind).square() + 0.6 * other.tensor(name, kind).square()).sqrt()
            torch.testing.assert_close(merged.tensor(name, kind), whole)


def test_norms_of_chosen_tokens_by_modality_add_up(tmp_path: Path) -> None:
    model = tiny_multimodal_model()
    settings = PassSettings(tokens=TokenChoice(min_tokens=6))
    found = collect_statistics(
        model, samples(model, "llava"), ["X_v", "X_l", "X_l2"], folder=tmp_path / "set", settings=settings
    )
    for bound in model.sites:
        v, text, every = (found.tensor(bound.site.name, name) for name in ("X_v", "X_l", "X_l2"))
        torch.testing.assert_close(v.hypot(text), every)


def test_norms_by_modality_where_there_is_one(tmp_path: Path) -> None:
    llava, plain = tiny_multimodal_model(), tiny_language_model()
    text = Samples([encoded("llava", (1,), text_only=True)], llava.model.config)
    for model, calibration in ((plain, random_windows()), (llava, random_windows()), (llava, text)):
        with pytest.raises(InvalidInput, match="X_l is of one modality, and there is text alone") as refusal:
            collect_statistics(model, calibration, ["X_l", "X_v"], folder=tmp_path / "set")
        assert "\n" not in str(refusal.value)
    towers = tiny_multimodal_model("llava", "all")
    with pytest.raises(InvalidInput, match="X_v is of one modality, which projector does not tell apart"):
        collect_statistics(towers, samples(towers, "llava"), ["X_v"], folder=tmp_path / "set")


# Which tokens stand for all (chapter, 7.7 and 7.8)


def test_attention_of_the_last_token(family: str) -> None:
    model = tiny_multimodal_model(family)
    batch = padded(encoded(family), 3) if family != "llava_next" else encoded(family)
    (given,) = Samples([batch], model.model.config)
    maps: list[Tensor] = []
    for _, block in model.blocks():
        block.get_submodule("self_attn").register_forward_hook(lambda m, a, out: maps.append(last_row(out[1], given)))
    implementation = model.model.config.get_text_config()._attn_implementation
    with attention_maps(model.model):
        model.model(**batch)
    assert model.model.config.get_text_config()._attn_implementation == implementation
    assert len(maps) == LAYERS
    for attention in maps:
        torch.testing.assert_close(attention.sum(1), torch.ones(2), atol=1e-5, rtol=0)
        assert not attention[~batch["attention_mask"].bool()].any()


def chosen_by_loops(z: np.ndarray, attention: np.ndarray, choice: TokenChoice, modality: np.ndarray) -> list[int]:
    """The algorithm as the chapter writes it, every mean from scratch."""
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    n = len(z)
    distance = np.maximum(1 - unit @ unit.T, 0)
    neighbours = []
    for token in range(n):
        others = [other for other in range(n) if other != token]
        neighbours.append(sorted(others, key=lambda other: (distance[token, other], other))[: choice.knn])
    worth = np.array(
        [
            attention[t] + sum(math.exp(-choice.message * distance[t, u]) * attention[u] for u in neighbours[t])
            for t in range(n)
        ]
    )
    kernel = np.exp(-distance)
    terms = []
    for kind in np.unique(modality):
        part = unit[modality == kind]
        cosines = [a @ b for a, b in combinations(part, 2) if a @ b > 0]
        terms += [1 - np.mean(cosines)] if cosines else []
    for one, other in combinations(np.unique(modality), 2):
        terms.append(1 - np.mean(unit[modality == one] @ unit[modality == other].T))
    threshold = choice.eps * math.sqrt(max(np.mean(terms), 0)) if terms else math.inf
    chosen: list[int] = []
    while len(chosen) < min(choice.max_tokens or n, n):
        best = int(np.argmax(worth))
        taken = max(worth[best], 0)
        for other in neighbours[best]:
            worth[other] -= math.exp(-choice.penalty * distance[best, other]) * taken
        chosen.append(best)
        worth[chosen] = worth.min() - 1
        gap = kernel.mean() + kernel[np.ix_(chosen, chosen)].mean() - 2 * kernel[:, chosen].mean()
        if len(chosen) >= min(choice.min_tokens, n) and gap < threshold:
            break
    return chosen


@pytest.mark.parametrize("least", [1, 6])
def test_tokens_are_those_of_the_loops(least: int) -> None:
    choice = TokenChoice(min_tokens=least)
    generator = np.random.default_rng(least)
    lengths = set()
    for case in range(100):
        n = int(generator.integers(4, 40))
        z = generator.normal(size=(n, 8)) + generator.normal(size=8) * (case % 4)
        attention = generator.dirichlet(np.ones(n))
        modality = generator.integers(0, 1 + case % 3, n)
        expected = chosen_by_loops(z, attention, choice, modality)
        given = torch.from_numpy(z), torch.from_numpy(attention)
        assert select_tokens(*given, choice, modality=torch.from_numpy(modality)).tolist() == expected
        lengths.add(len(expected))
    assert len(lengths) > 2
    assert max(lengths) < 39


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_tokens_are_all_chosen(n: int) -> None:
    index = select_tokens(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), torch.full((n,), 1 / n))
    assert sorted(index.tolist()) == list(range(n))


def test_equal_tokens_are_chosen_once_each() -> None:
    z = torch.eye(6)[[0, 0, 0, 1, 1, 2, 2, 2, 2, 5]]
    index = select_tokens(z, torch.full((10,), 0.1), TokenChoice(min_tokens=5, max_tokens=8)).tolist()
    assert 5 <= len(index) <= 8
    assert len(set(index)) == len(index)


def test_choosing_stops_at_its_bounds() -> None:
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    attention = torch.full((64,), 1 / 64)
    few = select_tokens(z, attention, TokenChoice(min_tokens=1))
    assert 1 <= len(few) < 32
    assert len(select_tokens(z, attention)) == 32
    assert len(select_tokens(z, attention, TokenChoice(min_tokens=1, eps=0.0))) == 64
    assert len(select_tokens(z, attention, TokenChoice(min_tokens=1, eps=0.0, max_tokens=10))) == 10


def test_norms_are_those_of_the_chosen_tokens(family: str, tmp_path: Path) -> None:
    """The mean square over all the tokens that the loops choose, matrix by matrix, in one set and in two merged."""
    model, choice = tiny_multimodal_model(family), TokenChoice(min_tokens=2)
    calibration = samples(model, family, 0, 1)
    settings, names = PassSettings(tokens=choice), ["X_l2", "Y_l2", "X_mean", "Hinv", "H"]
    found = collect_statistics(model, calibration, names, folder=tmp_path / "set", settings=settings)
    parts = [
        collect_statistics(model, samples(model, family, seed), names, folder=tmp_path / str(seed), settings=settings)
        for seed in (0, 1)
    ]
    merged = merge(*parts, tmp_path / "merged")
    heard: dict[str, tuple[Tensor, Tensor]] = {}
    maps: dict[int, Tensor] = {}
    for bound in model.sites:
        bound.module.register_forward_hook(
            lambda m, args, out, name=bound.site.name: heard.__setitem__(name, (args[0][0], out[0]))
        )
    for index, (_, block) in enumerate(model.blocks()):
        attention = block.get_submodule("self_attn")
        attention.register_forward_hook(lambda m, a, out, index=index: maps.__setitem__(index, out[1][0].mean(0)[-1]))
    model.model.set_attn_implementation("eager")
    rows: dict[str, list[Tensor]] = {bound.site.name: [] for bound in model.sites}
    shares = []
    for given in calibration:
        model.model(**given.inputs)
        image = (given.inputs["input_ids"][0] == IMAGE).numpy().astype(int)
        for bound in model.sites:
            x, z = heard[bound.site.name]
            attention = maps[bound.site.block].double().numpy()
            index = chosen_by_loops(z.double().numpy(), attention, choice, image)
            rows[bound.site.name].append(x[index])
            shares.append(len(index) / len(x))
    assert min(shares) < 1
    assert len({len(torch.cat(chosen)) for chosen in rows.values()}) > 1
    for name, chosen in rows.items():
        x = torch.cat(chosen)
        assert found.rows[name] == merged.rows[name] == len(x)
        torch.testing.assert_close(found.tensor(name, "X_l2")[0], x.square().mean(0).sqrt())
        torch.testing.assert_close(found.tensor(name, "X_mean")[0], x.mean(0), rtol=1e-4, atol=1e-6)
        for statistic in sorted(found.names):
            torch.testing.assert_close(
                merged.tensor(name, statistic), found.tensor(name, statistic), rtol=1e-4, atol=1e-6
            )


def test_towers_keep_all_tokens(tmp_path: Path) -> None:
    model = tiny_multimodal_model("llava", "all")
    calibration = samples(model, "llava")
    settings = PassSettings(tokens=TokenChoice(min_tokens=1))
    chosen = collect_statistics(model, calibration, ["X_l2"], folder=tmp_path / "a", settings=settings)
    every = collect_statistics(model, calibration, ["X_l2"], folder=tmp_path / "b")
    for bound in model.sites:
        name = bound.site.name
        a, b = (statistics.tensor(name, "X_ss") * per for statistics, per in ((chosen, chosen.rows[name]), (every, 3)))
        assert torch.allclose(a, b) == (bound.site.component != "language_model")
        assert (chosen.rows[name] == every.rows[name]) == (bound.site.component != "language_model")


def test_text_models_choose_tokens_too(tmp_path: Path) -> None:
    model, windows = tiny_language_model(), random_windows(3, 16)
    settings = PassSettings(tokens=TokenChoice(min_tokens=2))
    chosen = collect_statistics(model, windows, ["X_l2"], folder=tmp_path / "a", settings=settings)
    every = collect_statistics(model, windows, ["X_l2"], folder=tmp_path / "b")
    name = model.sites[0].site.name
    assert chosen.rows[name] < every.rows[name] == 48
    assert bool((chosen.tensor(name, "X_ss") * chosen.rows[name] <= every.tensor(name, "X_ss") * 3).all())
    with pytest.raises(InvalidInput, match="differ in the setting tokens"):
        merge(chosen, every, tmp_path / "mixed")
    with pytest.raises(InvalidInput, match="wanda_fp32 is of all tokens"):
        PassSettings("wanda_fp32", tokens=TokenChoice())


def test_calibration_that_a_component_never_sees(tmp_path: Path) -> None:
    model = tiny_multimodal_model("llava", "vision_tower")
    with pytest.raises(InvalidInput, match=r"vision_tower\..* never ran: calibrate on samples that hold"):
        collect_statistics(model, random_windows(2, 8), ["X_l2"], folder=tmp_path / "set")


def test_gradients_are_those_of_the_text(family: str, tmp_path: Path) -> None:
    """One gradient a sample, of the mean loss over its text tokens; padding adds nothing."""
    model = tiny_multimodal_model(family)
    given = [padded(encoded(family, (0,)), 2), encoded(family, (1,), words=7), encoded(family, (2,), text_only=True)]
    found = collect_statistics(
        model, Samples(given, model.model.config), ["G_l2", "G_l1", "G_reg"], folder=tmp_path / "set"
    )
    squares = {bound.site.name: torch.zeros_like(bound.weight()) for bound in model.sites}
    sums = {bound.site.name: torch.zeros_like(bound.weight()) for bound in model.sites}
    for batch in given:
        ids, mask = batch["input_ids"][0], batch["attention_mask"][0]
        weights = {bound.site.name: bound.module.get_parameter("weight").requires_grad_(True) for bound in model.sites}
        log_q = model.model(**batch).logits[0].log_softmax(-1)
        places = [t for t in range(1, len(ids)) if mask[t - 1] and mask[t] and ids[t] != IMAGE]
        loss = -torch.stack([log_q[t - 1, ids[t]] for t in places]).mean()
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            squares[name] += gradient**2
            sums[name] += gradient.abs()
    for bound in model.sites:
        name = bound.site.name
        assert torch.allclose(found.tensor(name, "G_l2"), squares[name].sqrt(), rtol=1e-3, atol=1e-5), name
        assert torch.allclose(found.tensor(name, "G_l1"), sums[name], rtol=1e-3, atol=1e-5), name
        assert bool(found.tensor(name, "G_reg").isfinite().all())


def test_gradients_of_towers_are_refused(tmp_path: Path) -> None:
    model = tiny_multimodal_model("llava", "vision_tower", "language_model")
    with pytest.raises(InvalidInput, match="G_l2 is a gradient, which vision_tower has none of"):
        collect_statistics(model, samples(model, "llava"), ["G_l2"], folder=tmp_path / "set")


# Allocation


def test_diversity_aware_allocation_of_a_model_with_images(family: str) -> None:
    """More diversity keeps more, by the formula: the cap less a share of the rest that follows the score."""
    model = tiny_multimodal_model(family)
    calibration = samples(model, family)
    allocator = configured("das", {"omega": 1})
    found = allocate_model(model, "das", allocator, 0.5, criterion=CRITERIA["magnitude"], calibration=calibration)
    assert found.removed == found.weights // 2
    scores = np.array(evidence_of(model, calibration).diversity("all"))
    sizes = np.array([bound.site.weights for bound in model.sites])
    shares = scores * sizes / (scores * sizes).sum()
    expected = 0.6 - (sizes.sum() * 0.5 - sizes.sum() * 0.4) * shares / sizes
    widths = np.array([bound.site.in_features for bound in model.sites])
    assert np.all(np.abs(np.array([site.sparsity for site in found.sites]) - expected) <= 1 / widths + 1e-6)


def test_shuffled_diversities_are_the_same_ones_elsewhere() -> None:
    model = tiny_multimodal_model()
    evidence = evidence_of(model, samples(model, "llava"))
    plain = configured("das", {"omega": 1}).request(evidence)
    dealt = configured("das", {"omega": 1, "shuffle": 1}).request(evidence)
    assert dealt != plain
    assert dealt == configured("das", {"omega": 1, "shuffle": 1}).request(evidence)
    assert dealt != configured("das", {"omega": 1, "shuffle": 2}).request(evidence)


def test_loss_is_that_of_the_text_tokens() -> None:
    model = tiny_multimodal_model()
    batch = encoded("llava", (0,))
    logits = model.model(**batch).logits[0].double()
    ids = batch["input_ids"][0]
    log_q = torch.log_softmax(logits, -1)
    values = [-log_q[t - 1, ids[t]].item() for t in range(1, len(ids)) if ids[t] != IMAGE]
    found = evaluate_language_model(model.model, Samples([padded(batch, 2)], model.model.config))
    assert found.loss == pytest.approx(np.mean(values), rel=1e-4)
    assert found.tokens == len(values) == 8
