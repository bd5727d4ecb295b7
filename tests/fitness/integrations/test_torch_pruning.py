"""Importances against Torch-Pruning's own, against units scored here, and by hand."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evoprune.fitness.integrations.torch_pruning import MetricImportance
from evoprune.fitness.statistics import Statistics, collect_statistics
from evoprune.fitness.unit_criteria import coupled_sums, weight
from evoprune.fitness.units import find_units
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import MetricExport
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.interpreter import free_inputs
from tests.models import HIDDEN, INNER, random_windows, tiny_language_model

tp = pytest.importorskip("torch_pruning")

SQUARES = "sqr(W)"


class Network(nn.Module):
    """Convolutions whose channels meet in a sum, a norm, and a linear layer that reads flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6 * 16, 5)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        result: Tensor = self.head((first + self.norm(self.second(first))).flatten(1))
        return result


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def group_of(network: Network, channels: list[int]) -> Any:
    graph = tp.DependencyGraph().build_dependency(network, example_inputs=torch.randn(1, 3, 4, 4))
    return graph.get_pruning_group(network.first, tp.prune_conv_out_channels, idxs=channels)


def test_of_squares_it_is_their_own_magnitude(network: Network) -> None:
    group = group_of(network, list(range(6)))
    theirs = tp.importance.GroupMagnitudeImportance(
        p=2, group_reduction="sum", normalizer=None, target_types=[nn.Conv2d, nn.Linear]
    )
    ours = MetricImportance(SQUARES)(group)
    assert ours is not None and ours.shape == (6,)
    torch.testing.assert_close(ours, theirs(group))
    some = MetricImportance(SQUARES)(group_of(network, [4, 1]))
    torch.testing.assert_close(some, ours[[4, 1]])


def test_by_hand(network: Network) -> None:
    found = MetricImportance(SQUARES)(group_of(network, [3]))
    flat = network.head.weight.detach().view(5, 6, 16)
    # A row of both convolutions, a column of the second, and what the head reads of the maps.
    expected = sum(
        part.detach().square().sum()
        for part in (network.first.weight[3], network.second.weight[3], network.second.weight[:, 3], flat[:, 3])
    )
    assert found is not None
    torch.testing.assert_close(found, torch.as_tensor(expected)[None])


def test_their_pruner_takes_it(network: Network, tmp_path: Path) -> None:
    MetricExport(Metric.from_text("mul(abs(W),abs(W))")).write(tmp_path / "metric.json")
    pruner = tp.pruner.BasePruner(
        network,
        torch.randn(1, 3, 4, 4),
        importance=MetricImportance(str(tmp_path / "metric.json")),
        pruning_ratio=0.5,
        ignored_layers=[network.head],
    )
    least = MetricImportance(SQUARES)(group_of(network, list(range(6))))
    assert least is not None
    kept = sorted(least.argsort()[3:].tolist())
    before = deepcopy(network)
    pruner.step()
    assert torch.equal(network.first.weight, before.first.weight[kept])
    assert torch.equal(network.second.weight, before.second.weight[kept][:, kept])
    assert network(torch.randn(2, 3, 4, 4)).shape == (2, 5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Statistics]:
    language_model = tiny_language_model()
    folder = tmp_path_factory.mktemp("statistics") / "set"
    return language_model, collect_statistics(language_model, random_windows(), {"X_l2"}, folder=folder)


def neurons_of(mlp: nn.Module) -> Any:
    graph = tp.DependencyGraph().build_dependency(mlp, example_inputs=torch.randn(1, 4, HIDDEN))
    return graph.get_pruning_group(mlp.gate_proj, tp.prune_linear_out_channels, idxs=list(range(INNER)))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria"])
def test_neurons_are_worth_what_units_are_here(name: str, llama: tuple[Any, Statistics]) -> None:
    """Scores of whole matrices with statistics of their inputs, summed over units as structure searches do."""
    language_model, statistics = llama
    criterion = CRITERIA[name]

    def scores(bound: Any) -> Tensor:
        inputs = free_inputs(bound.site, weight(bound), 0.5)
        inputs |= statistics.site_statistics(bound.site.name, criterion.needs)
        return criterion.score(bound.site, inputs)

    units = find_units(language_model)
    importance = MetricImportance(name, language_model, statistics)
    for index, block in enumerate(units):
        expected = coupled_sums(block, lambda bound: scores(bound).sum(1), lambda bound: scores(bound).sum(0)).neurons
        mlp = language_model.model.model.layers[index].mlp.requires_grad_(True)
        found = importance(neurons_of(mlp))
        mlp.requires_grad_(False)
        assert found is not None
        torch.testing.assert_close(found, expected)


def test_what_it_cannot_do(llama: tuple[Any, Statistics], network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model, statistics = llama
    with pytest.raises(InvalidInput, match="this metric reads X_l2: give the model and its statistics"):
        MetricImportance("wanda", language_model)
    with pytest.raises(InvalidInput, match="no criterion 'wnada'; did you mean 'wanda'"):
        MetricImportance("wnada")
    with pytest.raises(InvalidInput, match="there are no statistics of a Conv2d: leave it out"):
        MetricImportance("wanda", language_model, statistics)(group_of(network, [0]))
    other = tiny_language_model()
    mlp = other.model.model.layers[0].mlp.requires_grad_(True)
    neurons_of(mlp).prune(list(range(4)))
    graph = tp.DependencyGraph().build_dependency(mlp, example_inputs=torch.randn(1, 4, HIDDEN))
    group = graph.get_pruning_group(mlp.gate_proj, tp.prune_linear_out_channels, idxs=[0])
    with pytest.raises(InvalidInput, match=r"gate_proj is now 44 × 32, and its statistics are from before"):
        MetricImportance("wanda", other, statistics)(group)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InvalidInput, match=r"pip install 'evoprune\[torch-pruning\]'"):
        MetricImportance("magnitude")
