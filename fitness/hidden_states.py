"""How much each decoder block changes the hidden states, and what a model is worth without one.

Source: Men et al. 2024, ShortGPT, arXiv:2403.03853; Kim et al. 2024, Shortened LLaMA, arXiv:2402.02834.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Sequences, forward_batches


@torch.no_grad()
def block_influence(language_model: LanguageModel, windows: Sequences, *, batch: int = 4) -> list[float]:
    """Mean over tokens of 1 - cos(input, output) of each block, in float64.

    Args:
        language_model: the model; its head is not run.
        windows: [n, window] int64 token ids, or samples, of which padding counts too.
        batch: windows per forward pass.
    """
    blocks = [block for _, block in language_model.blocks()]
    sums, tokens = [0.0] * len(blocks), [0] * len(blocks)
    handles = []
    for index, block in enumerate(blocks):

        def hear(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, index: int = index
        ) -> None:
            before = (args[0] if args else kwargs["hidden_states"]).double()
            after = hidden_of(output).double()
            change = 1 - torch.cosine_similarity(before, after, dim=-1)
            sums[index] += change.sum().item()
            tokens[index] += change.numel()

        handles.append(block.register_forward_hook(hear, with_kwargs=True))
    body = getattr(language_model.model, "base_model", language_model.model)
    try:
        for given in forward_batches(windows, batch, language_model.device):
            body(**given.inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [total / max(count, 1) for total, count in zip(sums, tokens, strict=True)]


@contextmanager
def without_block(language_model: LanguageModel, index: int) -> Iterator[None]:
    """Inside, the block passes on what it is given."""

    def pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        return before if isinstance(output, Tensor) else (before, *output[1:])

    handle = language_model.blocks()[index][1].register_forward_hook(pass_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def hidden_of(output: Any) -> Tensor:
    """A block's hidden states: transformers gives a tensor or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]
