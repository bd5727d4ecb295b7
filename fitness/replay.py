"""Pruning in replay: what a block is scored and compressed by is what the pruned blocks before it hand on.

Layer by layer in model order. The statistics of a block are collected in one pass over what it is given, before any of
its matrices changes, so that within a block no matrix sees what became of another; then the text goes through the
pruned block. Source: the released code of Frantar and Alistarh 2023 (SparseGPT, arXiv:2301.00774) and of Sun et al.
2024 (Wanda, arXiv:2306.11695), which both do so; specification, pruners.md 0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from evoprune.fitness.amia import TokenChoice
from evoprune.fitness.block_walk import BlockWalk, States
from evoprune.fitness.compressors import AtRunTime, compressor_of
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import OF_ERROR, PrunedLayer, needed_statistics, prune_model
from evoprune.fitness.samples import Sequences
from evoprune.fitness.statistics import text_facts
from evoprune.fitness.statistics_forward import Results
from evoprune.fitness.statistics_passes import (
    GRADIENT_NAMES,
    REGIONAL_NAMES,
    PassSettings,
    forward_sums,
    refuse_undefined,
)
from evoprune.fitness.statistics_reader import Statistics
from evoprune.fitness.statistics_store import SQUARE_ROOTS, stored_names
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import MaskRule
from evoprune.metrics.terminals import FREE_TERMINALS


def replayed(
    language_model: LanguageModel,
    criterion: Criterion,
    rule: MaskRule,
    sequences: Sequences,
    *,
    compressor: str = "mask",
    allocation: Allocation | None = None,
    statistics: Statistics | None = None,
    tokens: TokenChoice | None = None,
    modules: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PrunedLayer, ...]:
    """Prune the model in place, block by block, each by what the pruned blocks before it hand on.

    It takes three forward passes of each block: two for statistics, of what the dense blocks before it hand on and of
    what the pruned ones do, and one on the latter once it is pruned. The hidden states of the text, twice, and the
    statistics of one block are in memory beside the model.

    Args:
        language_model: dense, or pruned before: its weights are pruned as they are.
        criterion, rule, compressor, allocation, modules, progress: as of `evoprune.fitness.pruning.prune_model`.
        sequences: text A, [n, window] int64 token ids, or samples of images and text.
        statistics: of this model as it is: those of gradients that criterion and compressor need, which are not
            replayed; see `dense_names`. None if there are none of these.
        tokens: how the tokens are chosen that statistics of inputs and outputs are of; None takes all.

    Returns:
        One entry per matrix, in model order: its `error` is on the inputs that it has in the model as it was, its
        `path_error` on those that it has now.

    Raises:
        InvalidInput: see `check_replay` and `prune_model`.
    """
    check_replay(language_model, rule, compressor)
    needs = needed_statistics(criterion, compressor)
    replay = Replay(language_model, sequences, needs, dense=statistics, tokens=tokens)
    return prune_model(
        language_model,
        criterion,
        rule,
        statistics=replay,
        compressor=compressor,
        allocation=allocation,
        modules=modules,
        progress=progress,
    )


def dense_names(names: Iterable[str]) -> frozenset[str]:
    """Of some statistics those that stay what they are in the dense model: gradients of the loss of the whole model."""
    return frozenset(names) & (GRADIENT_NAMES | REGIONAL_NAMES)


def check_replay(
    language_model: LanguageModel, rule: MaskRule, compressor: str, option: str = "accumulation path"
) -> None:
    """Refuse what no walk through the blocks can do; worth asking before long work.

    Args:
        language_model, rule, compressor: as of `replayed`.
        option: what asks for the walk, for messages.

    Raises:
        InvalidInput: scores of all blocks are to be compared, a compressor works at run time, or matrices of several
            components are to be pruned.
        UnknownName: no such compressor.
    """
    if isinstance(compressor_of(compressor), AtRunTime):
        raise InvalidInput(f"compressor {compressor!r} goes from block to block by itself: leave out {option}")
    if rule.group == "global" and rule.pattern is None:
        raise InvalidInput(
            f"group global compares the scores of all blocks before the first is pruned: give another group, or leave "
            f"out {option}"
        )
    if len({bound.site.component for bound in language_model.sites}) > 1:
        raise InvalidInput(f"{option} goes through one component: leave out --components, or name one")


class BlockByBlock:
    """Statistics of the dense model, of one block at a time, each before it is pruned.

    They are collected when the first matrix of a block is asked for, and let go with the last; so blocks have to be
    asked for in model order, and a matrix is asked for everything before it changes. They are the same, bit for bit, as
    those of a pass through the whole model.

    Args:
        language_model: as it is before; its weights change between two blocks.
        sequences: text A.
        names: terminals that need data, or ``H``.
        dense: statistics of gradients; see `replayed`.
        tokens: see `replayed`.
        states: makes what the hidden states before a block are kept in, by the name of a walk.
        begin: the first block that will be asked for; the walks are then told where they are.

    Attributes:
        names: what `site_statistics` gives: what was asked for, and what relative output errors are measured by.
        manifest: what they are made from, as far as a recipe says it.
        walks: the texts on their way through the blocks, by name.

    Raises:
        UnknownName: a name is not a statistic.
        InvalidInput: one is of gradients and not in `dense`, or undefined for the model or the text.
    """

    walk_names: ClassVar[tuple[str, ...]] = ("dense",)
    source: ClassVar[str] = "dense"

    def __init__(
        self,
        language_model: LanguageModel,
        sequences: Sequences,
        names: Iterable[str],
        *,
        dense: Statistics | None = None,
        tokens: TokenChoice | None = None,
        states: Callable[[str], States] = lambda name: [],
        begin: int = 0,
    ) -> None:
        wanted = frozenset(names) - FREE_TERMINALS
        self._gradients = dense_names(wanted)
        if missing := self._gradients - (frozenset() if dense is None else dense.names):
            raise InvalidInput(f"{min(missing)} is of the dense model and was not collected: add it to the statistics")
        self._dense = dense
        self._stored = self._completed(stored_names(wanted - self._gradients))
        self.names = (
            self._gradients | self._stored | {root for root, square in SQUARE_ROOTS.items() if square in self._stored}
        )
        refuse_undefined(language_model, sequences, self._stored)
        self._model = language_model
        self._sequences = sequences
        self._settings = PassSettings(tokens=tokens)
        self.manifest: dict[str, Any] = text_facts(sequences) | {"settings": asdict(self._settings)}
        blocks = [name for name, _ in language_model.blocks()]
        self.walks = {
            name: BlockWalk(language_model, blocks, [sequences], states=partial(states, name))
            for name in self.walk_names
        }
        self._block = begin - 1
        self._found: dict[str, BlockStatistics] = {}

    def site_statistics(self, site: str, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Several statistics of one matrix; terminals that need no data are passed over.

        Returns:
            By name, private and float32: [1, in], [out, 1] or [out, in]; ``H`` is [in, in].
        """
        wanted = frozenset(names) - FREE_TERMINALS
        found = {} if self._dense is None else self._dense.site_statistics(site, wanted & self._gradients, device)
        return found | self._at(site)[self.source].site_statistics(site, wanted - self._gradients, device)

    def leave(self) -> None:
        """Let the text through the present block as it now is, so that it is not needed any more."""
        self._found = {}

    def _completed(self, stored: frozenset[str]) -> frozenset[str]:
        return stored

    def _at(self, site: str) -> dict[str, BlockStatistics]:
        block = next(bound.site.block for bound in self._model.sites if bound.site.name == site)
        if block != self._block:
            assert block == self._block + 1, "blocks are asked for in model order"
            self._found = {}
            self._found = self._reached(block)
            self._block = block
        return self._found

    def _reached(self, block: int) -> dict[str, BlockStatistics]:
        # What the dense blocks hand on has to go through this one before it changes.
        return {"dense": self._collect("dense", block, self._stored, move=True)}

    @torch.no_grad()
    def _collect(self, name: str, block: int, stored: frozenset[str], *, move: bool) -> BlockStatistics:
        sites = [bound for bound in self._model.sites if bound.site.block == block]
        sums = forward_sums(self._model, sites, stored, self._settings)
        self.walks[name].collect(sums, move=move)
        return BlockStatistics(sums.results(len(self._sequences)), sums.leaders)


class Replay(BlockByBlock):
    """Statistics of a model that is being pruned: of each block as it is reached, behind the blocks as they are then.

    Otherwise as `BlockByBlock`. Relative output errors are measured on dense inputs too, so there is always a statistic
    to measure them by.
    """

    walk_names: ClassVar[tuple[str, ...]] = ("dense", "path")
    source: ClassVar[str] = "path"

    def dense_inputs(self, site: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What the relative output error on inputs from dense blocks is measured by: ``H`` or ``X_ss``."""
        return self._at(site)["dense"].site_statistics(site, [self._of_error], device)

    def leave(self) -> None:
        """See `BlockByBlock`."""
        super().leave()
        self.walks["path"].run({}, to=self._block + 1)

    @property
    def _of_error(self) -> str:
        return next(name for name in OF_ERROR if name in self._stored)

    def _completed(self, stored: frozenset[str]) -> frozenset[str]:
        return stored | {OF_ERROR[-1]} if stored.isdisjoint(OF_ERROR) else stored

    def _reached(self, block: int) -> dict[str, BlockStatistics]:
        if self.walks["path"].at < block:
            self.walks["path"].run({}, to=block)
        path = self._collect("path", block, self._stored, move=False)
        return {"path": path, "dense": self._collect("dense", block, frozenset({self._of_error}), move=True)}


class BlockStatistics:
    """Statistics of the matrices of one block, in memory.

    Args:
        results: site -> stored name -> tensor; of inputs under the leading site.
        leaders: site -> the site that its input statistics are under.
    """

    def __init__(self, results: Results, leaders: dict[str, str]) -> None:
        self._results = results
        self._leaders = leaders

    def site_statistics(self, site: str, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Private float32 copies, by name."""
        found = {}
        for name in sorted(names):
            stored = SQUARE_ROOTS.get(name, name)
            owner = site if stored.startswith("Y_") else self._leaders[site]
            tensor = self._results[owner][stored].to(device, torch.float32, copy=True)
            found[name] = tensor.sqrt_() if name in SQUARE_ROOTS else tensor
        return found
