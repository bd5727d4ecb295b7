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


@pytest.mark.parametrize("metric", sorted(FORMULAS))
def test_values(metric: str, inputs: Callable[..., dict[str, Tensor]]) -> None:
    for seed in range(3):
        given = inputs(seed)
        expected = FORMULAS[metric]({key: value.double() for key, value in given.items()})
        score = CRITERIA[metric].score(SITE, given)
        torch.testing.assert_close(score.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().mean().item())


def _wanda_keep(weight: Tensor, scaler_row: Tensor, sparsity: float) -> Tensor:
    """Wanda's own mask, as its released code computes it, from its own accumulator."""
    scores = torch.abs(weight) * torch.sqrt(scaler_row.reshape((1, -1)))
    removed = torch.zeros_like(scores, dtype=torch.bool)
    _, order = torch.sort(scores, dim=-1, stable=True)
    removed.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
    return ~removed


def _wanda_keep_pattern(weight: Tensor, scaler_row: Tensor, gone: int, width: int) -> Tensor:
    scores = torch.abs(weight) * torch.sqrt(scaler_row.reshape((1, -1)))
    removed = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], width):
        block = scores[:, start : start + width].float()
        removed.scatter_(1, start + torch.topk(block, gone, dim=1, largest=False)[1], True)
    return ~removed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7])
def test_wanda_mask_is_its_own_bit_for_bit(dtype: torch.dtype, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = (0.02 * torch.randn(64, 320, generator=generator)).to(dtype)
    scaler_row = (torch.randn(320, generator=generator) * 2).exp()
    given = {**free_inputs(SITE, weight, sparsity), "X_l2": scaler_row.sqrt().view(1, -1)}
    score = CRITERIA["wanda"].score(SITE, given)
    assert torch.equal(mask(score, MaskRule(sparsity)), _wanda_keep(weight, scaler_row, sparsity))
    for gone, width in ((2, 4), (4, 8)):
        keep = mask(score, MaskRule(pattern=(width - gone, width)))
        assert torch.equal(keep, _wanda_keep_pattern(weight, scaler_row, gone, width))


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


def test_random_scores_depend_on_the_site_and_the_seed_only(inputs: Callable[..., dict[str, Tensor]]) -> None:
    criterion = CRITERIA["random"]
    score = criterion.score(SITE, inputs(0))
    assert torch.equal(score, criterion.score(SITE, inputs(1)))
    other = Site("layers.2.q_proj", "q_proj", 2, 4, 16, 48)
    assert not torch.equal(score, criterion.score(other, inputs(0)))
    assert 0.3 < score.mean() < 0.7 and len(score.unique()) > 700
