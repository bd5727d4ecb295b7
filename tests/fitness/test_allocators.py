"""What every allocator must hold to, on models and on evidence that is made up, and their parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from evoprune.fitness.allocating import allocate_model, statistics_needed
from evoprune.fitness.allocators import ALLOCATORS, Allocator, configured
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.statistics import Statistics, collect_statistics
from evoprune.metrics.allocation import Allocation, repair
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.parameters import parameters_of
from evoprune.metrics.records import Site, removed_count
from tests.fitness.planted_evidence import SHAPES, TEXT_A, TEXT_B, Planted, mean_sparsity
from tests.models import tiny_language_model

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("llama", "qwen3", "gpt2", "opt")


@dataclass(frozen=True)
class Measured:
    model: LanguageModel
    statistics: Statistics

    def allocate(self, name: str, target: float, **parameters: object) -> Allocation:
        return allocate_model(
            self.model,
            name,
            configured(name, parameters),
            target,
            criterion=CRITERIA["wanda"],
            statistics=self.statistics,
            calibration=TEXT_A,
            search=TEXT_B,
        )


@pytest.fixture(scope="module", params=FAMILIES)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    model = tiny_language_model(request.param)
    folder = tmp_path_factory.mktemp("statistics") / "set"
    return Measured(model, collect_statistics(model, TEXT_A, ["X_l2", "H", "G_mean"], folder=folder))


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
def test_contract(name: str, measured: Measured) -> None:
    """On a model of each family: within bounds, on budget, the same again, and the model unchanged."""
    few: Mapping[str, object] = {"atp": {"evaluations": 3}, "pmpq": {"points": 1}}.get(name, {})
    before = [bound.weight().clone() for bound in measured.model.sites]
    assert statistics_needed(ALLOCATORS[name], CRITERIA["wanda"]) <= measured.statistics.names
    sites = [bound.site for bound in measured.model.sites]
    smallest = min(site.out_features for site in sites)
    for target in (0.3, 0.6):
        allocation = measured.allocate(name, target, **few)
        assert [site.name for site in allocation.sites] == [site.name for site in sites]
        assert all(0 <= site.sparsity <= 1 - 1 / site.shape[1] + 1e-6 for site in allocation.sites)
        assert abs(allocation.removed - removed_count(target, allocation.weights)) < smallest
        assert allocation.sparsity == target
        assert allocation.allocator == name
        assert allocation.parameters == parameters_of(configured(name, few))
        assert measured.allocate(name, target, **few) == allocation
    assert measured.allocate(name, 0.0).removed == 0
    for bound, weight in zip(measured.model.sites, before, strict=True):
        assert torch.equal(bound.weight(), weight)


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"erk+"}))
def test_the_order_of_the_matrices_does_not_matter(name: str) -> None:
    """All but erk+, which exempts the last one. Ties aside: no two matrices here are alike."""
    plain = Planted(seed=1)
    order = [index for block in (2, 0, 3, 1) for index in (3 * block + 1, 3 * block, 3 * block + 2)]
    shuffled = Planted(seed=1, order=order)
    allocator = ALLOCATORS[name]
    expected = allocator.request(plain)
    if name == "alpha-pruning" or "loss" in allocator.uses or "hidden" in allocator.uses:
        assert mean_sparsity(plain.sites, expected) == pytest.approx(0.5, abs=0.02)
    # One unit may go to another of equal matrices where whole weights are counted.
    found = allocator.request(shuffled)
    assert found == pytest.approx([expected[index] for index in order], abs=1 / 96)


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@pytest.mark.parametrize("target", [0.05, 0.5, 0.8])
def test_requests_nearly_meet_the_budget_by_themselves(name: str, target: float) -> None:
    evidence = Planted(target=target)
    requested = ALLOCATORS[name].request(evidence)
    assert len(requested) == len(evidence.sites)
    assert all(math.isfinite(share) for share in requested)
    assert repair(requested, evidence.sites, target)
    if name != "dp":  # whose levels are sixteenths
        assert mean_sparsity(evidence.sites, requested) == pytest.approx(target, abs=2e-3)


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if "granularity" in parameters_of(ALLOCATORS[name])])
def test_granularity_says_who_shares_a_sparsity(name: str) -> None:
    evidence = Planted()
    for granularity, key in (("block", lambda site: site.block), ("kind", lambda site: site.kind)):
        requested = configured(name, {"granularity": granularity}).request(evidence)
        by_group: dict[object, set[float]] = {}
        for site, share in zip(evidence.sites, requested, strict=True):
            by_group.setdefault(key(site), set()).add(share)
        assert all(len(shares) == 1 for shares in by_group.values())
        assert len(set(requested)) > 1
    each = configured(name, {"granularity": "matrix"}).request(evidence)
    assert len(set(each)) > max(evidence.n_blocks, len(SHAPES))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("owl", {"spraed": 1}, "allocator 'owl' has no parameter 'spraed'; it has spread, outlier, granularity"),
        ("uniform", {"spread": 1}, "has no parameter 'spread'; it has none"),
        ("owl", {"spread": "wide"}, "spread of allocator 'owl' is 'wide': give a value like 0.08"),
        ("owl", {"spread": "nan"}, "spread of allocator 'owl' is 'nan'"),
        ("owl", {"spread": -1}, "spread -1 is outside [0, 1]"),
        ("owl", {"granularity": "head"}, "no granularity 'head'; there are matrix, block, kind"),
        ("atp", {"evaluations": "2.5"}, "evaluations of allocator 'atp' is '2.5'"),
        ("atp", {"evaluations": 0}, "evaluations 0 is outside"),
        ("block-influence", {"drop": "maybe"}, "give true or false"),
        ("alpha-pruning", {"fit": "mid"}, "no fit 'mid'; there are peak, median"),
        ("dsa", {"reduce": "det"}, "no reduction 'det'"),
        ("dsa", {"pre": "abs,abs,abs"}, "3 steps before the reduction are too many"),
        ("dsa", {"post": "arcsin"}, "no step after 'arcsin'"),
        ("das", {"pairs": "some"}, "no pairs 'some'; there are all, positive"),
        ("dp", {"error": "X_l2"}, "no error 'X_l2'; there are H, X_ss"),
    ],
)
def test_parameters_that_are_refused(name: str, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        configured(name, parameters)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_parameters_come_as_text_or_as_values() -> None:
    assert configured("owl", {"spread": "0.2", "granularity": "kind"}) == configured(
        "owl", {"spread": 0.2, "granularity": "kind"}
    )
    assert parameters_of(configured("block-influence", {"drop": "TRUE"}))["drop"] is True
    with pytest.raises(UnknownName, match="no allocator 'uniferm'; did you mean 'uniform'"):
        configured("uniferm")


def test_scores_that_are_no_numbers_name_the_matrix() -> None:
    model = tiny_language_model("llama")
    allocator: Allocator = ALLOCATORS["owl"]
    with pytest.raises(InvalidInput, match=r"this metric cannot prune model\.layers\.0\.self_attn\.q_proj"):
        allocate_model(model, "owl", allocator, 0.5, criterion=_Broken(Metric.from_text("abs(W)").expression))


class _Broken(Metric):
    def score(self, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.full_like(inputs["W"], math.nan)
