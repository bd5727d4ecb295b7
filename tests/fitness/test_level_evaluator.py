"""Elided work changes no number: the level evaluator against masking everything and running the whole model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from evoprune.fitness.evaluator import Evaluator
from evoprune.fitness.hidden_states import without_block
from evoprune.fitness.level_evaluator import LevelEvaluator
from evoprune.fitness.levels import build_levels
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.teacher import BATCH, Teacher, WindowLosses, build_teacher, linear_head, window_losses
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import AuditFailed, InvalidCandidate, InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule
from tests.models import FAMILIES, random_windows, tiny_language_model
from tests.prepared import tiny_prepared

LAYERS = 4
WINDOWS = random_windows(2 * BATCH + 1, 16)
WANDA = CRITERIA["wanda"]


@dataclass
class Tried:
    """A level evaluator, and a second model that is masked and run the plain way."""

    evaluator: LevelEvaluator
    prepared: Prepared
    teacher: Teacher
    plain: Evaluator

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.evaluator.sites]

    def in_block(self, block: int) -> list[str]:
        return [site.name for site in self.evaluator.sites if site.block == block]

    def plainly(self, levels: Mapping[str, int], first: int, last: int) -> WindowLosses:
        dense = load_file(self.prepared.dense)
        model = self.plain.language_model
        for bound in model.sites:
            name = bound.site.name
            scores = WANDA.score(bound.site, self.plain.inputs(bound.site, WANDA.needs))
            keep = mask(scores, MaskRule(levels.get(name, 0) / 256))
            bound.weight().copy_(dense[name].masked_fill(~keep, 0))
        return window_losses(model.model, self.plain.head, WINDOWS[first:last], self.teacher[slice(first, last)])

    def check(self, levels: Mapping[str, int], first: int = 0, last: int = len(WINDOWS)) -> WindowLosses:
        """The losses at `levels`, which are those of the plain way to the bit."""
        found, expected = self.evaluator.evaluate(levels, first, last), self.plainly(levels, first, last)
        assert found.kl is not None
        assert expected.kl is not None
        assert torch.equal(found.kl, expected.kl)
        assert torch.equal(found.nll, expected.nll)
        return found


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("EVOPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tried(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("EVOPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tried(tmp_path_factory, "llama")


def tried(tmp_path_factory: pytest.TempPathFactory, name: str) -> Tried:
    language_model, plain = (tiny_language_model(name, num_hidden_layers=LAYERS) for _ in range(2))
    prepared = tiny_prepared(tmp_path_factory.mktemp(name) / "set", language_model)
    teacher = build_teacher(plain.model, linear_head(plain.model, WINDOWS), WINDOWS)
    return Tried(
        LevelEvaluator(language_model, prepared.dense, build_levels(prepared, WANDA, "wanda"), WINDOWS, teacher),
        prepared,
        teacher,
        Evaluator(plain, prepared.dense, prepared.statistics(), WINDOWS, teacher, MaskRule(0.5)),
    )


def started_at(evaluator: LevelEvaluator, levels: Mapping[str, int], first: int, last: int) -> list[int]:
    """The block that each batch of an evaluation starts at."""
    starts = []
    whole = evaluator.prefix.started

    def watched(*arguments):
        context = whole(*arguments)
        starts.append(context.__enter__())
        context.__exit__(None, None, None)
        return whole(*arguments)

    with patch.object(evaluator.prefix, "started", watched):
        evaluator.evaluate(levels, first, last)
    return starts


def test_a_life_of_an_evaluator(family: Tried) -> None:
    """Random vectors, changes in the first, a middle and the last block, other parents, `restore`; allocation 8.9."""
    draw = random.Random(0)
    evaluator = family.evaluator
    for _ in range(2):
        family.check({name: draw.randrange(256) for name in family.names})
        parent = {name: draw.randrange(90, 200) for name in family.names}
        adopted = evaluator.adopt(parent, 0, len(WINDOWS))
        assert torch.equal(adopted.nll, family.plainly(parent, 0, len(WINDOWS)).nll)
        of_parent = family.check(parent)
        for block in (0, LAYERS // 2, LAYERS - 1, 1):
            name = draw.choice(family.in_block(block))
            child = {**parent, name: (parent[name] + 60) % 256}
            assert not torch.equal(family.check(child).nll, of_parent.nll)
            assert started_at(evaluator, child, 0, len(WINDOWS)) == [block] * 3
        evaluator.restore()
        family.check(child)
        assert started_at(evaluator, child, 0, len(WINDOWS)) == [1] * 3
    evaluator.restore()
    assert family.check({}).kl.abs().max() < 1e-5  # type: ignore[union-attr]
    dense = load_file(family.prepared.dense)
    assert all(torch.equal(bound.weight(), dense[bound.site.name]) for bound in evaluator.language_model.sites)


def test_windows_that_the_parent_has_not_seen_run_in_full(llama: Tried) -> None:
    parent = dict.fromkeys(llama.names, 128)
    child = {**parent, llama.names[-1]: 129, llama.names[-2]: 127}
    llama.evaluator.adopt({}, 0, 1)
    llama.evaluator.adopt(parent, 0, BATCH)
    assert started_at(llama.evaluator, child, 0, 2 * BATCH) == [LAYERS - 1, 0]
    assert started_at(llama.evaluator, child, 1, BATCH) == [0]
    llama.evaluator.adopt(parent, BATCH, 2 * BATCH)
    assert started_at(llama.evaluator, child, 0, 2 * BATCH) == [LAYERS - 1] * 2
    for first, last in ((0, 1), (0, BATCH), (1, BATCH + 2), (BATCH, 2 * BATCH), (0, len(WINDOWS))):
        llama.check(child, first, last)


def test_a_new_parent_makes_the_old_states_count_for_nothing(llama: Tried) -> None:
    old = dict.fromkeys(llama.names, 100)
    new = {**old, llama.names[0]: 101}
    llama.evaluator.adopt(old, 0, 2 * BATCH)
    llama.evaluator.adopt(new, 0, BATCH)
    assert started_at(llama.evaluator, new, 0, 2 * BATCH) == [LAYERS - 1, 0]
    assert started_at(llama.evaluator, old, 0, 2 * BATCH) == [0, 0]
    llama.check(old)
    llama.check({**new, llama.names[-1]: 5})


@pytest.mark.parametrize("settings", [{"stride": 2}, {"max_prefix_bytes": 0}, {"max_prefix_bytes": 50_000}])
def test_few_states_give_the_same_numbers(llama: Tried, settings: dict[str, int]) -> None:
    database = build_levels(llama.prepared, WANDA, "wanda")
    language_model = llama.evaluator.language_model
    llama.evaluator.restore()
    few = LevelEvaluator(language_model, llama.prepared.dense, database, WINDOWS, llama.teacher, **settings)
    everything = Tried(few, llama.prepared, llama.teacher, llama.plain)
    parent = dict.fromkeys(llama.names, 128)
    few.adopt(parent, 0, len(WINDOWS))
    assert few.prefix.bytes <= settings.get("max_prefix_bytes", 1 << 30)
    for name in llama.names[:: len(llama.names) // 5]:
        everything.check({**parent, name: 140})
    few.restore()


def test_without_a_teacher_there_is_no_divergence(llama: Tried) -> None:
    llama.evaluator.restore()
    evaluator = LevelEvaluator(
        llama.evaluator.language_model,
        llama.prepared.dense,
        build_levels(llama.prepared, WANDA, "wanda"),
        WINDOWS,
        None,
    )
    levels = dict.fromkeys(llama.names, 50)
    found = evaluator.evaluate(levels, 0, 3)
    assert found.kl is None
    assert torch.equal(found.nll, llama.plainly(levels, 0, 3).nll)
    evaluator.restore()


def test_what_is_refused_changes_nothing(llama: Tried) -> None:
    parent = dict.fromkeys(llama.names, 77)
    llama.evaluator.adopt(parent, 0, BATCH)
    for wrong in ({llama.names[0]: 257}, {"lm_head": 3}):
        with pytest.raises(InvalidInput):
            llama.evaluator.evaluate(wrong, 0, 1)
        with pytest.raises(InvalidInput):
            llama.evaluator.adopt(wrong, 0, 1)
    assert started_at(llama.evaluator, parent, 0, BATCH) == [LAYERS - 1]


def test_a_loss_that_is_not_finite_is_no_fitness(llama: Tried) -> None:
    norm = llama.evaluator.language_model.model.model.norm.weight
    kept = norm.clone()
    try:
        norm.fill_(float("nan"))
        with pytest.raises(InvalidCandidate, match="NONFINITE"):
            llama.evaluator.evaluate({}, 0, 1)
    finally:
        norm.copy_(kept)
    llama.check({})


def test_a_changed_dense_file_is_noticed(llama: Tried, tmp_path) -> None:
    llama.evaluator.restore()
    dense = load_file(llama.prepared.dense)
    save_file(dense, tmp_path / "dense.safetensors")
    evaluator = LevelEvaluator(
        llama.evaluator.language_model,
        tmp_path / "dense.safetensors",
        build_levels(llama.prepared, WANDA, "wanda"),
        WINDOWS,
        llama.teacher,
    )
    name = llama.names[3]
    save_file({**dense, name: dense[name] + 1e-3}, tmp_path / "dense.safetensors")
    with pytest.raises(AuditFailed):
        evaluator.restore()
    llama.evaluator.restore()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_a_block_that_is_gone_passes_on_what_it_is_given(family: str, tmp_path: Path) -> None:
    """Level 256 takes the biases too, of which GPT-2 and OPT have some: what is left is the residual."""
    language_model = tiny_language_model(family, num_hidden_layers=LAYERS)
    for bound in language_model.sites:
        if (bias := bound.bias()) is not None:
            bias.normal_(generator=torch.Generator().manual_seed(3))
    prepared = tiny_prepared(tmp_path / "prepared", language_model)
    database = build_levels(prepared, WANDA, "wanda")
    evaluator = LevelEvaluator(language_model, prepared.dense, database, WINDOWS, None)
    for block in (1, LAYERS - 1):
        levels = {site.name: 256 for site in evaluator.sites if site.block == block}
        found = evaluator.evaluate(levels, 0, 4).nll
        evaluator.restore()
        with without_block(language_model, block):
            expected = window_losses(language_model.model, evaluator.head, WINDOWS[:4], None).nll
        assert torch.equal(found, expected)
    dense = window_losses(language_model.model, evaluator.head, WINDOWS[:4], None).nll
    evaluator.evaluate(levels, 0, 4)
    assert torch.equal(evaluator.evaluate({}, 0, 4).nll, dense)
