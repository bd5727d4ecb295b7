"""Published criteria against formulas written by hand, and Wanda's masks against an implementation of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.expression import parse
from evoprune.metrics.interpreter import evaluate, free_inputs
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, Site
from evoprune.metrics.terminals import STATISTICS
from tests import wanda

Inputs = Mapping[str, Tensor]

SITE = Site("layers.1.q_proj", "q_proj", 1, 4, 16, 48)


def _relative(given: Inputs) -> Tensor:
    size = given["W"].abs()
    return size / size.sum(0) + size / size.sum(1).unsqueeze(1)


def _nowag(given: Inputs) -> Tensor:
    columns = given["W"] / given["W"].norm(dim=0)
    return (columns / columns.norm(dim=1, keepdim=True)) ** 2 * given["X_ss"]


FORMULAS: dict[str, Callable[[Inputs], Tensor]] = {
    "gblm": lambda given: given["W"].abs() * given["X_l2"] + 100 * given["W"].abs() * given["G_l2"],
    "gblm-gradient": lambda given: given["W"].abs() * given["G_l2"],
    "gblm-inverse": lambda given: given["W"].abs() * given["X_l2"] / (100 * given["G_l2"] + 1e-8),
    "magnitude": lambda given: given["W"].abs(),
    "moe-pruner": lambda given: given["W"].abs() * given["X_gate_l2"],
    "nowag": _nowag,
    "obs": lambda given: given["W"] ** 2 / given["Hinv"],
    "pruner-zero": lambda given: (
        given["W"] ** 2 * (given["G_l2"] - given["G_l2"].min()) / (given["G_l2"].max() - given["G_l2"].min())
    ),
    "ri": _relative,
    "ria": lambda given: _relative(given) * given["X_l2"] ** 0.5,
    "snip": lambda given: (given["W"] * given["G_mean"]).abs(),
    "sparsegpt-score": lambda given: given["W"] ** 2 / given["Hchol2"],
    "stade": lambda given: given["W"].abs() * given["X_var"] ** 0.5,
    "symwanda": lambda given: given["W"].abs() * (given["X_ss"] + given["Y_ss"]) ** 0.5,
    "taylor": lambda given: given["W"].abs() * given["G_l1"],
    "wanda": lambda given: given["W"].abs() * given["X_l2"],
    "wanda++": lambda given: given["W"].abs() * given["X_l2"] + 100 * given["W"].abs() * given["G_reg"],
}


@pytest.fixture(params=list(CRITERIA))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_metric_has_a_formula_here() -> None:
    assert {name for name in CRITERIA if isinstance(CRITERIA[name], Metric)} == set(FORMULAS)


def test_contract(name: str, inputs: Callable[..., dict[str, Tensor]]) -> None:
    criterion = CRITERIA[name]
    assert isinstance(criterion, Criterion)
    assert criterion.needs <= STATISTICS and criterion.group in ("row", "layer", "global") and criterion.source
    given = inputs(0)
    needed = {key: value for key, value in given.items() if key in criterion.needs or key not in STATISTICS}
    before = {key: value.clone() for key, value in needed.items()}
    score = criterion.score(SITE, needed)
    assert score.shape == (16, 48) and score.dtype is torch.float32 and torch.isfinite(score).all()
    assert torch.equal(score, criterion.score(SITE, needed))
    assert all(torch.equal(needed[key], before[key]) for key in before)
    assert (criterion.tags.data == "data-free") == (not criterion.needs)


def _power(given: Inputs, a: float, b: float) -> Tensor:
    return given["W"].abs() * given["X_l2"] ** a * given["G_l2"] ** b


def _softmax(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum(1, keepdim=True)


# Families that published searches draw from: every member has to be sayable, not to be listed.
FAMILIES: dict[str, Callable[[Inputs], Tensor]] = {
    "mul(abs(W),mul(powc(X_l2,0),powc(G_l2,0)))": lambda given: _power(given, 0, 0),
    "mul(abs(W),mul(powc(X_l2,1),powc(G_l2,0)))": lambda given: _power(given, 1, 0),
    "mul(abs(W),mul(powc(X_l2,0.7),powc(G_l2,0.3)))": lambda given: _power(given, 0.7, 0.3),
    "mul(abs(W),mul(powc(X_l2,-0.5),powc(G_l2,3/2)))": lambda given: _power(given, -0.5, 1.5),
    # OptiShear: transformed weight times transformed norm, each with a scale of the layer; arXiv:2502.10735.
    "mul(mul(rmean(abs(W)),sqr(abs(W))),mul(tmean(X_l2),sqrt(X_l2)))": lambda given: (
        given["W"].abs().mean(1, keepdim=True) * given["W"] ** 2 * given["X_l2"].mean() * given["X_l2"] ** 0.5
    ),
    "mul(div(log1p(abs(W)),tl2(W)),exp(div(X_l2,tmax(X_l2))))": lambda given: (
        given["W"].abs().log1p() / given["W"].norm() * (given["X_l2"] / given["X_l2"].max()).exp()
    ),
    "mul(add(0.5,mul(0.5,tanh(mul(0.5,abs(W))))),log(X_l2))": lambda given: (
        given["W"].abs().sigmoid() * given["X_l2"].log()
    ),
    "mul(div(exp(abs(W)),rsum(exp(abs(W)))),X_l2)": lambda given: _softmax(given["W"].abs()) * given["X_l2"],
}


@pytest.mark.parametrize("text", FAMILIES)
def test_published_families_can_be_said(text: str, inputs: Callable[..., dict[str, Tensor]]) -> None:
    for seed in range(3):
        given = inputs(seed)
        expected = FAMILIES[text]({key: value.double() for key, value in given.items()})
        score = evaluate(parse(text), given)
        assert torch.isfinite(score).all()
        torch.testing.assert_close(score.double(), expected, rtol=2e-6, atol=1e-6 * expected.abs().mean().item())


@pytest.mark.parametrize("metric", sorted(FORMULAS))
def test_values(metric: str, inputs: Callable[..., dict[str, Tensor]]) -> None:
    for seed in range(3):
        given = inputs(seed)
        expected = FORMULAS[metric]({key: value.double() for key, value in given.items()})
        score = CRITERIA[metric].score(SITE, given)
        torch.testing.assert_close(score.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7])
def test_wanda_mask_is_its_own_bit_for_bit(dtype: torch.dtype, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = (0.02 * torch.randn(64, 320, generator=generator)).to(dtype)
    scaler_row = (torch.randn(320, generator=generator) * 2).exp()
    given = {**free_inputs(SITE, weight, sparsity), "X_l2": scaler_row.sqrt().view(1, -1)}
    score = CRITERIA["wanda"].score(SITE, given)
    assert torch.equal(mask(score, MaskRule(sparsity)), wanda.keep(weight, scaler_row, sparsity))
    for gone, width in ((2, 4), (4, 8)):
        keep = mask(score, MaskRule(pattern=(width - gone, width)))
        assert torch.equal(keep, wanda.keep_pattern(weight, scaler_row, gone, width))


def wanda_mask(weight: Tensor, norms: Tensor) -> Tensor:
    given = {**free_inputs(SITE, weight, 0.5), "X_l2": norms.view(1, -1)}
    return mask(CRITERIA["wanda"].score(SITE, given), MaskRule(0.5))


def test_wanda_by_hand() -> None:
    """Scores 4 8 4 3 and 1 16 12 4: of the tied ones the lower column goes."""
    keep = wanda_mask(torch.tensor([[4.0, 1, 1, 3], [1, 2, 3, 4]]), torch.tensor([1.0, 8, 4, 1]))
    assert keep.tolist() == [[False, True, True, False]] * 2


def test_wanda_does_not_see_the_unit_of_an_input() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(16, 24, generator=generator), torch.rand(24, generator=generator) + 0.5
    keep = wanda_mask(weight, norms)
    by = 2.0 ** torch.randint(-3, 4, (24,), generator=generator)
    assert torch.equal(wanda_mask(weight / by, norms * by), keep)
    assert torch.equal(wanda_mask(weight, torch.full((24,), 3.0)), mask(weight.abs(), MaskRule(0.5)))


def _same_but_for_near_ties(first: Tensor, second: Tensor, score: Tensor, sparsity: float) -> bool:
    """Masks differ at most where a score is within 4 ulp of its row's cut."""
    cut = score.sort(1).values[:, int(score.shape[1] * sparsity), None]
    near = (score - cut).abs() <= 4 * 2**-23 * cut.abs()
    return bool(((first == second) | near).all())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Gradient-only GBLM, OBD with the empirical Fisher, and the squared first-order term per sample.
        ("mul(abs(W),G_l2)", "mul(sqr(W),sqr(G_l2))"),
        ("mul(abs(W),G_l2)", "mul(sqr(mul(W,G_l2)),0.5)"),
        # The released gradient statistic is a hundred times larger.
        ("mul(sqr(W),mms_t(G_l2))", "mul(sqr(W),mms_t(mul(100,G_l2)))"),
        ("mul(abs(W),X_l2)", "mul(sqr(W),X_ss)"),
    ],
)
def test_known_equal_rankings(one: str, other: str, inputs: Callable[..., dict[str, Tensor]]) -> None:
    given = inputs(4, 64, 256)
    score, twin = evaluate(parse(one), given), evaluate(parse(other), given)
    rule = MaskRule(0.5)
    assert _same_but_for_near_ties(mask(score, rule), mask(twin, rule), score, 0.5)


def test_squared_taylor_of_single_sequences_ranks_as_the_fisher_does() -> None:
    """Σ(w g_s)², summed from the gradient of each sequence, against the criterion on the collected norm."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(64, 256, generator=generator)
    gradients = 1e-4 * torch.randn(7, 64, 256, generator=generator)
    squared_taylor = (weight * gradients).square().sum(0)
    fisher = weight.square() * gradients.square().mean(0)
    given = {"W": weight, "G_l2": gradients.square().sum(0).sqrt()}
    score = CRITERIA["gblm-gradient"].score(SITE, given)
    for sparsity in (0.5, 0.7):
        rule = MaskRule(sparsity)
        for other in (squared_taylor, fisher):
            assert _same_but_for_near_ties(mask(score, rule), mask(other, rule), score, sparsity)


def test_random_scores_depend_on_the_site_and_the_seed_only(inputs: Callable[..., dict[str, Tensor]]) -> None:
    criterion = CRITERIA["random"]
    score = criterion.score(SITE, inputs(0))
    assert torch.equal(score, criterion.score(SITE, inputs(1)))
    other = Site("layers.2.q_proj", "q_proj", 2, 4, 16, 48)
    assert not torch.equal(score, criterion.score(other, inputs(0)))
    assert 0.3 < score.mean() < 0.7 and len(score.unique()) > 700
