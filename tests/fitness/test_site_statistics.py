"""What allocation formulas read of a model, held against numpy and against the allocators that use the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from evoprune.fitness.allocating import ModelEvidence, allocate_by_formula, describe_model, statistics_needed
from evoprune.fitness.allocators import ALLOCATORS
from evoprune.fitness.site_statistics import measure_sites, measurements, reading
from evoprune.fitness.statistics import statistics_for
from evoprune.metrics.allocation_formula import AllocationFormula
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site
from evoprune.metrics.site_terminals import SITE_TERMINALS
from tests.models import random_windows, tiny_language_model

SITES = [
    Site(f"layers.{block}.{kind}", kind, block, 2, rows, 6)
    for block in range(2)
    for kind, rows in (("self_attn.q_proj", 4), ("mlp.up_proj", 8))
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Planted:
    """An `Evidence` of known numbers."""

    sites: Sequence[Site] = SITES
    target = 0.5

    def _drawn(self, site: Site, stream: int, *shape: int) -> Tensor:
        seed = 100 * stream + [known.name for known in SITES].index(site.name)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1

    def weight(self, site: Site) -> Tensor:
        return self._drawn(site, 1, site.out_features, site.in_features) ** 3 - 0.4

    def scores(self, site: Site) -> Tensor:
        return self.weight(site).abs() * self.statistic(site, "X_ss").sqrt() + 1e-3

    def statistic(self, site: Site, name: str) -> Tensor:
        assert name == "X_ss"
        return self._drawn(site, 2, 1, site.in_features)

    def diversity(self, pairs: str, modalities: bool) -> Sequence[float]:
        return [0.1 * at for at in range(len(SITES))]

    def influence(self) -> Sequence[float]:
        return [0.3, 0.2]

    def losses(self, requests: Sequence[Sequence[float]]) -> Sequence[float]:
        raise AssertionError("nothing is tried out")

    def losses_without(self) -> Sequence[float]:
        return [5.0, math.inf]


def array(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def test_every_terminal_is_measured_by_one() -> None:
    given = [name for measurement in measurements(SITE_TERMINALS) for name in measurement.gives]
    assert sorted(given) == sorted(SITE_TERMINALS)


def test_numbers_are_those_of_numpy() -> None:
    evidence = Planted()
    found = measure_sites(evidence, SITE_TERMINALS).values
    for at, site in enumerate(SITES):
        weight, scores, squares = (
            array(t) for t in (evidence.weight(site), evidence.scores(site), evidence.statistic(site, "X_ss"))
        )
        block = np.concatenate([array(evidence.scores(other)).ravel() for other in SITES if other.block == site.block])
        # The criterion removes the lower half of each row.
        order = np.argsort(scores, axis=1, kind="stable")
        pruned = weight.copy()
        np.put_along_axis(pruned, order[:, :3], 0, axis=1)
        expected = {
            "weight_rms": np.sqrt((weight**2).mean()),
            "input_rms": np.sqrt(squares.mean()),
            "score_mean": scores.mean(),
            "outliers": (scores > 5 * scores.mean()).mean(),
            "outliers_block": (block > 5 * block.mean()).mean(),
            "logvar": np.log(scores).var(ddof=1),
            "logvar_block": np.log(block).var(ddof=1),
            "error": ((weight - pruned) ** 2 * squares).sum() / (weight**2 * squares).sum(),
            "diversity": 0.1 * at,
            "influence": [0.3, 0.2][site.block],
        }
        for name, value in expected.items():
            assert found[name][at] == pytest.approx(value, rel=1e-5), name
        exponents = [found["tail"][other] for other in range(4) if SITES[other].block == site.block]
        assert found["tail_block"][at] == pytest.approx(np.mean(exponents))


def test_what_is_no_finite_number_is_left_out_and_named() -> None:
    found = measure_sites(Planted(), ("position", "ablation"))
    assert list(found.values) == ["position"]
    assert found.faults == {"ablation": "of layers.1.self_attn.q_proj it is no finite number"}


def test_what_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planted, "weight", lambda self, site: torch.zeros(site.out_features, site.in_features))
    found = measure_sites(Planted(), ("tail", "weight_rms"))
    assert list(found.values) == ["weight_rms"] and "no exponent" in found.faults["tail"]


def test_only_what_is_asked_for_is_read() -> None:
    assert (reading(["position", "tail"]).uses, reading(["position", "tail"]).needs) == (frozenset(), frozenset())
    assert reading(["error"]).needs == {"X_ss"} and reading(["error"]).uses == {"scores"}
    assert statistics_needed(reading(["outliers"]), CRITERIA["wanda"]) == {"X_l2"}
    assert statistics_needed(reading(["influence"]), CRITERIA["wanda"]) == frozenset()


@pytest.mark.parametrize(
    ("terminal", "allocator", "sign"),
    [("outliers_block", "owl", -1), ("influence", "block-influence", -1), ("tail_block", "alpha-pruning", 1)],
)
def test_they_are_the_numbers_of_the_allocators(terminal: str, allocator: str, sign: int) -> None:
    """A published allocator asks for sparsities that are linear in the number that it is known for."""
    model = tiny_language_model()
    windows, wanda = random_windows(6, 16), CRITERIA["wanda"]
    statistics = statistics_for(model, windows, ["X_l2", "X_ss"])
    given = {"criterion": wanda, "statistics": statistics, "calibration": windows, "search": windows}
    values = describe_model(model, [terminal], 0.5, **given).values[terminal]
    evidence = ModelEvidence(model, 0.5, wanda, statistics, windows, windows, lambda what, done, total: None)
    asked = np.array(ALLOCATORS[allocator].request(evidence))
    assert np.corrcoef(values, sign * asked)[0, 1] == pytest.approx(1, abs=1e-6)


def test_a_formula_is_applied_to_a_model_within_its_budget() -> None:
    model = tiny_language_model()
    formula = AllocationFormula.from_text("sub(log(error),mul(0.5,position))", 0.2)
    windows = random_windows(6, 16)
    statistics = statistics_for(model, windows, ["X_l2", "X_ss"])
    found = allocate_by_formula(model, formula, 0.7, criterion=CRITERIA["wanda"], statistics=statistics)
    assert abs(found.removed - 0.7 * found.weights) <= 8
    assert len({site.sparsity for site in found.sites}) > 3
    assert found.summary() == {
        "allocator": "formula",
        "parameters": {"expression": formula.expression.text, "spread": 0.2},
        "sparsity": 0.7,
    }


def test_a_formula_says_what_a_model_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelEvidence, "influence", lambda self: [math.nan, 0.1])
    formula = AllocationFormula.from_text("influence", 0.2)
    with pytest.raises(InvalidInput, match="reads influence, which this model does not have"):
        allocate_by_formula(tiny_language_model(), formula, 0.5, criterion=CRITERIA["wanda"])
