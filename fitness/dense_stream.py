"""What a cut model should hand on: the hidden states of the dense one, block by block.

A part that is refitted on what the cut model gives it keeps at best its own output there; what the parts before it got
wrong stays in the hidden states. With d the difference between the hidden state behind a part in the dense model and
that which the whole part would leave, E[d xᵀ] over its present inputs x says how much of it the part can make up for,
see `evoprune.fitness.removal_order.Problem.of`.
Source: Li et al. 2025 (GPTAQ, arXiv:2504.02692) aims at the output of the dense layer; here it is the hidden state
behind it, so that what earlier parts added counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evoprune.fitness.block_walk import BlockWalk, States
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Sequences
from evoprune.fitness.statistics_forward import InputSums
from evoprune.fitness.structure_parts import Part
from evoprune.fitness.units import BlockUnits

CORRECTION = 0.5
"""How much of what they can make up for parts do: with all of it, little of the text being known, they fit its noise.

On the reference model cut evenly by half, seed 0, held-out loss below that of the dense build: by 0.058 with 0.3 of it,
0.066 with 0.5, 0.064 with 0.7, 0.052 with all; with none of it above, by 0.010."""

# Parts whose outputs are normalised or scaled before they are added differ by far more from what they add.
_TOLERANCE = 1e-3


class DenseStream:
    """A text on its way through the dense model, beside the same text on its way through the cut one.

    Of the dense model, the hidden states of the whole text before and behind a block, and what its attention and its
    MLP put out, are on the CPU in the model's dtype.

    Args:
        language_model: whose blocks are dense when they are entered, whatever became of those before.
        units: of all of its blocks.
        texts: as of `BlockWalk`.
        correction: how much of what parts can make up for they do, in (0, 1].
    """

    def __init__(
        self,
        language_model: LanguageModel,
        units: Sequence[BlockUnits],
        texts: Sequence[Sequences],
        correction: float = CORRECTION,
    ) -> None:
        self._correction = correction
        self._walk = BlockWalk(language_model, [block.name for block in units], texts)
        self._walk.run({}, to=0)
        self._before = self._hidden()
        self._dtype = language_model.model.dtype
        self._plain = True

    def start(self, cut: BlockWalk) -> None:
        """Let the walk through the cut model begin where this one does."""
        cut.resume(0, self._before)

    def enter(self, block: BlockUnits) -> None:
        """Go through a block, the next one, as it is in the dense model, and remember what its parts put out."""
        self._block, self._before = block, self._hidden()
        self._outputs: dict[int, list[Tensor]] = {0: [], 1: []}
        parts: tuple[Part, Part] = (block.attention, block.mlp)

        def put(number: int) -> Callable[[Tensor], None]:
            part = parts[number]
            return lambda rows: self._outputs[number].append(_put_out(part, rows).to("cpu", self._dtype))

        see = {part.output.module: put(number) for number, part in enumerate(parts)}
        self._walk.run(see, block.block + 1)
        self._plain = self._adds()

    def sums(self, cut: BlockWalk, part: Part) -> tuple[Tensor, Tensor | None]:
        """What a part of the block that was entered is refitted by, once the parts before it have been cut.

        Args:
            cut: the text in the cut model, before this block.
            part: still whole.

        Returns:
            [in, in] float32, the mean of x xᵀ over the tokens that its output reads now, and [out, in] float32, that of
            d xᵀ times the correction; None where the block does more with what its parts put out than add it to the
            hidden states.
        """
        output, attention = part.output, self._block.attention
        width, device = output.site.in_features, output.weight().device
        inputs = InputSums(width, device, frozenset({"H"}))
        missing = torch.zeros(output.site.out_features, width, device=device)
        heard: dict[int, Tensor] = {}
        numbers = [0] if part is attention else [0, 1]
        batch, tokens = 0, 0

        def hear(number: int) -> Callable[[Tensor], None]:
            def taken(rows: Tensor) -> None:
                heard[number] = rows
                if len(heard) == len(numbers):
                    add()

            return taken

        def add() -> None:
            nonlocal batch, tokens
            lag = self._lag(cut, batch, device)
            for number in numbers:
                of = (attention, self._block.mlp)[number]
                lag += self._outputs[number][batch].to(device).float() - _put_out(of, heard[number])
            rows = heard[numbers[-1]]
            inputs.add(rows)
            missing.addmm_(lag.T, rows.float())
            batch, tokens = batch + 1, tokens + len(rows)
            heard.clear()

        modules = (attention.output.module, self._block.mlp.output.module)
        cut.run({modules[number]: hear(number) for number in numbers})
        return inputs.results(1)["H"], self._correction / tokens * missing if self._plain else None

    def _hidden(self) -> States:
        hidden = self._walk.hidden
        assert hidden is not None
        return hidden

    def _lag(self, cut: BlockWalk, batch: int, device: torch.device) -> Tensor:
        """[tokens, hidden] float32: by how much the hidden states before the block are those of the dense model."""
        assert cut.hidden is not None
        dense, now = (self._walk.rows(batch, states[batch].to(device)).float() for states in (self._before, cut.hidden))
        return dense - now

    def _adds(self) -> bool:
        """Whether what the parts put out is what the block adds to the hidden states, but for rounding."""
        before, behind = (self._walk.rows(0, states[0]).float() for states in (self._before, self._hidden()))
        added = self._outputs[0][0].float() + self._outputs[1][0].float()
        allowed = _TOLERANCE * added.norm() + torch.finfo(self._dtype).eps * behind.norm()
        return bool((behind - before - added).norm() <= allowed)


def _put_out(part: Part, rows: Tensor) -> Tensor:
    """[tokens, out] float32, what the output matrix of a part makes of its inputs, with its bias."""
    bias = part.output.bias()
    product = rows.float() @ part.output.weight().float().T
    return product if bias is None else product + bias.float()
