"""Start a forward pass at a later block, from remembered hidden states at its input.

A candidate that prunes the first k blocks as its parent does has the parent's hidden states at the input of block k. So
blocks before k hand on what they are given, and block k is handed the remembered states. Everything else is the
model's own forward pass, so embeddings, positions, masks (a sliding window's too) and the final norm need no knowledge
of the family here, and the remaining blocks do the same arithmetic on the same numbers: results are equal to the bit.
Source: layerwise sparsity allocation, section 7.2 (3).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evoprune.fitness.block_hooks import beside_hidden, input_replaced, input_seen, output_seen, passing_through
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Batch

Pass = tuple[int, int]
"""The windows of a forward pass: the first, and the one after the last."""

logger = logging.getLogger(__name__)


class PrefixCache:
    """Hidden states at the inputs of decoder blocks, for batches of windows, of one state of the model.

    The same windows in another batch count as not remembered: their sums could differ in the last bit.

    Args:
        language_model: run as it is.
        sample: what to try the model on.
        stride: remember at the inputs of every so-many-th block.
        max_bytes: what the states may take; None sets no limit. Beyond it states lie further apart, and at last some
            windows have none.

    Attributes:
        boundaries: the blocks that a forward pass can start at, beside 0, in order. A block is among them only if the
            sample gives the same bits from there: one that reads what an earlier block left elsewhere than in the
            hidden states, such as its keys, does not.
    """

    def __init__(
        self, language_model: LanguageModel, sample: Batch, *, stride: int = 1, max_bytes: int | None = None
    ) -> None:
        self._blocks = [block for _, block in language_model.blocks()]
        self._max_bytes = max_bytes
        self._states: dict[Pass, dict[int, Tensor]] = {}
        self._outputs: list[tuple[Any, ...] | None] = [None] * len(self._blocks)
        self._bytes_per_token = 0
        candidates = range(stride, len(self._blocks), stride)
        self.boundaries = self._tried(language_model, sample.to(language_model.device), candidates)
        if len(self.boundaries) < len(candidates):
            logger.warning(
                "%s: forward passes start at %d of %d blocks only: the others read more than the hidden states",
                *(type(language_model.model).__name__, len(self.boundaries), len(candidates)),
            )

    @property
    def bytes(self) -> int:
        """What the remembered states take."""
        return sum(state.nbytes for states in self._states.values() for state in states.values())

    def clear(self) -> None:
        """Forget all states: the weights that they were remembered with are no longer those of the parent."""
        self._states.clear()

    def spread(self, tokens: int) -> tuple[int, ...]:
        """The boundaries at which to remember `tokens` tokens, so that they fit into what is left of the limit."""
        if self._max_bytes is None or not self.boundaries:
            return self.boundaries
        room = (self._max_bytes - self.bytes) // max(tokens * self._bytes_per_token, 1)
        count = min(max(room, 1), len(self.boundaries))
        step = (len(self.boundaries) + 1) / (count + 1)
        return tuple(self.boundaries[round(step * place) - 1] for place in range(1, count + 1))

    @contextmanager
    def started(self, batch: Pass, block: int, remember: Sequence[int] = ()) -> Iterator[int]:
        """Inside, a forward pass over the windows of `batch` starts at the last remembered boundary up to `block`.

        Args:
            batch: the windows that the pass is given, all of them at once.
            block: the first block whose weights differ from those that the states were remembered with; the number of
                blocks if none does.
            remember: boundaries at which this pass shall leave its states, with the present weights.

        Yields:
            The block that the pass starts at; 0 if it runs in full.
        """
        states = self._states.get(batch, {})
        start = max((at for at in states if at <= block), default=0)
        with ExitStack() as stack:
            if start:
                stack.enter_context(self._from(start, states[start]))
            for at in remember:
                if at > start:
                    stack.enter_context(input_seen(self._blocks[at], partial(self._keep, batch, at)))
            yield start

    def _keep(self, batch: Pass, at: int, hidden: Tensor) -> None:
        if self._max_bytes is None or self.bytes + hidden.nbytes <= self._max_bytes:
            _put_copy(self._states.setdefault(batch, {}), at, hidden)

    @contextmanager
    def _from(self, start: int, hidden: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            for block, output in zip(self._blocks[:start], self._outputs[:start], strict=True):
                stack.enter_context(passing_through(block, output))
            stack.enter_context(input_replaced(self._blocks[start], hidden))
            yield

    @torch.no_grad()
    def _tried(self, language_model: LanguageModel, sample: Batch, candidates: Sequence[int]) -> tuple[int, ...]:
        """Those of `candidates` from which `sample` gives the same bits; learns what blocks return on the way."""
        seen: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for at, block in enumerate(self._blocks):
                stack.enter_context(input_seen(block, partial(_put_copy, seen, at)))
                stack.enter_context(output_seen(block, partial(self._learn, at)))
            expected = language_model.model(**sample.inputs, use_cache=False).logits
        if len(seen) < len(self._blocks):
            return ()
        self._bytes_per_token = seen[0].nbytes // sample.inputs["input_ids"].numel()
        return tuple(at for at in candidates if self._equal_from(at, seen[at], language_model, sample, expected))

    def _equal_from(
        self, at: int, hidden: Tensor, language_model: LanguageModel, sample: Batch, expected: Tensor
    ) -> bool:
        with self._from(at, hidden):
            try:
                return torch.equal(language_model.model(**sample.inputs, use_cache=False).logits, expected)
            except Exception:  # whatever a block of any family does that misses what an earlier one leaves for it
                return False

    def _learn(self, at: int, output: Any) -> None:
        # A tensor beside the hidden states belongs to its windows: blocks that read it are found out by the sample.
        self._outputs[at] = beside_hidden(output)


def _put_copy(states: dict[int, Tensor], at: int, hidden: Tensor) -> None:
    # A copy, for a block that adds into its input.
    states[at] = hidden.clone()
