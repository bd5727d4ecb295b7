"""LaCo: blocks behind a block are merged into it, as long as the model's last hidden states stay what they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from evoprune.fitness.block_hooks import beside_hidden, input_replaced, input_seen, output_seen, passing_through
from evoprune.fitness.merging import check_alike, merged
from evoprune.fitness.methods import METHODS, Evidence, ModelEdit, without
from evoprune.fitness.samples import Batch, Samples, forward_batches
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice, check_range

Merge = tuple[int, tuple[int, ...]]
"""A block, and those behind it that were merged into it."""

# To this distance thresholds are told apart where a number of blocks decides.
_NEAR = 1e-3


@dataclass(frozen=True)
class LaCo:
    """Merge blocks into the one before them, from the last ones down, if hidden states stay similar enough.

    Each attempt merges `layers` - 1 blocks into the one before, and is kept if the cosine between the last hidden
    states of the dense and of the merged model, flattened over the tokens of a sequence, is above the threshold in the
    mean over sequences; the next one begins `interval` blocks lower, or one lower if it was not kept. Without a
    threshold the largest is taken with which as many blocks go as the sparsity says, and there it ends.

    Attributes:
        threshold: T, in [-1, 1]; None where the sparsity decides.
        layers: C, how many blocks become one; None takes an eighth of the blocks, and at least 2.
        interval: I.
        lowest, highest: the first block that others may be merged into, and the one that the first attempt ends before;
            None of the latter is the last block, which then stays as it is, as in the released code.
        mode: ``rdsc`` adds what the blocks differ by, as published; ``last`` takes the parameters of the last of them,
            as the released code does.
        norms: ``kept`` or ``merged``; those of query and key heads among them.
        sequences: of text A that hidden states are compared on, at most.
    """

    threshold: float | None = None
    layers: int | None = None
    interval: int = 1
    lowest: int = 0
    highest: int | None = None
    mode: str = "rdsc"
    norms: str = "kept"
    sequences: int = 8

    source: ClassVar[str] = "Yang et al. 2024, LaCo, arXiv:2402.11187; released code"

    def __post_init__(self) -> None:
        check_choice("mode of laco", self.mode, ("rdsc", "last"))
        check_choice("treatment of norms", self.norms, ("kept", "merged"))
        if self.threshold is not None:
            check_range("threshold of laco", self.threshold, -1, 1)
        if self.layers is not None and self.layers < 2:
            raise InvalidInput(f"{self.layers} blocks cannot become one: give layers of 2 or more")
        if self.interval < 1 or self.sequences < 1:
            raise InvalidInput("interval and sequences of laco are whole numbers from 1 on")

    def edit(self, evidence: Evidence) -> ModelEdit:
        blocks = len(evidence.units)
        if blocks < 2:
            raise InvalidInput(f"a model of {blocks} block has none to merge into another")
        highest = blocks - 1 if self.highest is None else self.highest
        layers = max(2, blocks // 8) if self.layers is None else self.layers
        if not 0 <= self.lowest <= highest - layers or highest > blocks:
            raise InvalidInput(
                f"merges of {layers} blocks from {self.lowest} up to {highest} do not fit a model of {blocks}: give "
                f"lowest of 0 or more, highest of {blocks} or less, and at most as many layers as lie between"
            )
        if self.threshold is not None and evidence.sparsity is not None:
            raise InvalidInput("a threshold of laco says by itself how much goes: give it or a sparsity, not both")
        with _Collapse(self, evidence) as collapse:
            threshold = self.threshold
            limit = blocks - 1 if threshold is not None else evidence.blocks_to_go()
            if threshold is None:
                threshold = collapse.threshold_for(layers, highest, limit)
            merges = collapse.run(threshold, layers, highest, limit)
            if not merges:
                raise InvalidInput(f"no merge is above the threshold {threshold:g}: give a lower one, or a sparsity")
            replaced = collapse.parameters(merges)
            similarity = collapse.similarity(merges)
        evidence.progress(1, 1)
        found: dict[str, Any] = {
            "merges": [{"into": base, "blocks": list(others)} for base, others in merges],
            "threshold": threshold,
            "similarity": similarity,
        }
        gone = [block for _, others in merges for block in others]
        return ModelEdit(without(evidence, gone), replaced, found=found)


class _Collapse:
    """A model in which blocks are merged for a while. What is below a merge is the dense model's, and remembered."""

    def __init__(self, laco: LaCo, evidence: Evidence) -> None:
        self._laco, self._model = laco, evidence.language_model
        model = self._model.model
        self._body = getattr(model, "base_model", model)
        self._names = [block.name for block in evidence.units]
        self._modules = [model.get_submodule(name) for name in self._names]
        wanted = [self._wanted(block) for block in self._names]
        self._live = [
            {name: value.data for name, value in block.named_parameters() if name in names}
            for block, names in zip(self._modules, wanted, strict=True)
        ]
        check_alike(self._live[0], self._live[1:])
        self._dense: dict[int, dict[str, Tensor]] = {}
        self._known: dict[tuple[Merge, ...], float] = {}
        windows = evidence.windows[: laco.sequences]
        size = 1 if isinstance(windows, Samples) else 4
        self._batches = list(forward_batches(windows, size, torch.device("cpu")))
        self._inputs: list[list[Tensor]] = []
        self._beside: list[tuple[Any, ...] | None] = []
        self._last: list[Tensor] = []

    def __enter__(self) -> _Collapse:
        self._look()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def threshold_for(self, layers: int, highest: int, going: int) -> float:
        """The largest threshold with which so many blocks go, to within `_NEAR`.

        Raises:
            InvalidInput: no threshold is low enough.
        """
        low, high = -1.0, 1.0
        most = _count(self.run(low, layers, highest, going))
        if most < going:
            raise InvalidInput(
                f"merges of {layers} blocks from {self._laco.lowest} to {highest} take away {most} blocks at most and "
                f"not {going}: widen the range, or give a smaller interval or sparsity"
            )
        while high - low > _NEAR:
            middle = (low + high) / 2
            if _count(self.run(middle, layers, highest, going)) == going:
                low = middle
            else:
                high = middle
        return low

    def run(self, threshold: float, layers: int, highest: int, most: int) -> tuple[Merge, ...]:
        """The merges that are above a threshold, until so many blocks are gone."""
        stay = list(range(len(self._modules)))
        found: tuple[Merge, ...] = ()
        at = highest - layers
        while at >= self._laco.lowest and _count(found) < most:
            others = tuple(stay[at + 1 : at + 1 + min(layers - 1, most - _count(found))])
            tried = (*found, (stay[at], others))
            if others and self.similarity(tried) > threshold:
                found = tried
                stay = [block for block in stay if block not in others]
                at -= self._laco.interval
                if at >= len(stay):
                    at = len(stay) - 1 - layers
            else:
                at -= 1
        return found

    def similarity(self, merges: tuple[Merge, ...]) -> float:
        """Cosine between the dense and the merged model's last hidden states, the mean over sequences."""
        if merges not in self._known:
            self._put(merges)
            self._known[merges] = self._compared(merges)
        return self._known[merges]

    def parameters(self, merges: tuple[Merge, ...]) -> dict[str, Tensor]:
        """What the blocks that others were merged into become, by full name."""
        self._put(merges)
        return {
            f"{self._names[base]}.{name}": value.clone()
            for base in dict.fromkeys(base for base, _ in merges)
            for name, value in self._live[base].items()
        }

    def _wanted(self, block: str) -> set[str]:
        """Names in a block of the parameters that are merged."""
        own = dict(self._model.model.get_submodule(block).named_parameters())
        if self._laco.norms == "merged":
            return set(own)
        matrices = [site.site.name for site in self._model.sites if site.site.name.startswith(f"{block}.")]
        modules = {name.removeprefix(f"{block}.") for name in matrices}
        return {name for name in own if name.rpartition(".")[0] in modules}

    @torch.no_grad()
    def _put(self, merges: Sequence[Merge]) -> None:
        """Let the live blocks have these merges, in turn."""
        self._restore()
        for base, others in merges:
            live = self._live[base]
            if base not in self._dense:
                self._dense[base] = {name: value.clone() for name, value in live.items()}
            if self._laco.mode == "last":
                new = self._live[others[-1]]
            else:
                new = merged(live, [self._live[other] for other in others])
            for name, value in live.items():
                value.copy_(new[name])

    @torch.no_grad()
    def _restore(self) -> None:
        for base, values in self._dense.items():
            for name, value in values.items():
                self._live[base][name].copy_(value)
        self._dense = {}

    @torch.no_grad()
    def _look(self) -> None:
        """Run the dense model, and remember what its blocks are given and what it ends with."""
        beside: dict[int, Any] = {}
        for batch in self._batches:
            seen: list[Tensor] = []
            with ExitStack() as stack:
                for index, block in enumerate(self._modules):
                    stack.enter_context(input_seen(block, partial(_keep, seen)))
                    stack.enter_context(output_seen(block, partial(beside.__setitem__, index)))
                self._last.append(self._run(batch).cpu())
            self._inputs.append(seen)
            self._beside = [beside_hidden(beside[index]) for index in range(len(self._modules))]
            beside.clear()

    @torch.no_grad()
    def _compared(self, merges: Sequence[Merge]) -> float:
        first = min(base for base, _ in merges)
        skipped = {*range(first), *(block for _, others in merges for block in others)}
        found: list[float] = []
        with ExitStack() as stack:
            for block in skipped:
                stack.enter_context(passing_through(self._modules[block], self._beside[block]))
            for batch, inputs, dense in zip(self._batches, self._inputs, self._last, strict=True):
                with input_replaced(self._modules[first], inputs[first].to(self._model.device)):
                    found += _cosines(batch, dense, self._run(batch).cpu())
        return sum(found) / len(found)

    def _run(self, batch: Batch) -> Tensor:
        hidden: Tensor = self._body(**batch.to(self._model.device).inputs, use_cache=False).last_hidden_state
        return hidden


def _keep(seen: list[Tensor], hidden: Tensor) -> None:
    seen.append(hidden.to("cpu", copy=True))


def _cosines(batch: Batch, one: Tensor, other: Tensor) -> Iterator[float]:
    """Of each sequence, flattened over its real tokens."""
    for (left, _), (right, _) in zip(batch.by_row(one), batch.by_row(other), strict=True):
        yield torch.cosine_similarity(left.double().reshape(-1), right.double().reshape(-1), dim=0).item()


def _count(merges: Sequence[Merge]) -> int:
    """Blocks that are gone."""
    return sum(len(others) for _, others in merges)


METHODS.add("laco", LaCo())
