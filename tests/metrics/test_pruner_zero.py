"""The published Pruner-Zero language: its released tree, its masks, its defects, its generator, and the way to ours."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidCandidate, InvalidExpression, UnknownName
from evoprune.metrics.expression import parse
from evoprune.metrics.interpreter import evaluate as evaluate_core
from evoprune.metrics.mask import mask
from evoprune.metrics.pruner_zero import (
    BINARY,
    FUNCTIONS,
    LEAVES,
    UNARY,
    PrunerZeroMetric,
    Tree,
    evaluate,
    from_json,
    published_generator,
    to_core,
)
from evoprune.metrics.records import MaskRule, Site

RELEASED = (
    '{"data":"mul","left":{"data":"abs","left":{"data":"mul","left":{"data":"W"},"right":{"data":"W"}}},'
    '"right":{"data":"mms","left":{"data":"G"}}}'
)
SITE = Site("site", "kind", 0, 2, 64, 128)


def statistics(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (SITE.out_features, SITE.in_features)
    return {
        "W": 0.02 * torch.randn(shape, generator=generator),
        "G_l2": 1e-3 * torch.randn(shape, generator=generator).exp(),
        "X_ss": 50 * torch.randn((1, shape[1]), generator=generator).exp(),
    }


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"W": inputs["W"].abs(), "G": 100 * inputs["G_l2"], "X": inputs["X_ss"]}


def test_the_released_tree_round_trips() -> None:
    tree = from_json(json.loads(RELEASED))
    assert json.dumps(tree.to_json(), sort_keys=True) == json.dumps(json.loads(RELEASED), sort_keys=True)
    assert str(tree) == "mul(abs(mul(W,W)),mms(G))"


@pytest.mark.parametrize("rule", [MaskRule(sparsity=0.5), MaskRule(sparsity=0.7), MaskRule(pattern=(2, 4))])
def test_the_released_trees_mask_is_that_of_our_form(rule: MaskRule) -> None:
    inputs = statistics()
    metric = PrunerZeroMetric(from_json(json.loads(RELEASED)))
    assert isinstance(metric, Criterion)
    assert (metric.group, metric.needs) == ("row", {"G_l2"})
    published = metric.score(SITE, inputs)
    ours = evaluate_core(parse("mul(sqr(W),mms_t(G_l2))"), inputs)
    differing = (mask(published, rule) != mask(ours, rule)).nonzero()
    for row, column in differing.tolist():
        # Only what lies within 4 units in the last place of another score of its row may change sides.
        others = np.delete(published[row].numpy(), column)
        assert (abs(others - published[row, column].item()) <= 4 * np.spacing(others)).any()
    assert len(differing) <= 4


def test_each_operator_against_numpy() -> None:
    inputs = leaves(statistics())
    x, y = inputs["W"].double().numpy(), inputs["G"].double().numpy()
    expected = {
        "add": x + y, "sub": x - y, "mul": x * y, "div": x / np.linalg.norm(y), "sqr": x**2, "pow": x**2, "neg": -x,
        "abs": x, "sqrt": np.sqrt(x), "log": np.log(x + 0.001), "exp": np.exp(x), "tanh": np.tanh(x), "skp": x,
        "mms": (x - x.min()) / (x.max() - x.min()), "zsn": (x - x.mean()) / x.std(ddof=1),
    }  # fmt: skip
    assert set(expected) == set(FUNCTIONS)
    for name, value in expected.items():
        tree = Tree(name, Tree("W"), Tree("G") if name in BINARY else None)
        np.testing.assert_allclose(evaluate(tree, inputs).numpy(), value, rtol=1e-5, atol=1e-6)


def test_the_divisors_norm_is_that_of_the_broadcast() -> None:
    inputs = leaves(statistics())
    found = evaluate(Tree("div", Tree("W"), Tree("X")), inputs)
    torch.testing.assert_close(found, inputs["W"] / (inputs["X"].norm() * SITE.out_features**0.5))
    torch.testing.assert_close(evaluate(Tree("div", Tree("X"), Tree("X")), inputs), inputs["X"] / inputs["X"].norm())


@pytest.mark.parametrize("text", ["mms(sub(W,W))", "exp(mul(X,X))", "div(W,sub(G,G))"])
def test_published_defects_are_kept_and_the_mask_refuses_them(text: str) -> None:
    tree = {
        "mms(sub(W,W))": Tree("mms", Tree("sub", Tree("W"), Tree("W"))),
        "exp(mul(X,X))": Tree("exp", Tree("mul", Tree("X"), Tree("X"))),
        "div(W,sub(G,G))": Tree("div", Tree("W"), Tree("sub", Tree("G"), Tree("G"))),
    }[text]
    assert str(tree) == text
    scores = PrunerZeroMetric(tree).score(SITE, statistics())
    assert not torch.isfinite(scores).all()
    with pytest.raises(InvalidCandidate, match="NONFINITE"):
        mask(scores, MaskRule(sparsity=0.5))


def test_half_precision_weights_are_scored_in_float32() -> None:
    inputs = statistics()
    metric = PrunerZeroMetric(from_json(json.loads(RELEASED)))
    half = {**inputs, "W": inputs["W"].bfloat16()}
    assert torch.equal(metric.score(SITE, half), metric.score(SITE, {**inputs, "W": half["W"].float()}))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"data": 1},
        {"data": "W", "left": {"data": "W"}},
        {"data": "abs"},
        {"data": "abs", "right": {"data": "W"}},
        {"data": "abs", "left": {"data": "W"}, "right": {"data": "W"}},
        {"data": "mul", "left": {"data": "W"}},
        {"data": "abs", "left": None},
        {"data": "W", "more": 1},
    ],
)
def test_what_is_no_tree_is_refused(value: object) -> None:
    with pytest.raises(InvalidExpression):
        from_json(value)


def test_large_and_unknown_trees_are_refused() -> None:
    with pytest.raises(UnknownName, match="powc"):
        from_json({"data": "powc", "left": {"data": "W"}})
    deep: dict[str, object] = {"data": "W"}
    wide: dict[str, object] = {"data": "W"}
    for _ in range(33):
        deep = {"data": "abs", "left": deep}
    for _ in range(8):
        wide = {"data": "add", "left": wide, "right": wide}
    for value in (deep, wide):
        with pytest.raises(InvalidExpression, match=r"deeper|nodes"):
            from_json(value)


def _height(tree: Tree) -> int:
    return 1 + max(_height(child) for child in (tree.left, tree.right) if child) if tree.left else 0


def test_the_generator_draws_as_published() -> None:
    trees = [published_generator(random.Random(seed)) for seed in range(2000)]
    assert trees[7] == published_generator(random.Random(7))
    assert {_height(tree) for tree in trees} == {2, 3, 4}
    nodes = [node.data for tree in trees for node in tree.walk()]
    roots = [tree.data for tree in trees]
    for name in FUNCTIONS:
        assert roots.count(name) == pytest.approx(2000 / 15, rel=0.35)
    for name in LEAVES:
        assert nodes.count(name) == pytest.approx(sum(nodes.count(leaf) for leaf in LEAVES) / 3, rel=0.1)
    for tree in trees:
        assert from_json(tree.to_json()) == tree


def test_translations_compute_the_same() -> None:
    inputs = {**statistics(), "W": 30 * statistics()["W"], "X_ss": statistics()["X_ss"] / 100}
    compared = 0
    for seed in range(300):
        tree = published_generator(random.Random(seed))
        published = PrunerZeroMetric(tree).score(SITE, inputs)
        ours = evaluate_core(to_core(tree), inputs)
        assert torch.isfinite(ours).all()
        # The two deviations that are known: the bound of exp, and the sample's standard deviation.
        if torch.isfinite(published).all() and not {"exp", "zsn"} & {node.data for node in tree.walk()}:
            scale = published.abs().max().clamp(min=1e-6).item()
            torch.testing.assert_close(ours, published, rtol=1e-3, atol=1e-4 * scale, msg=str(tree))
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", sorted(UNARY))
def test_every_unary_operator_is_translated(name: str) -> None:
    inputs = statistics()
    tree = Tree(name, Tree("G"))
    torch.testing.assert_close(
        evaluate_core(to_core(tree), inputs), PrunerZeroMetric(tree).score(SITE, inputs), rtol=1e-3, atol=1e-6
    )
