"""Run an allocator on a model: give it the evidence that it asks for, and repair what it requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.allocators import Allocator, parameters_of
from evoprune.fitness.diversity import DiversityMean
from evoprune.fitness.evaluation import evaluate_language_model
from evoprune.fitness.hidden_states import block_influence, without_block
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import site_scores
from evoprune.fitness.statistics import Statistics
from evoprune.metrics.allocation import Allocation, allocation_of, repair
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import EvopruneError, InvalidCandidate
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, Site
from evoprune.metrics.terminals import STATISTICS

# The loss of a model that gives no finite numbers: worse than any other.
_LOST = float("inf")


def statistics_needed(allocator: Allocator, criterion: Criterion) -> frozenset[str]:
    """Names of the statistics without which `allocate_model` cannot run; often none."""
    inside = criterion.needs & STATISTICS if "scores" in allocator.uses else frozenset()
    return allocator.needs | inside


@torch.no_grad()
def allocate_model(
    language_model: LanguageModel,
    name: str,
    allocator: Allocator,
    target: float,
    *,
    criterion: Criterion,
    statistics: Statistics | None = None,
    calibration: Tensor | None = None,
    search: Tensor | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Allocation:
    """What an allocator makes of a model, repaired to the budget.

    Args:
        language_model: dense; where losses are measured it is pruned in place and put back.
        name: the allocator's, for the record.
        allocator: as `evoprune.fitness.allocators.configured` gives it.
        target: fraction of all prunable weights that goes, in [0, 1).
        criterion: whose scores are the ones inside, and prune where losses are measured.
        statistics: at least `statistics_needed`; None if those are none.
        calibration: [n, window] int64 of text A; None if the allocator uses neither outputs nor hidden states.
        search: [n, window] int64 of text B; None if it uses no losses.
        progress: told what runs and how far it is.

    Raises:
        InvalidInput: a parameter does not fit this model, scores are not finite, or the budget cannot be reached.
    """
    evidence = ModelEvidence(language_model, target, criterion, statistics, calibration, search, progress)
    requested = allocator.request(evidence)
    return allocation_of(
        requested,
        evidence.sites,
        target,
        model=type(language_model.model).__name__,
        allocator=name,
        parameters=parameters_of(allocator),
    )


class ModelEvidence:
    """`Evidence` of a live model; arguments as in `allocate_model`."""

    def __init__(
        self,
        language_model: LanguageModel,
        target: float,
        criterion: Criterion,
        statistics: Statistics | None,
        calibration: Tensor | None,
        search: Tensor | None,
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.sites = tuple(bound.site for bound in language_model.sites)
        self.target = target
        self._language_model = language_model
        self._criterion = criterion
        self._statistics = statistics
        self._calibration = calibration
        self._search = search
        self._progress = progress
        self._bound = {bound.site.name: bound for bound in language_model.sites}

    def weight(self, site: Site) -> Tensor:
        return self._bound[site.name].weight().to(torch.float32, copy=True)

    def scores(self, site: Site) -> Tensor:
        return site_scores(self._bound[site.name], self._criterion, MaskRule(self.target), self._statistics)

    def statistic(self, site: Site, name: str) -> Tensor:
        if self._statistics is None:
            raise EvopruneError(f"the allocator reads {name}, which is not among its needs")
        return self._statistics.tensor(site.name, name, self._language_model.device)

    def diversity(self, pairs: str) -> Sequence[float]:
        windows = self._given(self._calibration, "outputs")
        means = {site.name: DiversityMean(pairs) for site in self.sites}
        body = getattr(self._language_model.model, "base_model", self._language_model.model)
        with _heard(self._language_model.sites, means):
            for done, ids in enumerate(windows, 1):
                body(input_ids=ids[None].to(self._language_model.device), use_cache=False)
                self._progress("measuring how unlike outputs are", done, len(windows))
        return [means[site.name].result() for site in self.sites]

    def influence(self) -> Sequence[float]:
        return block_influence(self._language_model, self._given(self._calibration, "hidden"))

    def losses(self, requests: Sequence[Sequence[float]]) -> Sequence[float]:
        windows = self._given(self._search, "loss")
        found = []
        for requested in requests:
            with self._pruned(repair(requested, self.sites, self.target)):
                found.append(self._measured(windows))
            self._progress("comparing losses", len(found), len(requests))
        return found

    def losses_without(self) -> Sequence[float]:
        windows = self._given(self._search, "loss")
        n_blocks = len(self._language_model.blocks())
        found = []
        for block in range(n_blocks):
            with without_block(self._language_model, block):
                found.append(self._measured(windows))
            self._progress("measuring the loss without each block", len(found), n_blocks)
        return found

    @contextmanager
    def _pruned(self, sparsities: Sequence[float]) -> Iterator[None]:
        """Inside, the model is pruned by the criterion, each matrix to its own sparsity."""
        dense: list[tuple[Tensor, Tensor]] = []
        try:
            for site, sparsity in zip(self.sites, sparsities, strict=True):
                bound = self._bound[site.name]
                keep = mask(self.scores(site), MaskRule(sparsity))
                weight = bound.weight()
                dense.append((weight, weight.clone()))
                weight.masked_fill_(~keep, 0)
            yield
        finally:
            for weight, copy in dense:
                weight.copy_(copy)

    def _measured(self, windows: Tensor) -> float:
        try:
            return evaluate_language_model(self._language_model.model, windows).loss
        except InvalidCandidate:
            return _LOST

    def _given(self, windows: Tensor | None, use: str) -> Tensor:
        if windows is None:
            raise EvopruneError(f"the allocator reads {use}, which is not among its uses")
        return windows


@contextmanager
def _heard(sites: Sequence[SiteModule], means: dict[str, DiversityMean]) -> Iterator[None]:
    """Inside, every forward pass adds the outputs of the matrices to their means."""

    def hear(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        rows = output if output.dim() == 3 else output[None]
        means[name].add(rows)

    handles = [bound.module.register_forward_hook(partial(hear, bound.site.name)) for bound in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
