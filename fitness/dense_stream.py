"""What a cut model should hand on: the hidden states of the dense one, block by block.

A part that is refitted on what the cut model gives it keeps at best its own output there; what the parts before it got
wrong stays in the hidden states. With d the difference between the hidden state behind a part in the dense model and
that which the whole part would leave, E[d xᵀ] over its present inputs x says how much of it the part can make up for,
see `evoprune.fitness.removal_order.Problem.of`. Blocks that normalise or scale what their parts put out before they add
it (Gemma 2) are passed by: their parts keep their own outputs.
Source: Li et al. 2025 (GPTAQ, arXiv:2504.02692) aims at the output of the dense layer; here it is the hidden state
behind it, so that what earlier parts added counts too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor

from evoprune.fitness.block_walk import BlockWalk, States
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Sequences
from evoprune.fitness.statistics_forward import InputSums
from evoprune.fitness.structure_parts import Part
from evoprune.fitness.units import BlockUnits, PartName
from evoprune.metrics.errors import InvalidInput

CORRECTION = 0.5
"""How much of what they can make up for parts do: with all of it, little of the text being known, they fit its noise.

On the reference model cut evenly by half, seed 0, held-out loss below that of the dense build: by 0.058 with 0.3 of it,
0.066 with 0.5, 0.064 with 0.7, 0.052 with all; with none of it above, by 0.010."""

# Parts whose outputs are normalised or scaled before they are added differ by far more from what they add.
_TOLERANCE = 1e-3


def dense_stream(
    language_model: LanguageModel,
    units: Sequence[BlockUnits],
    texts: Sequence[Sequences],
    correction: float,
    cut: BlockWalk,
) -> DenseStream | None:
    """The stream of a correction; None for 0.

    Args:
        language_model, units, texts, correction: as of `DenseStream`.
        cut: the same text on its way through the cut model, which then begins where the stream does.

    Raises:
        InvalidInput: the correction is not in [0, 1].
    """
    if not 0 <= correction <= 1:
        raise InvalidInput(f"correction {correction:g} is not in [0, 1]: give 0 for none, 1 for all of it")
    if not correction:
        return None
    stream = DenseStream(language_model, units, texts, correction)
    stream.start(cut)
    return stream


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
        self, language_model: LanguageModel, units: Sequence[BlockUnits], texts: Sequence[Sequences], correction: float
    ) -> None:
        self._correction = correction
        self._dtype = language_model.model.dtype
        self._walk = BlockWalk(language_model, [block.name for block in units], texts)
        self._walk.run({}, to=0)
        self._before = self._hidden()
        self._parts: dict[PartName, Part] = {}
        self._outputs: dict[PartName, list[Tensor]] = {}
        self._added = False

    def start(self, cut: BlockWalk) -> None:
        """Let the walk through the cut model begin where this one does."""
        cut.resume(0, self._before)

    def enter(self, block: BlockUnits) -> None:
        """Go through a block, the next one, as it is in the dense model, and remember what its parts put out."""
        self._before = self._hidden()
        self._parts = {"attention": block.attention, "mlp": block.mlp}
        self._outputs = {name: [] for name in self._parts}
        see = {part.output.module: partial(self._remember, name) for name, part in self._parts.items()}
        self._walk.run(see, block.block + 1)
        self._added = self._adds()

    def sums(self, cut: BlockWalk, part: Part) -> tuple[Tensor, Tensor | None]:
        """What a part of the block that was entered is refitted by, once the part before it has been cut.

        Args:
            cut: the text in the cut model, before this block.
            part: still whole.

        Returns:
            [in, in] float32, the mean of x xᵀ over the tokens that its output reads now, and [out, in] float32, that of
            d xᵀ times the correction; None where the block does more with what its parts put out than add it to the
            hidden states.
        """
        site, device = part.output.site, part.output.weight().device
        inputs = InputSums(site.in_features, device, frozenset({"H"}))
        missing = torch.zeros(site.out_features, site.in_features, device=device)
        names: list[PartName] = ["attention"] if part is self._parts["attention"] else ["attention", "mlp"]
        heard: dict[PartName, Tensor] = {}
        batches = count()
        tokens = 0

        def hear(name: PartName, rows: Tensor) -> None:
            # Attention and MLP of a block may come in either order.
            nonlocal tokens
            heard[name] = rows
            if len(heard) < len(names):
                return
            lag = self._lag(cut, batch := next(batches), device)
            for one in names:
                lag += self._outputs[one][batch].to(device).float() - _put_out(self._parts[one], heard[one])
            inputs.add(heard[names[-1]])
            missing.addmm_(lag.T, heard[names[-1]].float())
            tokens += len(lag)
            heard.clear()

        cut.run({self._parts[name].output.module: partial(hear, name) for name in names})
        return inputs.results(1)["H"], self._correction / tokens * missing if self._added else None

    def _remember(self, name: PartName, rows: Tensor) -> None:
        self._outputs[name].append(_put_out(self._parts[name], rows).to("cpu", self._dtype))

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
        added = self._outputs["attention"][0].float() + self._outputs["mlp"][0].float()
        allowed = _TOLERANCE * added.norm() + torch.finfo(self._dtype).eps * behind.norm()
        return bool((behind - before - added).norm() <= allowed)


def _put_out(part: Part, rows: Tensor) -> Tensor:
    """[tokens, out] float32, what the output matrix of a part makes of its inputs, with its bias."""
    bias = part.output.bias()
    product = rows.float() @ part.output.weight().float().T
    return product if bias is None else product + bias.float()
