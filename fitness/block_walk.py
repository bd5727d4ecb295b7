"""Going through the decoder blocks of a model one at a time, with what each is given remembered for a whole text.

Blocks behind the present one hand on what they are given, so that a pass costs no more than the present block, and the
model's own forward pass makes positions and masks, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.fitness.block_hooks import beside_hidden, input_replaced, input_seen, output_seen, passing_through
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Batch, Sequences, forward_batches
from evoprune.fitness.statistics_forward import ForwardSums
from evoprune.fitness.statistics_passes import FORWARD_TOKENS

See = Callable[[Tensor], None]
"""Takes in the inputs of a layer, [tokens, features], padding dropped."""


class _Enough(Exception):
    """Ends a forward pass of which no more is needed."""


class BlockWalk:
    """A text on its way through the blocks.

    What is remembered of it, the hidden states of all tokens in the model's dtype, is on the CPU.

    Args:
        language_model: run with the weights that it has at the time.
        blocks: module paths of its decoder blocks, in model order; each reads nothing of those before it but the hidden
            states.
        texts: [n, window] int64 token ids each, or samples.

    Attributes:
        at: the present block.
    """

    def __init__(self, language_model: LanguageModel, blocks: Iterable[str], texts: Iterable[Sequences]) -> None:
        model = language_model.model
        self._body = getattr(model, "base_model", model)
        self._device = language_model.device
        self._blocks = [model.get_submodule(name) for name in blocks]
        self._beside: list[tuple[Any, ...] | None] = [None] * len(self._blocks)
        self._batches = [batch for text in texts for batch in forward_batches(text, _batch(text), torch.device("cpu"))]
        self._hidden: list[Tensor] = []
        self.at = 0

    @torch.no_grad()
    def run(self, see: Mapping[nn.Module, See], to: int | None = None) -> None:
        """Run the text from the present block on.

        Args:
            see: layers, and what is called with their inputs, once for each batch.
            to: the block that becomes the present one, with what it is given when those before it run as they are now;
                None stops at the last layer of `see`.
        """
        hidden = self._forward(see, to, None)
        if to is not None:
            self._hidden, self.at = hidden, to

    def _forward(self, see: Mapping[nn.Module, See], to: int | None, sums: ForwardSums | None) -> list[Tensor]:
        """What the block `to` is given, batch by batch; the walk stays where it is."""
        hidden: list[Tensor] = []
        for number, batch in enumerate(self._batches):
            waiting = set(see)
            if sums is not None:
                sums.expect(batch)
            with suppress(_Enough), ExitStack() as stack:
                if self.at:
                    stack.enter_context(self._from(self._hidden[number]))
                for module, taken in see.items():
                    done = waiting if to is None else None
                    stack.enter_context(_called(module, partial(_take, batch, module, taken, done)))
                if to is not None:
                    for index in range(self.at, to):
                        stack.enter_context(output_seen(self._blocks[index], partial(self._learn, index)))
                    stack.enter_context(input_seen(self._blocks[to], partial(_keep, hidden)))
                self._body(**batch.to(self._device).inputs, use_cache=False)
        return hidden

    @torch.no_grad()
    def collect(self, sums: ForwardSums, *, move: bool = False) -> None:
        """Run the text through the present block, while `sums`, of matrices in this block, listen.

        Args:
            sums: what listens.
            move: let the block behind become the present one, if there is one.
        """
        with sums.hooked():
            if self.at + 1 == len(self._blocks):
                self._forward({}, None, sums)
            else:
                hidden = self._forward({}, self.at + 1, sums)
                if move:
                    self._hidden, self.at = hidden, self.at + 1

    @contextmanager
    def _from(self, hidden: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for block, beside in zip(self._blocks[: self.at], self._beside, strict=False):
                stack.enter_context(passing_through(block, beside))
            stack.enter_context(input_replaced(self._blocks[self.at], hidden.to(self._device)))
            yield

    def _learn(self, index: int, output: Any) -> None:
        self._beside[index] = beside_hidden(output)


def _batch(text: Sequences) -> int:
    return max(1, FORWARD_TOKENS // text.shape[1]) if isinstance(text, Tensor) else 1


def _take(batch: Batch, module: nn.Module, see: See, waiting: set[nn.Module] | None, inputs: Tensor) -> None:
    """Hand on the inputs of a layer; ends the pass with the last of those that it is waited for."""
    see(batch.real(inputs))
    if waiting is not None:
        waiting.discard(module)
        if not waiting:
            raise _Enough


def _keep(states: list[Tensor], hidden: Tensor) -> None:
    states.append(hidden.to("cpu", copy=True))
    raise _Enough


@contextmanager
def _called(module: nn.Module, see: See) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()
