"""Metrics as importances of Torch-Pruning, which removes whole channels of any network that it can trace.

Source: the interface `Importance` of version 1.6, `torch_pruning/pruner/importance.py`; Fang et al. 2023 (DepGraph),
arXiv:2301.12900.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import Prunable
from evoprune.fitness.pruning import DEFAULT_SPARSITY
from evoprune.fitness.statistics_reader import SiteReader
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.interpreter import free_inputs
from evoprune.metrics.mask import check_finite
from evoprune.metrics.records import Site
from evoprune.metrics.terminals import STATISTICS

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class MetricImportance:
    """What a channel is worth: the scores of all weights that go with it, added up.

    A channel's weights are a row of each linear layer or convolution that makes it and a column of each that reads it.
    Convolutions are matrices of as many columns as a filter has weights. Other layers, such as norms, grouped and
    transposed convolutions, count for nothing. Give it to a pruner of Torch-Pruning in place of one of its own.

    Args:
        metric: a name of the criteria, an expression, an exported ``.json`` or ``.py``, or a criterion.
        model: says which site a layer is, for statistics and depth; None if the metric reads neither.
        statistics: of the inputs of these sites, at least those that the metric needs.
        sparsity: what the terminal ``sparsity`` is, in [0, 1).

    Raises:
        InvalidInput: Torch-Pruning is not installed, there is no such metric, or it needs statistics that nobody gives.
    """

    def __init__(
        self,
        metric: str | Criterion,
        model: Prunable | None = None,
        statistics: SiteReader | None = None,
        *,
        sparsity: float = DEFAULT_SPARSITY,
    ) -> None:
        try:
            functions: Any = import_module("torch_pruning")
        except ImportError:
            raise InvalidInput("importances need Torch-Pruning: pip install 'evoprune[torch-pruning]'") from None
        self._rows = (functions.prune_linear_out_channels, functions.prune_conv_out_channels)
        self._columns = (functions.prune_linear_in_channels, functions.prune_conv_in_channels)
        self._criterion = load_metric(metric) if isinstance(metric, str) else metric
        self._sites = {} if model is None else {bound.module: bound.site for bound in model.sites}
        self._needs = self._criterion.needs & STATISTICS
        self._statistics, self._sparsity = statistics, sparsity
        if self._needs and (statistics is None or not self._sites):
            raise InvalidInput(
                f"this metric reads {min(self._needs)}: give the model and its statistics, as `collect_statistics` "
                "returns them, or a metric of weights alone"
            )

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Scores of the channels of a group, low = removed first.

        Args:
            group: of `torch_pruning.DependencyGraph`.

        Returns:
            [channels] float32, on the device of its first layer; None if no layer of the group has scores.

        Raises:
            InvalidInput: the metric cannot score a layer, or its statistics are of more inputs than are left.
        """
        total: Tensor | None = None
        # Its layers name channels by their index in the first, of which a group may hold some only.
        places = {channel: place for place, channel in enumerate(group[0].root_idxs)}
        for (dependency, indices), item in zip(group, group.items, strict=True):
            layer, function = dependency.layer, dependency.pruning_fn
            by_rows = function in self._rows
            if not (by_rows or function in self._columns) or not _has_matrix(layer):
                continue
            scores = self._scores(layer)
            filters = scores.view(layer.weight.shape[0], layer.weight.shape[1], -1)
            worth = filters.sum((1, 2) if by_rows else (0, 2))[torch.as_tensor(indices, device=scores.device)]
            if any(root is None for root in item.root_idxs):
                continue
            if total is None:
                total = worth.new_zeros(len(places))
            at = torch.tensor([places[root] for root in item.root_idxs], device=total.device)
            total.index_add_(0, at, worth.to(total.device))
        return total

    def _scores(self, layer: nn.Module) -> Tensor:
        """[out, in] float32; the columns of a convolution are those of its flattened filters."""
        weight = layer.get_parameter("weight").detach().flatten(1)
        known = self._sites.get(layer)
        site = known or Site(type(layer).__name__, type(layer).__name__, 0, 1, *weight.shape)
        inputs = free_inputs(site, weight, self._sparsity)
        if self._needs:
            if known is None or self._statistics is None:
                raise InvalidInput(f"there are no statistics of a {site.name}: leave it out by `ignored_layers`")
            if tuple(weight.shape) != (known.out_features, known.in_features):
                raise InvalidInput(
                    f"{known.name} is now {weight.shape[0]} × {weight.shape[1]}, and its statistics are from before: "
                    "prune in one step, or give new ones"
                )
            inputs |= self._statistics.site_statistics(known.name, self._needs, weight.device)
        try:
            scores = self._criterion.score(site, inputs)
            check_finite(scores)
        except InvalidCandidate as error:
            raise InvalidInput(f"this metric cannot score {site.name}: {error}") from None
        return scores


def _has_matrix(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, _CONVOLUTIONS) and layer.groups == 1)
