"""The canonical form: what it merges, what it must not merge, and that it never changes a ranking."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from evoprune.metrics.analysis import bounds, per_element, varies
from evoprune.metrics.canonical import canonicalise, metric_key
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.expression import Expression, call, from_json, parse, terminal
from evoprune.metrics.interpreter import evaluate
from evoprune.metrics.mask import mask
from evoprune.metrics.normal_form import normal
from evoprune.metrics.operators import BOUND
from evoprune.metrics.opposing import oppose
from evoprune.metrics.records import GROUPS, Group, MaskRule

Inputs = Mapping[str, Tensor]


@pytest.fixture
def probes(inputs: Callable[..., dict[str, Tensor]]) -> list[Inputs]:
    """Three matrices in float64, where rounding does not decide."""
    made = []
    for seed in (1, 2, 3):
        given = {name: tensor.double() for name, tensor in inputs(seed, 12, 40).items()}
        made.append({**given, "X_ss": given["X_l2"] ** 2, "Y_ss": given["Y_l2"] ** 2})
    return made


def _rows(score: Tensor, group: Group) -> Tensor:
    return score if group == "row" else score.reshape(1, -1)


def _ties(score: Tensor, group: Group) -> int:
    values = _rows(score, group).sort(1).values
    return int((values[:, 1:] == values[:, :-1]).sum())


def _binds(expression: Expression, given: Inputs) -> bool:
    """Whether some part of an expression reaches the bound of the language."""
    return any(bool((evaluate(part, given).abs() >= 0.999 * BOUND).any()) for part in expression.walk())


def _near_cut(score: Tensor, group: Group, sparsity: float) -> Tensor:
    rows = _rows(score, group)
    cut = rows.sort(1).values[:, int(rows.shape[1] * sparsity) - 1, None]
    # Reductions are rounded to float32 even here.
    return (rows - cut).abs() <= 2e-6 * cut.abs()


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("trees", [range(400), pytest.param(range(400, 1000), marks=pytest.mark.slow)], ids=str)
def test_masks_stay_and_the_form_is_final(
    trees: range, group: Group, tree: Callable[..., Expression], probes: list[Inputs]
) -> None:
    freed = 0
    for index in trees:
        draw = random.Random(f"canonical {group} {index}")
        expression = tree(draw, height=draw.randint(1, 4))
        form = canonicalise(expression, group)
        assert canonicalise(form, group) == form, expression.text
        assert from_json(form.to_json()) == form
        if form == expression:
            continue
        for given in probes:
            before, after = evaluate(expression, given), evaluate(form, given)
            sparsity = draw.choice((0.5, 0.7))
            rule = MaskRule(sparsity, group=group)
            changed = _rows(mask(before, rule) != mask(after, rule), group)
            near = _near_cut(before, group, sparsity) | _near_cut(after, group, sparsity)
            if (changed & ~near).any():
                # Only a stripped function that had saturated, which leaves fewer ties, or a bound that binds elsewhere.
                fewer = _ties(after, group) < _ties(before, group)
                assert fewer or _binds(expression, given) or _binds(form, given), (expression.text, form.text)
                freed += 1
    assert freed <= 0.03 * len(trees)


def test_masks_stay_across_matrices(tree: Callable[..., Expression], probes: list[Inputs]) -> None:
    """Group ``global``: one order over all matrices, though depth and every reduction differ between them."""
    for index in range(200):
        draw = random.Random(f"canonical global {index}")
        expression = tree(draw, height=draw.randint(1, 4))
        form = canonicalise(expression, "global")
        before = torch.cat([evaluate(expression, given).flatten() for given in probes]).view(1, -1)
        after = torch.cat([evaluate(form, given).flatten() for given in probes]).view(1, -1)
        changed = mask(before, MaskRule(0.5)) != mask(after, MaskRule(0.5))
        if (changed & ~_near_cut(before, "row", 0.5) & ~_near_cut(after, "row", 0.5)).any():
            assert _ties(after, "row") < _ties(before, "row"), (expression.text, form.text)


def test_the_normal_form_has_the_same_value(tree: Callable[..., Expression], probes: list[Inputs]) -> None:
    given = probes[0]
    for index in range(300):
        draw = random.Random(f"normal {index}")
        expression = tree(draw, height=draw.randint(1, 3))
        parts = [evaluate(part, given) for part in expression.walk()]
        largest = max(part.abs().max().item() for part in parts)
        if largest > 1e6:
            # A bound of the language, or the rounding of something this large, may show.
            continue
        torch.testing.assert_close(
            evaluate(normal(expression), given).double(),
            parts[0].double(),
            rtol=1e-5,
            atol=1e-6 * max(largest, 1e-3),
            msg=expression.text,
        )


SAME: list[tuple[str, str, str]] = [
    ("row", "mul(sqr(W),X_ss)", "mul(abs(W),X_l2)"),
    ("row", "sqrt(mul(sqr(W),X_ss))", "mul(X_l2,abs(W))"),
    ("row", "powc(mul(W,X_l2),3)", "mul(abs(W),X_l2)"),
    ("global", "log(mul(sqr(W),X_ss))", "mul(abs(W),X_l2)"),
    ("row", "mul(sqr(W),mul(powc(X_l2,1.4),powc(G_l2,0.6)))", "mul(abs(W),mul(powc(X_l2,0.7),powc(G_l2,0.3)))"),
    ("row", "exp(tanh(log1p(abs(W))))", "abs(W)"),
    ("row", "zsn_r(mms_t(mul(3,W)))", "W"),
    ("layer", "zsn_t(mms_t(mul(3,W)))", "W"),
    ("row", "mul(W,Y_l2)", "W"),
    ("row", "div(W,rsum(abs(W)))", "W"),
    ("row", "sub(mul(2,W),Y_l2)", "W"),
    ("layer", "add(mul(W,depth),n_in)", "W"),
    ("global", "add(mul(2,W),3)", "W"),
    ("row", "mul(W,abs(W))", "W"),
    ("row", "mul(W,mul(W,W))", "W"),
    ("row", "neg(log(abs(W)))", "neg(abs(W))"),
    ("row", "sub(0,abs(W))", "neg(abs(W))"),
    ("row", "add(mul(abs(W),X_l2),mul(abs(W),G_l2))", "mul(abs(W),add(G_l2,X_l2))"),
    ("row", "abs(sub(W,G_l2))", "abs(sub(G_l2,W))"),
    ("row", "add(W,add(G_l2,add(W,G_l2)))", "add(W,G_l2)"),
    ("row", "sub(add(W,X_l2),W)", "X_l2"),
    ("row", "min(abs(W),max(mul(X_l2,2),min(abs(W),G_l2)))", "min(max(min(G_l2,abs(W)),mul(2,X_l2)),abs(W))"),
    ("row", "max(abs(W),0)", "abs(W)"),
    ("row", "min(mul(abs(W),X_l2),mul(abs(W),G_l2))", "mul(abs(W),min(X_l2,G_l2))"),
    ("row", "mul(W,rmean(mul(Y_l2,X_l2)))", "W"),
    ("row", "mul(abs(W),csum(mul(X_l2,abs(W))))", "mul(mul(abs(W),X_l2),csum(abs(W)))"),
    ("row", "mul(W,exp(log(exp(tanh(X_mean)))))", "mul(W,exp(tanh(X_mean)))"),
    ("row", "div(div(abs(W),X_l2),G_l2)", "div(div(abs(W),G_l2),X_l2)"),
    ("row", "mul(W,mms_t(div(G_l2,0.5)))", "mul(W,mms_t(G_l2))"),
    ("row", "mul(W,add(X_l2,mul(log(2),0)))", "mul(W,X_l2)"),
    ("row", "mul(W,add(X_l2,sub(tanh(0.5),tanh(0.5))))", "mul(W,X_l2)"),
]

DIFFERENT: list[tuple[str, str, str]] = [
    ("row", "W", "neg(W)"),
    ("row", "abs(W)", "neg(abs(W))"),
    ("row", "abs(W)", "W"),
    ("row", "mul(abs(W),X_l2)", "neg(mul(abs(W),X_l2))"),
    ("row", "mul(abs(W),X_l2)", "abs(W)"),
    ("row", "mul(abs(W),X_l2)", "mul(abs(W),X_gate_l2)"),
    ("row", "mul(abs(W),X_l2)", "mul(abs(W),X_ss)"),
    ("row", "add(abs(W),X_l2)", "abs(W)"),
    ("row", "mul(W,rmean(W))", "W"),
    ("row", "mul(W,-2)", "W"),
    ("row", "mul(sqr(W),mms_t(G_l2))", "mul(sqr(W),G_l2)"),
    ("row", "add(W,mms_t(G_l2))", "add(W,G_l2)"),
    ("row", "div(W,X_l2)", "mul(W,powc(X_l2,-1))"),
    ("row", "div(mul(abs(W),X_l2),X_l2)", "abs(W)"),
    ("row", "mul(abs(W),mul(X_l2,powc(X_l2,-1)))", "abs(W)"),
    ("row", "mul(abs(W),log(sqr(X_l2)))", "mul(abs(W),log(X_l2))"),
    ("row", "mul(abs(W),exp(log(X_l2)))", "mul(abs(W),X_l2)"),
    ("row", "div(W,neg(W))", "neg(div(W,W))"),
    ("layer", "mul(W,Y_l2)", "W"),
    ("layer", "add(W,Y_l2)", "W"),
    ("layer", "zsn_r(W)", "W"),
    ("layer", "div(abs(W),rl2(W))", "abs(W)"),
    ("global", "mul(abs(W),depth)", "abs(W)"),
    ("global", "div(W,tl2(W))", "W"),
    ("global", "mms_t(abs(W))", "abs(W)"),
    ("global", "add(W,sparsity)", "W"),
]


@pytest.mark.parametrize(("group", "one", "other"), SAME)
def test_equal_rankings_share_a_key(group: Group, one: str, other: str) -> None:
    assert canonicalise(parse(one), group).text == canonicalise(parse(other), group).text
    assert metric_key(parse(one), group) == metric_key(parse(other), group)


@pytest.mark.parametrize(("group", "one", "other"), DIFFERENT)
def test_different_rankings_do_not(group: Group, one: str, other: str) -> None:
    assert metric_key(parse(one), group) != metric_key(parse(other), group)


def test_the_sign_of_a_ranking_is_never_stripped(tree: Callable[..., Expression], probes: list[Inputs]) -> None:
    for index in range(200):
        expression = tree(random.Random(f"sign {index}"), height=3)
        form, reverse = canonicalise(expression, "row"), canonicalise(call("neg", expression), "row")
        if form.text == "0":
            assert reverse == form
        else:
            assert form != reverse, expression.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("magnitude", "abs(W)"),
        ("wanda", "mul(abs(W),X_l2)"),
        ("pruner-zero", "mul(sqr(W),mms_t(G_l2))"),
        ("obs", "div(sqr(W),Hinv)"),
        ("snip", "abs(mul(W,G_mean))"),
        ("gblm", "mul(abs(W),add(mul(100,G_l2),X_l2))"),
    ],
)
def test_published_forms(name: str, text: str) -> None:
    criterion = CRITERIA[name]
    assert isinstance(criterion, Metric)
    assert canonicalise(criterion.expression, "row").text == text


@pytest.mark.parametrize("group", GROUPS)
def test_no_two_published_metrics_share_a_key(group: Group) -> None:
    metrics = [CRITERIA[name] for name in CRITERIA]
    keys = [metric_key(metric.expression, group) for metric in metrics if isinstance(metric, Metric)]
    assert len(set(keys)) == len(keys)


def test_keys_depend_on_the_group() -> None:
    assert len({metric_key(terminal("W"), group) for group in GROUPS}) == len(GROUPS)


@pytest.mark.parametrize("text", ["rmean(W)", "mul(Y_l2,n_in)", "sub(W,W)", "mms_r(Y_l2)", "3", "powc(W,0)"])
def test_constant_rows_become_zero(text: str) -> None:
    assert canonicalise(parse(text), "row").text == "0"


def test_extreme_numbers_stay_within_the_language() -> None:
    for text in (
        "mul(1000000,mul(1000000,mul(W,add(X_l2,1))))",
        "add(mul(1000000,mul(1000000,W)),mul(0.000001,mul(0.000001,X_l2)))",
        "powc(powc(powc(add(W,X_l2),1000),1000),0.001)",
        "div(W,0)",
        "mul(W,add(0.0000001,mul(1000000,X_l2)))",
        "mul(add(X_l2,1e-300),W)",
    ):
        for group in GROUPS:
            form = canonicalise(parse(text), group)
            assert parse(form.text) == form == canonicalise(form, group)


def test_what_an_expression_varies_with() -> None:
    assert varies(parse("mms_t(X_l2)")) == (False, True)
    assert varies(parse("mms_r(mul(X_l2,Y_l2))")) == (True, True)
    assert varies(parse("mms_r(Y_l2)")) == (False, False)
    assert varies(parse("rmean(X_l2)")) == (False, False)
    assert varies(parse("mul(csum(W),rsum(W))")) == (True, True)
    assert not per_element(parse("mul(csum(W),rsum(W))"))
    assert per_element(parse("mul(X_l2,tanh(G_mean))"))


def test_bounds_hold(tree: Callable[..., Expression], inputs: Callable[..., dict[str, Tensor]]) -> None:
    given = inputs(9, 5, 8)
    for index in range(200):
        for part in tree(random.Random(f"bounds {index}"), height=3).walk():
            low, high = bounds(part)
            value = evaluate(part, given)
            least, most = value.min().item(), value.max().item()
            # float32 rounds constants.
            assert low - 1e-6 * abs(low) <= least and most <= high + 1e-6 * abs(high), part.text


def test_opposing_operations_as_published() -> None:
    for text, shorter in {
        "sqrt(sqr(W))": "W",
        "log(exp(mul(W,X_l2)))": "mul(W,X_l2)",
        "div(mul(W,X_l2),X_l2)": "W",
        "sub(add(W,G_l2),G_l2)": "W",
        "neg(neg(sqr(sqrt(W))))": "W",
        "mul(abs(W),X_l2)": "mul(abs(W),X_l2)",
    }.items():
        assert oppose(parse(text)).text == shorter
