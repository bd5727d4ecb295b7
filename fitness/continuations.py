"""What a model writes when it goes on with a text, always taking the likeliest token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evoprune.fitness.models import LanguageModel
from evoprune.metrics.errors import InvalidInput

# Tokens of a window that are given; long enough to set a topic, short enough to read.
PROMPT_TOKENS = 32
PROMPTS_PER_PASS = 8


@dataclass(frozen=True, slots=True)
class Continuation:
    """How models go on with the same words.

    Attributes:
        prompt: the first words of a window.
        text: what the model wrote.
        dense: what the model before pruning wrote; None without one.
    """

    prompt: str
    text: str
    dense: str | None = None

    def to_json(self) -> dict[str, str | None]:
        """What `evoprune eval --json` prints."""
        return {"prompt": self.prompt, "continuation": self.text, "dense": self.dense}


def check_continuations(language_model: LanguageModel, windows: Tensor, count: int, tokens: int) -> None:
    """Refuse more prompts than there are windows, and more tokens than the model can read.

    Args:
        language_model: that shall write.
        windows: [n, window] int64 token ids.
        count: how many of them begin a text.
        tokens: how many tokens shall be written.

    Raises:
        InvalidInput: too many, or fewer than one.
    """
    if count < 1 or tokens < 1:
        raise InvalidInput(f"{count} samples of {tokens} tokens are none: give 1 or more of both")
    if count > len(windows):
        raise InvalidInput(f"{count} samples need as many windows, and there are {len(windows)}: give more tokens")
    longest = None if language_model.context is None else language_model.context - _prompt_tokens(windows)
    if longest is not None and tokens > longest:
        raise InvalidInput(
            f"{tokens} tokens behind {_prompt_tokens(windows)} of a prompt are too many: model "
            f"{language_model.name!r} reads at most {language_model.context}, so give {longest} or fewer"
        )


def continuations(
    language_model: LanguageModel, windows: Tensor, count: int, tokens: int, dense: LanguageModel | None = None
) -> tuple[Continuation, ...]:
    """Greedy continuations of the first words of the first windows.

    Args:
        language_model: in eval mode.
        windows: [n, window] int64 token ids; of each of the first `count` the first half at most is the prompt.
        count: how many.
        tokens: written after each prompt, fewer where the model ends its text.
        dense: a model with the same tokenizer, which goes on with the same words.

    Raises:
        InvalidInput: see `check_continuations`.
    """
    for model in (language_model, dense):
        if model is not None:
            check_continuations(model, windows, count, tokens)
    prompts = windows[:count, : _prompt_tokens(windows)]

    def text(ids: list[int]) -> str:
        return str(language_model.tokenizer.decode(ids, skip_special_tokens=True))

    written = greedy_tokens(language_model.model, prompts, tokens)
    beside = [None] * count if dense is None else greedy_tokens(dense.model, prompts, tokens)
    return tuple(
        Continuation(text(prompt), text(own), None if other is None else text(other))
        for prompt, own, other in zip(prompts.tolist(), written, beside, strict=True)
    )


@torch.inference_mode()
def greedy_tokens(model: PreTrainedModel, prompts: Tensor, tokens: int) -> list[list[int]]:
    """The likeliest next token, again and again, whatever penalties a checkpoint's generation config asks for.

    Args:
        model: in eval mode.
        prompts: [n, length] int64 token ids, without padding.
        tokens: to write.

    Returns:
        For each prompt at most that many token ids; what comes before, and not, a token that ends a text.
    """
    device = model.get_input_embeddings().get_parameter("weight").device
    ends = _ends(model)
    written: list[list[int]] = []
    for part in prompts.split(PROMPTS_PER_PASS):
        given, past, chosen = part.to(device), None, []
        for _ in range(tokens):
            output = model(input_ids=given, past_key_values=past, use_cache=True)
            given, past = output.logits[:, -1].argmax(dim=-1, keepdim=True), output.past_key_values
            chosen.append(given.cpu())
        for row in torch.cat(chosen, dim=1).tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), tokens)
            written.append(row[:stop])
    return written


def _prompt_tokens(windows: Tensor) -> int:
    return max(min(PROMPT_TOKENS, windows.shape[1] // 2), 1)


def _ends(model: PreTrainedModel) -> set[int]:
    """Token ids that end a text."""
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(model.config.get_text_config(), "eos_token_id", None)
    return set() if found is None else {found} if isinstance(found, int) else set(found)
