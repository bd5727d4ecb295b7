"""Prune the model in memory: score every matrix, mask it, and write what a compressor makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from evoprune.fitness.adapters import Prunable, SiteModule
from evoprune.fitness.compressors import (
    AtRunTime,
    Goal,
    Limited,
    at_bits,
    compress,
    compressor_of,
    relative_output_error,
)
from evoprune.fitness.factored import FactoredLinear, refuse_factored
from evoprune.fitness.footprint import footprint
from evoprune.fitness.statistics_reader import ModelStatistics, Replayed, SiteReader
from evoprune.fitness.surgery import put_module
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.interpreter import free_inputs
from evoprune.metrics.mask import check_finite, check_pattern, global_masks, mask, own_rule
from evoprune.metrics.records import GROUPS, Group, MaskRule, Site, parse_pattern, removed_count
from evoprune.metrics.terminals import STATISTICS

# Where nobody says how much goes.
DEFAULT_SPARSITY = 0.5

# What the relative output error of a layer is measured with, the better one first.
OF_ERROR = ("H", "X_ss")


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """What became of one matrix.

    Attributes:
        name: module path.
        shape: (out, in).
        removed: weights that went.
        error: relative output error, 0 = lossless and 1 = the layer deleted, on the inputs that the matrix has in the
            dense model; None without statistics of its inputs.
        path_error: the same on the inputs that it has in the pruned model; None unless it was pruned in replay.
        bits: of each weight that stays; None where no allocation says.
        seconds, peak_bytes: what the compressor took; see `Footprint`. None where none ran.
    """

    name: str
    shape: tuple[int, int]
    removed: int
    error: float | None
    path_error: float | None = None
    bits: int | None = None
    # Two layers of which the same became are equal, however long it took.
    seconds: float | None = field(default=None, compare=False)
    peak_bytes: int | None = field(default=None, compare=False)

    @property
    def weights(self) -> int:
        """How many weights it had."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return self.removed / self.weights


def needed_statistics(criterion: Criterion, compressor: str) -> frozenset[str]:
    """Names of the statistics without which `prune_model` cannot run; often none.

    Raises:
        UnknownName, InvalidInput: no such compressor; see `compressor_of`.
    """
    plugin = compressor_of(compressor)
    return plugin.needs | (criterion.needs & STATISTICS if plugin.reads_criterion else frozenset())


def mask_rule(
    criterion: Criterion, sparsity: float | None, pattern: str | None, group: str | None, compressor: str = "mask"
) -> MaskRule:
    """How many weights go: half unless told otherwise, compared within the criterion's own group.

    A compressor that reads no criterion counts by matrix unless told otherwise.

    Raises:
        InvalidInput: both a sparsity and a pattern, or one that cannot be; no such group, or one that means nothing to
            a compressor that reads no criterion.
        UnknownName: no such compressor.
    """
    if sparsity is not None and pattern is not None:
        raise InvalidInput("give a sparsity or a pattern, not both")
    chosen = next((known for known in GROUPS if known == group), None)
    if group is not None and chosen is None:
        raise InvalidInput(f"no group {group[:80]!r}; the groups are {', '.join(GROUPS)}")
    plugin = compressor_of(compressor)
    chooses = not plugin.reads_criterion
    if chooses and chosen is not None and chosen not in plugin.groups:
        others = "".join(f", or give {known}" for known in GROUPS if known in plugin.groups)
        raise InvalidInput(
            f"compressor {compressor!r} chooses by itself what goes: leave out the group {group!r}{others}"
        )
    if pattern is not None:
        return MaskRule(None, parse_pattern(pattern), "row")
    own: Group = "layer" if chooses else criterion.group
    return MaskRule(DEFAULT_SPARSITY if sparsity is None else sparsity, None, chosen or own)


def check_rule(language_model: Prunable, rule: MaskRule, compressor: str = "mask") -> None:
    """Refuse what the model's widths or the compressor cannot do; worth asking before statistics are collected.

    Raises:
        InvalidInput: M does not divide a width, the compressor refuses a matrix, or it is wrapped already; names the
            matrix.
        UnknownName: no such compressor.
    """
    plugin = compressor_of(compressor)
    if not isinstance(plugin, AtRunTime):
        refuse_factored(language_model.sites)
    for bound in language_model.sites:
        site = bound.site
        if rule.pattern is not None:
            check_pattern(rule.pattern, site.in_features, site.name)
        if isinstance(plugin, Limited):
            try:
                plugin.check(site.out_features, site.in_features, rule.pattern)
            except InvalidInput as error:
                raise InvalidInput(f"cannot compress {site.name}: {error}") from None


@torch.no_grad()
def prune_model(
    language_model: Prunable,
    criterion: Criterion,
    rule: MaskRule,
    *,
    statistics: ModelStatistics | None = None,
    compressor: str = "mask",
    allocation: Allocation | None = None,
    modules: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PrunedLayer, ...]:
    """Replace the weights of every prunable matrix by pruned ones, in place.

    Args:
        language_model: dense, or pruned before: its weights are scored as they are.
        criterion: gives the scores, low = removed first.
        rule: how many weights go, and what their scores are compared within; see `mask_rule`.
        statistics: at least `needed_statistics`; None if those are none. They are asked for matrix by matrix in model
            order, each before it changes, so that they may depend on what became of the blocks before.
        compressor: what happens to the weights that stay; some choose by themselves which go.
        allocation: a sparsity of its own for each matrix, whose rows then lose floor(sparsity * in) weights each;
            `rule` must be the sparsity of its budget, by row. One with bits, which the compressor then has to have, may
            stand beside a pattern, if all its sparsities are that of the pattern.
        modules: let a layer become a `FactoredLinear` where the compressor wraps its sparse core; the sites are then no
            longer bound to the model's layers. Else it gets the product, which has no zeros.
        progress: called with (done, total) in matrices.

    Returns:
        One entry per matrix, in model order.

    Raises:
        InvalidInput: the widths do not fit the pattern, the allocation is of another model, the criterion gives
            scores that cannot become a mask, or the compressor can make nothing of the statistics. The model may then
            be pruned in part: load it again.
    """
    check_rule(language_model, rule, compressor)
    if allocation is not None:
        check_allocation(language_model, allocation, rule)
    return prune_sites(
        language_model,
        language_model.sites,
        criterion,
        rule,
        statistics=statistics,
        compressor=compressor,
        allocation=allocation,
        modules=modules,
        progress=progress,
    )


def prune_sites(
    language_model: Prunable,
    sites: Sequence[SiteModule],
    criterion: Criterion,
    rule: MaskRule,
    *,
    statistics: ModelStatistics | None = None,
    compressor: str = "mask",
    allocation: Allocation | None = None,
    modules: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PrunedLayer, ...]:
    """`prune_model` for some matrices, in model order, once `check_rule` and `check_allocation` have passed.

    Scores that are compared across the whole model are compared across these.
    """
    if compressor_of(compressor).reads_criterion:
        goals = _masks(sites, criterion, rule, statistics, allocation)
    else:
        goals = _counts(sites, rule, allocation)
    return reach(
        language_model,
        goals,
        statistics=statistics,
        compressor=compressor,
        bits={} if allocation is None else allocation.bits_by_name(),
        modules=modules,
        progress=progress,
    )


@torch.no_grad()
def reach(
    language_model: Prunable,
    goals: Iterable[tuple[SiteModule, Goal]],
    *,
    statistics: ModelStatistics | None = None,
    compressor: str = "mask",
    bits: Mapping[str, int] = MappingProxyType({}),
    modules: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PrunedLayer, ...]:
    """Replace the weights of every prunable matrix by those that meet its goal, in place.

    Args:
        language_model: its weights are compressed as they are.
        goals: what has to go from each matrix, in model order; the next is asked for when the last is met.
        bits: of each weight that stays, by site name; a matrix without is compressed as `compressor` says.
        statistics, compressor, modules, progress: as of `prune_model`.

    Returns:
        One entry per matrix, in model order.

    Raises:
        InvalidInput: a matrix is wrapped already, or the compressor can make nothing of the statistics. The model may
            then be pruned in part.
    """
    layers, plugin = [], compressor_of(compressor)
    spelled = {own: at_bits(compressor, own) for own in set(bits.values())}
    refuse_factored(language_model.sites)
    for bound, goal in goals:
        site, weight = bound.site, bound.weight()
        names = set(plugin.needs)
        if statistics is not None:
            names.update([name for name in OF_ERROR if name in statistics.names][:1])
        given = {} if statistics is None else statistics.site_statistics(site.name, names, weight.device)
        before = weight.float().clone() if isinstance(statistics, Replayed) else None
        try:
            with footprint(weight.device) as took:
                result = compress(spelled.get(bits.get(site.name, 0), compressor), weight, goal, given)
        except (InvalidCandidate, InvalidInput) as error:
            raise InvalidInput(f"cannot compress {site.name}: {error}") from None
        removed = goal.removed
        if result.factors is None:
            weight.copy_(result.weight)
        elif modules:
            put_module(language_model.model, site.name, FactoredLinear.of(bound, result.factors))
        else:
            weight.copy_(result.weight)
            removed = int((result.weight == 0).sum())
        if goal.removed == site.weights and (bias := bound.bias()) is not None:
            bias.zero_()
        lost, on_path = result.error, None
        if isinstance(statistics, Replayed) and before is not None:
            dense = statistics.dense_inputs(site.name, weight.device)
            on_path, lost = (
                lost,
                relative_output_error(
                    before, result.weight.float(), gram=dense.get("H"), input_squares=dense.get("X_ss")
                ),
            )
        layers.append(
            PrunedLayer(
                name=site.name,
                shape=(site.out_features, site.in_features),
                removed=removed,
                error=lost,
                path_error=on_path,
                bits=bits.get(site.name),
                seconds=took.seconds,
                peak_bytes=took.peak_bytes,
            )
        )
        progress(len(layers), len(language_model.sites))
    return tuple(layers)


def pruned_before(language_model: Prunable, errors: Mapping[str, float]) -> tuple[PrunedLayer, ...]:
    """What of every prunable matrix is zero as it is.

    Args:
        language_model: dense, or pruned before.
        errors: relative output error by site name; None for those without.
    """
    return tuple(
        PrunedLayer(
            bound.site.name,
            (bound.site.out_features, bound.site.in_features),
            int((bound.weight() == 0).sum()),
            errors.get(bound.site.name),
        )
        for bound in language_model.sites
    )


def check_allocation(language_model: Prunable, allocation: Allocation, rule: MaskRule | None = None) -> None:
    """Refuse an allocation of another model, one that does not meet its own budget, or one that `rule` contradicts.

    Raises:
        InvalidInput: names the first matrix that differs, or both sums.
    """
    if rule is not None and rule.pattern is not None:
        _check_beside_pattern(allocation, rule)
    elif rule is not None and rule != MaskRule(allocation.sparsity):
        raise InvalidInput(f"the rule of an allocation is {allocation.sparsity:g} by row, not {rule} by {rule.group}")
    allocation.check_budget()
    allocation.check(type(language_model.model).__name__, [bound.site for bound in language_model.sites])


def _check_beside_pattern(allocation: Allocation, rule: MaskRule) -> None:
    """Refuse an allocation that says something else than a pattern, or nothing beside it.

    Raises:
        InvalidInput: it has no bits, or other sparsities than the pattern's.
    """
    if allocation.bits is None:
        raise InvalidInput("a pattern fixes the sparsity of every row: give an allocation or a pattern, not both")
    if odd := [site for site in allocation.sites if site.removed != round(site.weights * rule.fraction)]:
        raise InvalidInput(
            f"the allocation's bits are for a sparsity of {odd[0].sparsity:g} of {odd[0].name}, not for {rule}: leave "
            "out the pattern, or find bits for it"
        )


def row_goal(site: Site, rule: MaskRule, scores: Tensor | None) -> Goal:
    """What one matrix loses by rows or in a pattern, as in `prune_model` with an allocation or a pattern.

    Args:
        scores: [out, in] float32, low = removed first; None if a compressor chooses.
    """
    if scores is not None:
        return Goal.of_mask(mask(scores, rule), rule.pattern)
    return Goal(_count(site, rule), rule.pattern, group="row" if rule.pattern is not None else "layer")


def _masks(
    sites: Sequence[SiteModule],
    criterion: Criterion,
    rule: MaskRule,
    statistics: ModelStatistics | None,
    allocation: Allocation | None,
) -> Iterator[tuple[SiteModule, Goal]]:
    """What a criterion removes from every matrix, one at a time unless scores are compared across all of them."""
    if rule.group == "global" and rule.sparsity is not None:
        scores = [site_scores(bound, criterion, rule, statistics) for bound in sites]
        for bound, keep in zip(sites, global_masks(scores, rule.sparsity), strict=True):
            yield bound, Goal.of_mask(keep)
        return
    own = {} if allocation is None or rule.pattern is not None else allocation.by_name()
    for bound in sites:
        of_site = own_rule(rule, own, bound.site.name)
        if of_site is None:
            yield bound, Goal.of_mask(torch.zeros_like(bound.weight(), dtype=torch.bool))
            continue
        # Scores are those of the budget whatever a matrix loses: a search over levels ranks every weight once.
        keep = mask(site_scores(bound, criterion, rule, statistics), of_site)
        yield bound, Goal.of_mask(keep, of_site.pattern)


def _counts(
    sites: Sequence[SiteModule], rule: MaskRule, allocation: Allocation | None
) -> Iterator[tuple[SiteModule, Goal]]:
    """How much goes of every matrix where a compressor chooses what."""
    pattern = rule.pattern is not None
    own = {} if allocation is None or pattern else {site.name: site.removed for site in allocation.sites}
    for bound in sites:
        site = bound.site
        if own:
            yield bound, Goal(own[site.name])
        else:
            yield bound, Goal(_count(site, rule), rule.pattern, group="row" if rule.group == "row" else "layer")


def _count(site: Site, rule: MaskRule) -> int:
    if rule.pattern is not None:
        n, m = rule.pattern
        return site.weights // m * (m - n)
    assert rule.sparsity is not None
    if rule.group == "row":
        return site.out_features * removed_count(rule.sparsity, site.in_features)
    return removed_count(rule.sparsity, site.weights)


def site_scores(bound: SiteModule, criterion: Criterion, rule: MaskRule, statistics: SiteReader | None) -> Tensor:
    """Scores of one matrix by a criterion.

    Args:
        bound: the matrix, with its weights as they are.
        criterion: gives the scores.
        rule: its nominal fraction is the terminal ``sparsity`` of the criterion.
        statistics: at least those that the criterion needs; None if it needs none.

    Returns:
        [out, in] float32, all finite.

    Raises:
        InvalidInput: the criterion cannot score this matrix.
    """
    site, weight = bound.site, bound.weight()
    inputs = free_inputs(site, weight, rule.fraction)
    if statistics is not None:
        inputs |= statistics.site_statistics(site.name, criterion.needs, weight.device)
    try:
        scores = criterion.score(site, inputs)
        if scores.shape != weight.shape:
            raise InvalidCandidate("TYPE", f"scores of shape {list(scores.shape)} for weights {list(weight.shape)}")
        check_finite(scores)
    except InvalidCandidate as error:
        raise InvalidInput(f"this metric cannot prune {site.name}: {error}") from None
    return scores
