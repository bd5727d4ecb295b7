"""Greedy continuations: the same tokens as transformers' own greedy search."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from evoprune.fitness.continuations import continuations, greedy_tokens
from evoprune.fitness.forms import cut_model
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from tests.models import random_windows, tiny_language_model, tiny_model, tiny_tokenizer
from tests.shapes import cases

PROMPTS = random_windows(9, 6)  # more than go through a model at once


def generated(model: PreTrainedModel, prompts: torch.Tensor, tokens: int) -> list[list[int]]:
    """By `generate`, without its cache; what comes before the end of a text."""
    found = []
    for prompt in prompts:
        ids = model.generate(  # type: ignore[operator]
            prompt[None], max_new_tokens=tokens, do_sample=False, use_cache=False, pad_token_id=0
        )
        row = ids[0, len(prompt) :].tolist()
        found.append(row[: row.index(0)] if 0 in row else row)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_they_are_those_of_generate(family: str) -> None:
    model = tiny_model(family)
    assert greedy_tokens(model, PROMPTS, 7) == generated(model, PROMPTS, 7)


def test_a_cut_model_goes_on_too() -> None:
    language_model = tiny_language_model()
    widths = find_units(language_model)[0].widths
    cut, _ = cut_model(language_model, cases(widths)["uneven"], form="compact")
    assert greedy_tokens(cut.model, PROMPTS[:2], 5) == generated(cut.model, PROMPTS[:2], 5)


def test_a_text_stops_where_the_model_ends_it() -> None:
    model = tiny_model()
    [whole] = greedy_tokens(model, PROMPTS[:1], 6)
    model.generation_config.eos_token_id = [whole[3]]  # type: ignore[union-attr]
    assert greedy_tokens(model, PROMPTS[:1], 6) == [whole[: whole.index(whole[3])]]


def test_the_generation_config_of_a_checkpoint_changes_nothing() -> None:
    model = tiny_model()
    plain = greedy_tokens(model, PROMPTS[:2], 6)
    model.generation_config.repetition_penalty = 9.0  # type: ignore[union-attr]
    model.generation_config.do_sample = True  # type: ignore[union-attr]
    assert greedy_tokens(model, PROMPTS[:2], 6) == plain


def test_dense_and_pruned_go_on_with_the_same_words() -> None:
    language_model, dense = tiny_language_model(seed=1), tiny_language_model(seed=0)
    windows = random_windows(3, 20)
    found = continuations(language_model, windows, 2, 5, dense)
    decode = tiny_tokenizer().decode
    assert [sample.prompt for sample in found] == [decode(row[:10]) for row in windows[:2]]
    assert [sample.text for sample in found] == [
        decode(ids) for ids in generated(language_model.model, windows[:2, :10], 5)
    ]
    assert [sample.dense for sample in found] == [decode(ids) for ids in generated(dense.model, windows[:2, :10], 5)]
    assert found == continuations(language_model, windows, 2, 5, dense)


@pytest.mark.parametrize(
    ("count", "tokens", "message"),
    [
        (4, 5, "4 samples need as many windows, and there are 3"),
        (1, 60, "reads at most 64, so give 54 or fewer"),
        (-1, 5, "give 1 or more of both"),
        (1, 0, "give 1 or more of both"),
    ],
)
def test_what_cannot_be_written_is_refused(count: int, tokens: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        continuations(tiny_language_model(), random_windows(3, 20), count, tokens)
