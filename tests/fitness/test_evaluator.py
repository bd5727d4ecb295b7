"""The evaluator against masks and forward passes made by hand."""

import pytest
import torch
from safetensors.torch import save_file

from evoprune.fitness.evaluator import Evaluator
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.pruning import prune_model
from evoprune.fitness.statistics import collect_statistics
from evoprune.fitness.teacher import build_teacher, linear_head
from evoprune.metrics.allocation import Allocation, SiteSparsity
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import AuditFailed, InvalidCandidate, InvalidInput
from evoprune.metrics.records import MaskRule
from tests.models import random_windows, tiny_language_model

WINDOWS = random_windows(6, 16)
NEEDS = ("X_l2", "X_var", "Y_l2", "G_l2", "G_l1", "G_mean", "Hinv", "Hchol2", "G_reg", "X_gate_l2", "H")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def parts(request, tmp_path_factory):
    """(model, dense weight file, statistics, teacher) of one family."""
    folder = tmp_path_factory.mktemp("evaluator")
    language_model = tiny_language_model(request.param)
    statistics = collect_statistics(language_model, random_windows(4, 16, seed=9), NEEDS, folder=folder / "statistics")
    dense = folder / "dense.safetensors"
    save_file({bound.site.name: bound.weight().contiguous() for bound in language_model.sites}, dense)
    head = linear_head(language_model.model, WINDOWS[:1])
    return language_model, dense, statistics, build_teacher(language_model.model, head, WINDOWS)


@pytest.fixture
def make(parts):
    def build(rule):
        return Evaluator(parts[0], parts[1], parts[2], WINDOWS, parts[3], rule)

    return build


def snapshot(evaluator):
    return {name: tensor.clone() for name, tensor in evaluator.language_model.model.state_dict().items()}


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_prunes_and_restores_to_the_bit(make, name):
    evaluator = make(MaskRule(0.5))
    before = snapshot(evaluator)
    with evaluator.applied(CRITERIA[name]) as removed:
        assert removed == sum(site.out_features * (site.in_features // 2) for site in evaluator.sites)
        for bound in evaluator.language_model.sites:
            assert int((bound.weight() == 0).sum()) == bound.site.out_features * (bound.site.in_features // 2)
    after = snapshot(evaluator)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wanda_by_hand(make, parts):
    """Masks from a sort, weights zeroed by hand, loss from the model's own labels."""
    evaluator = make(MaskRule(0.6))
    model, statistics = parts[0].model, parts[2]
    before = snapshot(evaluator)
    with torch.no_grad():
        for bound in parts[0].sites:
            weight = bound.weight()
            norms = statistics.tensor(bound.site.name, "X_ss").sqrt()
            order = (weight.abs() * norms).argsort(dim=1, stable=True)
            weight.scatter_(1, order[:, : int(bound.site.in_features * 0.6)], 0.0)
        by_hand = [model(input_ids=window[None], labels=window[None]).loss.item() for window in WINDOWS]
        model.load_state_dict(before)
    evaluator.apply(CRITERIA["wanda"])
    losses = evaluator.losses(0, 6).nll
    evaluator.restore()
    assert torch.allclose(losses, torch.tensor(by_hand, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("rule", [MaskRule(0.3, None, "layer"), MaskRule(0.3, None, "global"), MaskRule(None, (2, 4))])
def test_other_groups_remove_exactly_what_they_should(make, rule):
    evaluator = make(rule)
    total = sum(site.weights for site in evaluator.sites)
    expected = {
        "layer": sum(int(site.weights * 3 // 10) for site in evaluator.sites),
        "global": total * 3 // 10,
        "row": total // 2,
    }[rule.group]
    with evaluator.applied(Metric.from_text("mul(abs(W),X_l2)")) as removed:
        assert removed == expected


def test_rungs_are_nested_means_and_thresholds_cut(make):
    evaluator = make(MaskRule(0.5))
    metric, kl = Metric.from_text("mul(abs(W),X_l2)"), OBJECTIVES["kl"]
    full = evaluator.evaluate(metric, kl, (1, 3, 6), (None, None))
    evaluator.apply(metric)
    by_window = evaluator.losses(0, 6).kl
    assert full["rungs"] == pytest.approx([by_window[:n].mean().item() for n in (1, 3, 6)], abs=1e-9)
    cut = evaluator.evaluate(metric, kl, (1, 3, 6), (full["rungs"][0] - 1e-6, None))
    assert cut["rungs"] == full["rungs"][:1]
    passed = evaluator.evaluate(metric, kl, (1, 3, 6), (full["rungs"][0], full["rungs"][1] - 1e-6))
    assert passed["rungs"] == full["rungs"][:2]
    evaluator.restore()


def test_perplexity_objective_is_the_loss(make):
    evaluator = make(MaskRule(0.5))
    metric = Metric.from_text("abs(W)")
    value = evaluator.evaluate(metric, OBJECTIVES["perplexity"], (6,), ())["rungs"][0]
    assert value == pytest.approx(evaluator.losses(0, 6).nll.mean().item(), abs=1e-9)
    evaluator.restore()


def test_reconstruction_is_the_output_error(make, parts):
    evaluator = make(MaskRule(0.5))
    metric = Metric.from_text("abs(W)")
    dense = {bound.site.name: bound.weight().double().clone() for bound in parts[0].sites}
    value = evaluator.evaluate(metric, OBJECTIVES["reconstruction"], (1,), ())["rungs"][0]
    errors = []
    for bound in parts[0].sites:
        gram = parts[2].tensor(bound.site.name, "H").double()
        lost = dense[bound.site.name] - bound.weight().double()
        whole = dense[bound.site.name]
        errors.append((torch.trace(lost @ gram @ lost.T) / torch.trace(whole @ gram @ whole.T)).item())
    evaluator.restore()
    assert value == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_the_diagonal_alone_would_favour_wanda(make, parts):
    """Why the proxy takes the full Gram matrix: with its diagonal nothing beats Wanda."""
    evaluator = make(MaskRule(0.5))
    worse = 0
    for other in ("magnitude", "gblm-gradient", "pruner-zero", "ria"):
        totals = {}
        for name in ("wanda", other):
            total = 0.0
            for site, keep in evaluator.masks(CRITERIA[name]):
                inputs = evaluator.inputs(site, frozenset({"X_ss"}))
                total += ((inputs["W"].square() * inputs["X_ss"]) * ~keep).sum().item()
            totals[name] = total
        worse += totals[other] >= totals["wanda"] * (1 - 1e-6)
    assert worse == 4


def test_invalid_candidates_have_a_reason(make):
    evaluator = make(MaskRule(0.5))
    kl = OBJECTIVES["kl"]
    with pytest.raises(InvalidCandidate, match="TIES"):
        evaluator.evaluate(Metric.from_text("mul(0,W)"), kl, (1,), (), max_tied=0.05)
    with pytest.raises(InvalidInput, match="X_max"):
        evaluator.evaluate(Metric.from_text("mul(abs(W),X_max)"), kl, (1,), ())

    class NotFinite(Metric):
        def score(self, site, inputs):
            return inputs["W"] / 0

    with pytest.raises(InvalidCandidate, match="NONFINITE"):
        evaluator.evaluate(NotFinite.from_text("W"), kl, (1,), ())
    evaluator.restore()


def test_scoring_cannot_change_shared_statistics(make, parts):
    evaluator = make(MaskRule(0.5))
    name = evaluator.sites[0].name
    before = parts[2].tensor(name, "X_l2").clone()

    class InPlace(Metric):
        def score(self, site, inputs):
            inputs["X_l2"].zero_()
            return inputs["W"].abs().mul_(2)

    evaluator.apply(InPlace.from_text("mul(abs(W),X_l2)"))
    evaluator.restore()
    assert torch.equal(parts[2].tensor(name, "X_l2"), before)


def test_a_changed_dense_file_is_noticed(tmp_path):
    language_model = tiny_language_model()
    statistics = collect_statistics(language_model, random_windows(2, 8), ("X_l2",), folder=tmp_path / "statistics")
    dense = tmp_path / "dense.safetensors"
    weights = {bound.site.name: bound.weight().contiguous() for bound in language_model.sites}
    save_file(weights, dense)
    evaluator = Evaluator(language_model, dense, statistics, WINDOWS, None, MaskRule(0.5))
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1e-3}, dense)
    with pytest.raises(AuditFailed):
        evaluator.restore()


@pytest.mark.parametrize("compressor", ["mask", "refit:steps=3"])
def test_an_allocation_gives_the_weights_that_pruning_gives(parts, compressor):
    """`prune_model` masks one matrix after the other, without an evaluator; here one keeps all and one is gone."""
    language_model, dense, statistics, teacher = parts
    sites = [bound.site for bound in language_model.sites]
    own = {site.name: (0.0, 0.25, 0.5, 0.75, 1.0)[index % 5] for index, site in enumerate(sites)}
    shapes = {site.name: (site.out_features, site.in_features) for site in sites}
    shares = tuple(SiteSparsity(name, shapes[name], sparsity) for name, sparsity in own.items())
    budget = sum(site.removed for site in shares) / sum(site.weights for site in shares)
    allocation = Allocation(type(language_model.model).__name__, budget, shares, "hand")
    # Reads the terminal `sparsity`, which is the budget's at every level.
    metric = Metric.from_text("mul(abs(W),add(X_l2,sparsity))")
    evaluator = Evaluator(language_model, dense, statistics, WINDOWS, teacher, MaskRule(budget), own, compressor)
    before = snapshot(evaluator)
    with evaluator.applied(metric) as removed:
        found = snapshot(evaluator)
    assert removed == allocation.removed
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(evaluator).items())
    given = {"statistics": statistics, "compressor": compressor, "allocation": allocation}
    prune_model(language_model, metric, MaskRule(budget), **given)
    assert all(torch.equal(found[name], tensor) for name, tensor in snapshot(evaluator).items())
    evaluator.restore()


@pytest.mark.parametrize(
    ("compressor", "rule"),
    [
        ("refit:steps=3", MaskRule(0.6)),
        ("refit:steps=3", MaskRule(0.3, None, "global")),
        ("awp:steps=2", MaskRule(None, (2, 4))),
    ],
    ids=str,
)
def test_a_compressor_gives_the_weights_that_pruning_gives(parts, compressor, rule):
    """`prune_model` compresses one matrix after the other, without an evaluator; candidates before change nothing."""
    language_model, dense, statistics, teacher = parts
    evaluator = Evaluator(language_model, dense, statistics, WINDOWS, teacher, rule, compressor=compressor)
    before = snapshot(evaluator)
    metric = Metric.from_text("mul(abs(W),powc(X_l2,0.7))")
    with evaluator.applied(CRITERIA["magnitude"]):
        other = snapshot(evaluator)
    with evaluator.applied(metric):
        found = snapshot(evaluator)
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(evaluator).items())
    prune_model(language_model, metric, rule, statistics=statistics, compressor=compressor)
    pruned = snapshot(evaluator)
    evaluator.restore()
    assert all(torch.equal(found[name], tensor) for name, tensor in pruned.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in other.items())
