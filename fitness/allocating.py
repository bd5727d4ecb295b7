"""Run an allocator on a model: give it the evidence that it asks for, and repair what it requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import Prunable, SiteModule
from evoprune.fitness.allocators import Allocator, Level, Use, check_numbers
from evoprune.fitness.canonical_correlation import part_correlations
from evoprune.fitness.component_budgets import guarded, search_budgets
from evoprune.fitness.compressors import at_bits, compress, compressor_of
from evoprune.fitness.diversity import DiversityMean
from evoprune.fitness.evaluation import evaluate_language_model
from evoprune.fitness.hidden_states import block_influence, without_block
from evoprune.fitness.input_noise import noise_sizes
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import row_goal, site_scores
from evoprune.fitness.samples import Batch, Sequences, forward_batches
from evoprune.fitness.site_statistics import SiteStatistics, measure_sites
from evoprune.fitness.statistics import Statistics
from evoprune.metrics.allocation import Allocation, SiteSparsity, allocation_of, repair
from evoprune.metrics.allocation_formula import AllocationFormula
from evoprune.metrics.allocation_groups import rest_sparsity, site_groups
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import EvopruneError, InvalidCandidate, InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.parameters import parameters_of
from evoprune.metrics.records import LANGUAGE, MaskRule, Site, removed_count
from evoprune.metrics.terminals import STATISTICS

# The loss of a model that gives no finite numbers: worse than any other.
_LOST = float("inf")
Measured = TypeVar("Measured")


class Reader(Protocol):
    """What says what it reads: an `Allocator`, or the `Reading` of a formula."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def uses(self) -> frozenset[Use]: ...


def statistics_needed(reader: Reader, criterion: Criterion) -> frozenset[str]:
    """Names of the statistics without which `allocate_model` or `allocate_by_formula` cannot run; often none."""
    inside = criterion.needs & STATISTICS if "scores" in reader.uses else frozenset()
    return reader.needs | inside


@torch.no_grad()
def allocate_model(
    language_model: Prunable,
    name: str,
    allocator: Allocator,
    target: float | None,
    *,
    criterion: Criterion,
    statistics: Statistics | None = None,
    calibration: Sequences | None = None,
    search: Sequences | None = None,
    loss: Callable[[], float] | None = None,
    budgets: Mapping[str, float] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Allocation:
    """What an allocator makes of a model, repaired to the budget.

    Args:
        language_model: dense; where losses are measured it is pruned in place and put back.
        name: the allocator's, for the record.
        allocator: as `evoprune.fitness.allocators.configured` gives it.
        target: fraction of all prunable weights that goes, in [0, 1); None leaves matrices outside of `budgets` dense.
        criterion: whose scores are the ones inside, and prune where losses are measured.
        statistics: at least `statistics_needed`; None if those are none.
        calibration: [n, window] int64 of text A, or samples; None if the allocator has none of the uses `READ_A`.
        search: the same of text B; None if it has none of the uses `READ_B`.
        loss: measures the model as it is, in place of a loss on `search`; low is good. For models that write no text.
        budgets: see `evoprune.metrics.allocation_groups.site_groups`. The allocator is run on each group by itself, as
            if there were no other, and on the rest with what the target leaves it.
        progress: told what runs and how far it is.

    Raises:
        InvalidInput: a parameter does not fit this model, scores are not finite, a budget cannot be reached, or neither
            a target nor a budget is given.
    """
    sites = [bound.site for bound in language_model.sites]
    model, parameters = type(language_model.model).__name__, parameters_of(allocator)

    def requested(fraction: float, chosen: Sequence[int] | None) -> Sequence[float]:
        evidence = ModelEvidence(
            language_model, fraction, criterion, statistics, calibration, search, progress, chosen=chosen, loss=loss
        )
        return allocator.request(evidence)

    if not budgets:
        if target is None:
            raise InvalidInput("there is no budget: give a sparsity, or budgets of groups")
        return allocation_of(requested(target, None), sites, target, model=model, allocator=name, parameters=parameters)
    groups, rest = site_groups(sites, budgets)
    found = [0.0] * len(sites)

    def fill(fraction: float, chosen: Sequence[int]) -> None:
        inside = [sites[index] for index in chosen]
        if fraction:
            for index, share in zip(chosen, repair(requested(fraction, chosen), inside, fraction), strict=True):
                found[index] = share

    def removed() -> int:
        counts = zip(sites, found, strict=True)
        return sum(site.out_features * removed_count(share, site.in_features) for site, share in counts)

    for group in groups:
        fill(group.sparsity, group.indices)
    if target is not None:
        fill(rest_sparsity(sites, rest, removed(), target), rest)
    whole = removed() / sum(site.weights for site in sites) if target is None else target
    return Allocation(
        model=model,
        sparsity=whole,
        sites=tuple(
            SiteSparsity(site.name, (site.out_features, site.in_features), share)
            for site, share in zip(sites, found, strict=True)
        ),
        allocator=name,
        parameters={**parameters, "budgets": dict(budgets)},
    )


@torch.no_grad()
def ask_allocator(
    language_model: Prunable,
    allocator: Allocator,
    target: float,
    *,
    criterion: Criterion,
    statistics: Statistics | None = None,
    calibration: Sequences | None = None,
    search: Sequences | None = None,
) -> list[float]:
    """What an allocator asks for before any repair, which makes near requests equal. Arguments as in `allocate_model`.

    Returns:
        One number per site, in model order; may lie outside [0, 1) and miss the budget.

    Raises:
        InvalidInput: a parameter does not fit this model, or scores or requests are not finite.
    """
    evidence = ModelEvidence(
        language_model, target, criterion, statistics, calibration, search, lambda what, done, total: None
    )
    requested = [*allocator.request(evidence)]
    check_numbers("the sparsity", evidence.sites, [[at] for at in range(len(requested))], requested)
    return requested


@torch.no_grad()
def searched_budgets(
    language_model: Prunable,
    name: str,
    allocator: Allocator,
    target: float,
    *,
    criterion: Criterion,
    statistics: Statistics | None = None,
    calibration: Sequences | None = None,
    search: Sequences | None = None,
    loss: Callable[[], float] | None = None,
    losses: Callable[[], Mapping[str, float]] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, float]:
    """Budgets of the components that give the lowest loss with this allocator inside each; see `search_budgets`.

    Arguments as in `allocate_model`, and `losses`, which measures each component by itself in place of `loss`: then no
    component may fall off a cliff, see `guarded`.

    Raises:
        InvalidInput: as `allocate_model`, or the model has one component only.
    """
    sites = [bound.site for bound in language_model.sites]
    evidence = ModelEvidence(language_model, target, criterion, statistics, calibration, search, progress, loss=loss)

    def measured(budgets: Mapping[str, float], measure: Callable[[], Measured]) -> Measured:
        found = allocate_model(
            language_model,
            name,
            allocator,
            None,
            criterion=criterion,
            statistics=statistics,
            calibration=calibration,
            search=search,
            loss=loss,
            budgets=budgets,
        )
        return evidence.measured_at([site.sparsity for site in found.sites], measure)

    def loss_of(budgets: Mapping[str, float]) -> float:
        return measured(budgets, evidence.loss)

    chosen = loss_of if losses is None else guarded(lambda budgets: measured(budgets, losses))
    return search_budgets(sites, target, chosen, lambda tried: progress("trying budgets of components", tried, 0))


@torch.no_grad()
def describe_model(
    language_model: Prunable,
    terminals: Iterable[str],
    target: float,
    *,
    criterion: Criterion,
    statistics: Statistics | None = None,
    calibration: Sequences | None = None,
    search: Sequences | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> SiteStatistics:
    """Terminals of allocation formulas, measured on a model; see `measure_sites`. Arguments as in `allocate_model`."""
    evidence = ModelEvidence(language_model, target, criterion, statistics, calibration, search, progress)
    return measure_sites(evidence, terminals)


def allocate_by_formula(
    language_model: Prunable, formula: AllocationFormula, target: float, *, criterion: Criterion, **given: Any
) -> Allocation:
    """What a formula makes of a model: its terminals are measured here, wherever it was found.

    Arguments as in `allocate_model`. Levels are multiples of 1/256 of a row, as in searches, and meet the budget to
    half of the smallest step; so the model that a formula was searched on gets the allocation that was measured.

    Raises:
        InvalidInput: a terminal that it reads is no finite number here, or the budget cannot be met.
    """
    found = describe_model(language_model, formula.reads, target, criterion=criterion, **given)
    for name, fault in found.faults.items():
        raise InvalidInput(f"the formula reads {name}, which this model does not have: {fault}")
    sites = [bound.site for bound in language_model.sites]
    sparsities = formula.sparsities(found.values, sites, target)
    return Allocation(
        model=type(language_model.model).__name__,
        sparsity=target,
        sites=tuple(
            SiteSparsity(site.name, (site.out_features, site.in_features), share)
            for site, share in zip(sites, sparsities, strict=True)
        ),
        allocator="formula",
        parameters={"expression": formula.expression.text, "spread": formula.spread},
    )


class ModelEvidence:
    """`Evidence` of a live model; arguments as in `allocate_model`.

    With `chosen`, indices into its sites, there are no other matrices and their blocks are numbered from 0. A
    `compressor`, spelled without bits, and its `pattern` are what `compressed` goes by.
    """

    def __init__(
        self,
        language_model: Prunable,
        target: float,
        criterion: Criterion,
        statistics: Statistics | None,
        calibration: Sequences | None,
        search: Sequences | None,
        progress: Callable[[str, int, int], None],
        *,
        chosen: Sequence[int] | None = None,
        loss: Callable[[], float] | None = None,
        compressor: str | None = None,
        pattern: tuple[int, int] | None = None,
    ) -> None:
        self._loss = loss
        self._compressor, self._pattern = compressor, pattern
        every = range(len(language_model.sites)) if chosen is None else chosen
        bounds = [language_model.sites[index] for index in every]
        n_blocks = bounds[0].site.n_blocks
        self._blocks = list(range(n_blocks)) if chosen is None else sorted({bound.site.block for bound in bounds})
        place = {block: index for index, block in enumerate(self._blocks)}
        self.sites = tuple(
            replace(bound.site, block=place[bound.site.block], n_blocks=len(self._blocks)) for bound in bounds
        )
        self.target = target
        self._language_model = language_model
        self._criterion = criterion
        self._statistics = statistics
        self._calibration = calibration
        self._search = search
        self._progress = progress
        self._bound = {bound.site.name: bound for bound in bounds}

    def weight(self, site: Site) -> Tensor:
        return self._bound[site.name].weight().to(torch.float32, copy=True)

    def scores(self, site: Site) -> Tensor:
        return site_scores(self._bound[site.name], self._criterion, MaskRule(self.target), self._statistics)

    def statistic(self, site: Site, name: str) -> Tensor:
        if self._statistics is None:
            raise EvopruneError(f"the allocator reads {name}, which is not among its needs")
        return self._statistics.tensor(site.name, name, self._bound[site.name].weight().device)

    def diversity(self, pairs: str, modalities: bool = True) -> Sequence[float]:
        language_model = self._reader()
        calibration = self._given(self._calibration, "outputs")
        listener = _Listener({site.name: DiversityMean(pairs) for site in self.sites}, modalities)
        body = getattr(language_model.model, "base_model", language_model.model)
        done, total = 0, len(calibration)
        with listener.listening(language_model.sites):
            for batch in forward_batches(calibration, 1, language_model.device):
                listener.batch = batch
                body(**batch.inputs, use_cache=False)
                done += batch.rows
                self._progress("measuring how unlike outputs are", done, total)
        return [listener.means[site.name].result() for site in self.sites]

    def influence(self) -> Sequence[float]:
        found = block_influence(self._reader(), self._given(self._calibration, "hidden"))
        return [found[block] for block in self._blocks]

    def losses(self, requests: Sequence[Sequence[float]]) -> Sequence[float]:
        found: list[float] = []
        for requested in requests:
            found.append(self.loss_at(repair(requested, self.sites, self.target)))
            self._progress("comparing losses", len(found), len(requests))
        return found

    def loss_at(self, sparsities: Sequence[float]) -> float:
        """The loss of the model pruned by the criterion, each matrix to its own sparsity."""
        return self.measured_at(sparsities, self.loss)

    def measured_at(self, sparsities: Sequence[float], measure: Callable[[], Measured]) -> Measured:
        """What `measure` gives while the model is pruned by the criterion, each matrix to its own sparsity."""
        with self._pruned(sparsities):
            return measure()

    def losses_without(self) -> Sequence[float]:
        found: list[float] = []
        for block in self._blocks:
            with without_block(self._reader(), block):
                found.append(self.loss())
            self._progress("measuring the loss without each block", len(found), len(self._blocks))
        return found

    @cached_property
    def _dense_loss(self) -> float:
        return self.loss()

    def dense_loss(self) -> float:
        return self._dense_loss

    def losses_with(self, replaced: Iterable[tuple[Site, Tensor]]) -> Sequence[float]:
        found: list[float] = []
        for site, new in replaced:
            weight = self._bound[site.name].weight()
            dense = weight.clone()
            try:
                weight.copy_(new)
                found.append(self.loss())
            finally:
                weight.copy_(dense)
            self._progress("measuring the loss with one matrix changed", len(found), 0)
        return found

    def correlations(self, between: str, tokens: int, ridge: float, top: int) -> Sequence[float]:
        language_model, text = self._reader(), self._given(self._calibration, "outputs")
        found: dict[str, float] = {}
        for done, block in enumerate(self._blocks):
            bounds = [self._bound[site.name] for site in self.sites if site.block == done]
            if between == "block":
                parts = {"block": language_model.blocks()[block][1]}
            else:
                parts = {bound.site.name: bound.module for bound in bounds}
            padded = bounds[0].site.component == LANGUAGE
            own = part_correlations(language_model, parts, text, tokens=tokens, ridge=ridge, top=top, padded=padded)
            found |= {bound.site.name: own.get(bound.site.name, own.get("block", 0.0)) for bound in bounds}
            self._progress("correlating inputs and outputs", done + 1, len(self._blocks))
        return [found[site.name] for site in self.sites]

    def input_noise(self) -> Sequence[float]:
        self._progress("measuring gradients of inputs", 0, 1)
        bounds = [self._bound[site.name] for site in self.sites]
        return noise_sizes(self._reader(), bounds, self._given(self._calibration, "gradients"))

    def compressed(self, site: Site, levels: Sequence[Level]) -> Iterator[tuple[Tensor, float]]:
        if self._compressor is None:
            raise EvopruneError("no compressor was named whose levels could be compared")
        bound = self._bound[site.name]
        plugin, weight = compressor_of(self._compressor), bound.weight()
        names = plugin.needs | {"H"}
        given = {} if self._statistics is None else self._statistics.site_statistics(site.name, names, weight.device)
        scores = self.scores(site) if plugin.reads_criterion else None
        for level in levels:
            rule = MaskRule(level.sparsity) if self._pattern is None else MaskRule(None, self._pattern)
            try:
                made = compress(at_bits(self._compressor, level.bits), weight, row_goal(site, rule, scores), given)
            except (InvalidCandidate, InvalidInput) as error:
                raise InvalidInput(f"cannot compress {site.name}: {error}") from None
            yield made.weight.float(), made.error or 0.0
        self._progress("comparing levels of matrices", self.sites.index(site) + 1, len(self.sites))

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

    def loss(self) -> float:
        """The loss of the model as it is."""
        try:
            if self._loss is not None:
                loss = self._loss()
                return loss if math.isfinite(loss) else _LOST
            windows, language_model = self._given(self._search, "loss"), self._reader()
            return evaluate_language_model(language_model.model, windows).loss
        except InvalidCandidate:
            return _LOST

    def _reader(self) -> LanguageModel:
        if not isinstance(self._language_model, LanguageModel):
            raise InvalidInput(
                "this allocator runs a language model on text: for a pipeline give one that reads weights or scores "
                "alone, such as uniform, erk or owl"
            )
        return self._language_model

    def _given(self, windows: Sequences | None, use: str) -> Sequences:
        if windows is None:
            raise EvopruneError(f"the allocator reads {use}, which is not among its uses")
        return windows


class _Listener:
    """Adds the outputs of matrices to their means in every forward pass.

    Attributes:
        means: by name of the site.
        batch: what the present forward pass was given.
    """

    def __init__(self, means: dict[str, DiversityMean], modalities: bool) -> None:
        self.means = means
        self.batch: Batch | None = None
        self._modalities = modalities

    @contextmanager
    def listening(self, sites: Sequence[SiteModule]) -> Iterator[None]:
        """Inside, it hears the matrices that it has means of."""
        heard = [bound for bound in sites if bound.site.name in self.means]
        handles = [bound.module.register_forward_hook(partial(self._hear, bound.site)) for bound in heard]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, site: Site, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if site.component != LANGUAGE:
            # A tower sees one modality, and one image a row where it keeps images apart.
            self.means[site.name].add(output if output.dim() == 3 else output[None])
            return
        assert self.batch is not None
        for tokens, modality in self.batch.by_row(output):
            self.means[site.name].add_sample(tokens, modality if self._modalities else None)
