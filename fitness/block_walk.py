"""Going through the decoder blocks of a model one at a time, with what each is given remembered for a whole text.

Blocks behind the present one hand on what they are given, so that a pass costs no more than the present block, and the
model's own forward pass makes positions and masks, whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evoprune.fitness.block_hooks import (
    beside_hidden,
    hidden_output,
    input_replaced,
    input_seen,
    output_seen,
    passing_through,
)
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Batch, Sequences, forward_batches
from evoprune.fitness.statistics_forward import ForwardSums
from evoprune.fitness.statistics_passes import FORWARD_TOKENS

See = Callable[[Tensor], None]
"""Takes in the inputs of a layer, [tokens, features], padding dropped."""


class States(Protocol):
    """Hidden states on the CPU, one tensor for each batch."""

    def append(self, hidden: Tensor, /) -> None: ...

    def __getitem__(self, number: int, /) -> Tensor: ...


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
        states: makes what the hidden states before a block are kept in, empty.
        batch: windows in a forward pass; None takes 2,048 tokens' worth.

    Attributes:
        at: the present block.
        beside: what each block behind returns beside its hidden states, without tensors; None for nothing.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        blocks: Iterable[str],
        texts: Iterable[Sequences],
        *,
        states: Callable[[], States] = list,
        batch: int | None = None,
    ) -> None:
        model = language_model.model
        self._body = getattr(model, "base_model", model)
        self._device = language_model.device
        self._blocks = [model.get_submodule(name) for name in blocks]
        self.beside: list[tuple[Any, ...] | None] = [None] * len(self._blocks)
        cpu = torch.device("cpu")
        self._batches = [given for text in texts for given in forward_batches(text, batch or _batch(text), cpu)]
        self._states = states
        self._hidden: States | None = None
        self.at = 0

    @torch.no_grad()
    def run(self, see: Mapping[nn.Module, See], to: int | None = None) -> None:
        """Run the text from the present block on.

        Args:
            see: layers, and what is called with their inputs, once for each batch.
            to: the block that becomes the present one, with what it is given when those before it run as they are now;
                the number of blocks is behind the last. None stops at the last layer of `see`.
        """
        hidden = self._forward(see, to, None)
        if to is not None:
            self.resume(to, hidden)

    def resume(self, at: int, hidden: States) -> None:
        """Let `at` be the present block, which is given `hidden`, batch by batch."""
        self._hidden, self.at = hidden, at

    def _forward(self, see: Mapping[nn.Module, See], to: int | None, sums: ForwardSums | None) -> States:
        """What the block `to` is given, batch by batch; the walk stays where it is."""
        hidden = self._states()
        for number, batch in enumerate(self._batches):
            waiting = set(see)
            if sums is not None:
                sums.expect(batch)
            with suppress(_Enough), ExitStack() as stack:
                if self._hidden is not None:
                    stack.enter_context(self._from(self._hidden[number]))
                for module, taken in see.items():
                    done = waiting if to is None else None
                    stack.enter_context(_called(module, partial(_take, batch, module, taken, done)))
                if to is not None:
                    for index in range(self.at, to):
                        stack.enter_context(output_seen(self._blocks[index], partial(self._learn, index)))
                    if to < len(self._blocks):
                        stack.enter_context(input_seen(self._blocks[to], partial(_keep, hidden)))
                    else:
                        last = self._blocks[-1]
                        stack.enter_context(output_seen(last, lambda made: _keep(hidden, hidden_output(made))))
                self._body(**batch.to(self._device).inputs, use_cache=False)
        return hidden

    @torch.no_grad()
    def collect(self, sums: ForwardSums, *, move: bool = False) -> None:
        """Run the text through the present block, while `sums`, of matrices in this block, listen.

        Args:
            sums: what listens.
            move: go on to the next block, or behind the last.
        """
        with sums.hooked():
            hidden = self._forward({}, self.at + 1, sums)
        if move:
            self.resume(self.at + 1, hidden)

    def rows(self, number: int, hidden: Tensor) -> Tensor:
        """[n, features]: of what a layer gives for a batch, by its number, what is no padding."""
        return self._batches[number].real(hidden)

    @property
    def hidden(self) -> States | None:
        """What the present block is given; None before the first run."""
        return self._hidden

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Iterator[tuple[Batch, Tensor]]:
        """What the model makes of the text, batch by batch; to be asked for behind the last block.

        Args:
            model: the whole of which the blocks are a part; its norm and its head are run.

        Yields:
            What went in, and [rows, tokens, vocabulary] in the model's dtype.
        """
        assert self._hidden is not None and self.at == len(self._blocks), "the text is not through the blocks yet"
        for number, batch in enumerate(self._batches):
            with self._from(self._hidden[number]):
                yield batch, model(**batch.to(self._device).inputs, use_cache=False).logits

    @contextmanager
    def _from(self, hidden: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for block, beside in zip(self._blocks[: self.at], self.beside, strict=False):
                stack.enter_context(passing_through(block, beside))
            at = min(self.at, len(self._blocks) - 1)
            stack.enter_context(input_replaced(self._blocks[at], hidden.to(self._device)))
            yield

    def _learn(self, index: int, output: Any) -> None:
        self.beside[index] = beside_hidden(output)


def _batch(text: Sequences) -> int:
    return max(1, FORWARD_TOKENS // text.shape[1]) if isinstance(text, Tensor) else 1


def _take(batch: Batch, module: nn.Module, see: See, waiting: set[nn.Module] | None, inputs: Tensor) -> None:
    """Hand on the inputs of a layer; ends the pass with the last of those that it is waited for."""
    see(batch.real(inputs))
    if waiting is not None:
        waiting.discard(module)
        if not waiting:
            raise _Enough


def _keep(states: States, hidden: Tensor) -> None:
    states.append(hidden.to("cpu", copy=True))
    raise _Enough


@contextmanager
def _called(module: nn.Module, see: See) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, args: see(args[0]))
    try:
        yield
    finally:
        handle.remove()
