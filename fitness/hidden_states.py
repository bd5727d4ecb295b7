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


@torch.no_grad()
def block_influence(language_model: LanguageModel, windows: Tensor, *, batch: int = 4) -> list[float]:
    """Mean over tokens of 1 - cos(input, output) of each decoder block, in float64.

    Args:
        language_model: the model; its head is not run.
        windows: [n, window] int64 token ids.
        batch: windows per forward pass.
    """
    blocks = [block for _, block in language_model.blocks()]
    sums = [0.0] * len(blocks)
    handles = []
    for index, block in enumerate(blocks):

        def hear(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, index: int = index
        ) -> None:
            before = (args[0] if args else kwargs["hidden_states"]).double()
            after = _hidden(output).double()
            sums[index] += (1 - torch.cosine_similarity(before, after, dim=-1)).sum().item()

        handles.append(block.register_forward_hook(hear, with_kwargs=True))
    body = getattr(language_model.model, "base_model", language_model.model)
    try:
        for ids in windows.split(batch):
            body(input_ids=ids.to(language_model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [total / windows.numel() for total in sums]


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


def _hidden(output: Any) -> Tensor:
    """A block's hidden states: transformers gives a tensor or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]
