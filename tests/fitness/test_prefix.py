"""Forward passes that start in the middle, against whole ones, for every family: equal to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import ADAPTERS
from evoprune.fitness.adapters.base import is_linear
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.prefix import PrefixCache
from evoprune.fitness.samples import first_batch
from tests.models import random_windows, tiny_language_model

LAYERS = 4
WINDOWS = random_windows(3, 24)
BATCH = (0, 3)

# Windows shorter than the text in some blocks, so that masks differ by block; and families without an adapter, whose
# blocks return tuples, run attention beside the MLP, take no positions or share norms between them.
SETTINGS: dict[str, dict[str, object]] = {
    **{family: {} for family in sorted(ADAPTERS)},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 5},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
    "gpt_neox": {},
    "olmo2": {},
    "stablelm": {},
    "cohere": {},
}


@pytest.fixture(params=sorted(SETTINGS))
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_language_model(request.param, num_hidden_layers=LAYERS, **SETTINGS[request.param])


def logits(language_model: LanguageModel, windows: Tensor = WINDOWS) -> Tensor:
    with torch.no_grad():
        return language_model.model(input_ids=windows, use_cache=False).logits


def primed(language_model: LanguageModel, **settings: Any) -> PrefixCache:
    """A cache that remembers `WINDOWS`."""
    cache = PrefixCache(language_model, first_batch(WINDOWS), **settings)
    with cache.started(BATCH, 0, cache.spread(WINDOWS.numel())) as start:
        assert start == 0
        logits(language_model)
    return cache


def prune(language_model: LanguageModel, first: int) -> None:
    """Change every matrix of block `first` and of the last one."""
    with torch.no_grad():
        for bound in language_model.sites:
            if bound.site.block in (first, LAYERS - 1):
                bound.weight()[:, first::3] = 0


@contextmanager
def counted(language_model: LanguageModel) -> Iterator[Counter[int]]:
    """Calls of linear layers by block."""
    calls: Counter[int] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, at=at: calls.update([at]))
        for at, (_, block) in enumerate(language_model.blocks())
        for module in block.modules()
        if is_linear(module)
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("block", range(LAYERS + 1))
def test_results_are_equal_and_earlier_blocks_do_not_run(language_model: LanguageModel, block: int) -> None:
    cache = primed(language_model)
    assert cache.boundaries == tuple(range(1, LAYERS))
    before = logits(language_model)
    if block < LAYERS:
        prune(language_model, block)
    expected = logits(language_model)
    assert torch.equal(expected, before) == (block == LAYERS)
    for _ in range(2):  # what is remembered must survive its use
        with cache.started(BATCH, block) as start, counted(language_model) as calls:
            assert torch.equal(logits(language_model), expected)
        assert start == min(block, LAYERS - 1)
        assert sorted(calls) == list(range(start, LAYERS))
    assert torch.equal(logits(language_model), expected)


def test_states_remembered_on_the_way_are_those_of_a_whole_pass() -> None:
    language_model = tiny_language_model(num_hidden_layers=LAYERS)
    cache = PrefixCache(language_model, first_batch(WINDOWS))
    for remember in ((2,), (1, 2, 3)):
        with cache.started(BATCH, LAYERS, remember):
            logits(language_model)
    with cache.started(BATCH, LAYERS) as start:
        assert start == 3
        resumed = logits(language_model)
    assert torch.equal(resumed, logits(language_model))
    cache.clear()
    assert cache.bytes == 0
    with cache.started(BATCH, LAYERS) as start:
        assert start == 0


def test_other_batches_are_not_remembered() -> None:
    language_model = tiny_language_model(num_hidden_layers=LAYERS)
    cache = primed(language_model)
    for batch in ((0, 2), (1, 3), (3, 6)):
        with cache.started(batch, LAYERS) as start:
            assert start == 0


@pytest.mark.parametrize("stride", [2, 3, 9])
def test_with_a_stride_a_pass_starts_at_the_nearest_boundary_before(stride: int) -> None:
    language_model = tiny_language_model(num_hidden_layers=LAYERS)
    cache = primed(language_model, stride=stride)
    prune(language_model, LAYERS - 1)
    expected = logits(language_model)
    for block in range(LAYERS):
        with cache.started(BATCH, block) as start:
            assert start == block - block % stride
            assert torch.equal(logits(language_model), expected)


def test_states_stay_within_the_limit() -> None:
    language_model = tiny_language_model(num_hidden_layers=LAYERS)
    of_one = WINDOWS.numel() * language_model.model.config.hidden_size * 4
    for limit, expected in {0: (), of_one - 1: (), of_one: (2,), 2 * of_one: (1, 3), 9 * of_one: (1, 2, 3)}.items():
        cache = primed(language_model, max_bytes=limit)
        assert cache.bytes == len(expected) * of_one <= limit
        reached = set()
        for block in range(LAYERS):
            with cache.started(BATCH, block) as start:
                reached.add(start)
        assert reached == {0, *expected}


def test_states_have_the_dtype_of_the_model() -> None:
    language_model = tiny_language_model(num_hidden_layers=LAYERS)
    language_model.model.bfloat16()
    cache = primed(language_model)
    assert cache.bytes == 3 * WINDOWS.numel() * language_model.model.config.hidden_size * 2
    prune(language_model, 2)
    expected = logits(language_model)
    with cache.started(BATCH, 2):
        assert torch.equal(logits(language_model), expected)


def test_an_error_inside_leaves_the_model_whole() -> None:
    language_model = tiny_language_model(num_hidden_layers=LAYERS)
    cache = primed(language_model)
    expected = logits(language_model)
    with pytest.raises(KeyboardInterrupt), cache.started(BATCH, 3, (3,)):
        raise KeyboardInterrupt
    for _, block in language_model.blocks():
        assert "forward" not in vars(block)
        assert not block._forward_pre_hooks
        assert not block._forward_hooks
    assert torch.equal(logits(language_model), expected)


class Talking(nn.Module):
    """A block that leaves something for another one, or takes it up, beside the hidden states."""

    def __init__(self, block: nn.Module, left: dict[str, Tensor], role: str) -> None:
        super().__init__()
        self.block, self.left, self.role = block, left, role

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.block(hidden_states, *args, **kwargs)
        if self.role == "leaves":
            self.left["state"] = output
        elif self.role == "takes":
            return output + self.left.pop("state")
        return output


def test_blocks_that_read_more_than_the_hidden_states_are_found_out(caplog: pytest.LogCaptureFixture) -> None:
    language_model = tiny_language_model(num_hidden_layers=LAYERS)
    left: dict[str, Tensor] = {}
    blocks = language_model.model.model.layers
    blocks[0] = Talking(blocks[0], left, "leaves")
    blocks[2] = Talking(blocks[2], left, "takes")
    cache = primed(language_model)
    assert cache.boundaries == (3,)
    assert "start at 1 of 3 blocks only" in caplog.text
    expected = logits(language_model)
    for block, start_at in ((1, 0), (2, 0), (3, 3)):
        with cache.started(BATCH, block) as start:
            assert start == start_at
            assert torch.equal(logits(language_model), expected)


def test_a_block_may_add_into_its_input() -> None:
    language_model = tiny_language_model(num_hidden_layers=LAYERS)

    class InPlace(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states.add_(1.0)

    blocks = language_model.model.model.layers
    blocks[1] = blocks[2] = InPlace()
    expected = logits(language_model)
    cache = primed(language_model)
    for _ in range(2):
        for block in range(LAYERS):
            with cache.started(BATCH, block):
                assert torch.equal(logits(language_model), expected)


def test_a_forward_that_hides_the_method_is_put_back() -> None:
    language_model = tiny_language_model(num_hidden_layers=LAYERS)
    block = language_model.blocks()[0][1]
    inner = block.forward
    block.forward = hooked = lambda *args, **kwargs: inner(*args, **kwargs)  # what accelerate does
    cache = primed(language_model)
    expected = logits(language_model)
    with cache.started(BATCH, 2):
        assert torch.equal(logits(language_model), expected)
    assert vars(block)["forward"] is hooked
