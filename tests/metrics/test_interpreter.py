"""Evaluation: totality, shapes, and each distinct subexpression once."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evoprune.metrics.errors import InvalidCandidate
from evoprune.metrics.expression import Expression, parse
from evoprune.metrics.interpreter import evaluate, free_inputs
from evoprune.metrics.mask import mask
from evoprune.metrics.operators import OPERATORS
from evoprune.metrics.records import MaskRule, Site
from evoprune.metrics.terminals import TERMINALS

SHAPES = [(4, 6), (1, 6), (4, 1), (1, 1)]
FILLS = ["ordinary", "zeros", "huge", "tiny", "mixed", "constant rows", "one spike", "beyond float32"]


def _adversarial(fill: str, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Every terminal, within its type and sign, of sizes that no model has."""
    generator = torch.Generator().manual_seed(FILLS.index(fill) + 10 * SHAPES.index(shape))
    made = {}
    for name, leaf in TERMINALS.items():
        size = leaf.type.shape(*shape)
        value = torch.randn(size, generator=generator)
        if fill == "zeros":
            value = torch.zeros(size)
        elif fill in ("huge", "tiny"):
            value = value.sign() * (1e30 if fill == "huge" else 1e-30)
        elif fill == "mixed":
            value = value.sign() * 10 ** (60 * torch.rand(size, generator=generator) - 30)
        elif fill == "constant rows":
            value = value[:, :1].expand(size).clone()
        elif fill == "one spike":
            value = torch.full(size, 1e30 * (1 - 1e-7))
            value[0, 0] = 1e30
        elif fill == "beyond float32":
            value = value / 0
        made[name] = value if -1 in leaf.sign else value.abs()
    return made


@pytest.mark.parametrize(("trees", "height"), [(10_000, 3), pytest.param(100_000, 5, marks=pytest.mark.slow)])
def test_evaluation_is_total(trees: int, height: int, tree: Callable[..., Expression]) -> None:
    cases = [_adversarial(fill, shape) for shape in SHAPES for fill in FILLS]
    for index in range(trees):
        draw = random.Random(f"total {index}")
        expression = tree(draw, height=draw.randint(1, height))
        given = draw.choice(cases)
        score = evaluate(expression, given)
        assert score.shape == given["W"].shape
        # A sum in float64 is finite exactly if all are.
        assert math.isfinite(score.sum(dtype=torch.float64).item()), expression.text


def test_every_part_has_the_shape_of_its_type(
    tree: Callable[..., Expression], inputs: Callable[..., dict[str, Tensor]]
) -> None:
    given = inputs(0, 5, 7)
    for index in range(60):
        for node in tree(random.Random(f"shape {index}"), height=3).walk():
            if not node.args:
                continue
            arguments = [
                evaluate(arg, given)[: arg.type.shape(5, 7)[0], : arg.type.shape(5, 7)[1]] for arg in node.args
            ]
            if node.operator.kind not in ("elementwise", "power"):
                arguments = [argument.expand(5, 7) for argument in arguments]
            exponent = [] if node.value is None else [node.value]
            result = node.operator.function(*arguments, *exponent)
            assert result.shape == node.type.shape(5, 7), node.text
            torch.testing.assert_close(result.expand(5, 7), evaluate(node, given), rtol=0, atol=0)


def test_reductions_see_the_whole_matrix(inputs: Callable[..., dict[str, Tensor]]) -> None:
    given = inputs(1, 3, 8)
    total = given["X_l2"].double().sum().float()
    assert torch.equal(evaluate(parse("rsum(X_l2)"), given), total.expand(3, 8))
    assert torch.equal(evaluate(parse("csum(X_l2)"), given), (3 * given["X_l2"].double()).float().expand(3, 8))
    torch.testing.assert_close(
        evaluate(parse("tl2(Y_l2)"), given), (8 * given["Y_ss"].double().sum()).sqrt().float().expand(3, 8)
    )


def test_shards_of_rows_score_and_mask_like_the_whole(
    tree: Callable[..., Expression], inputs: Callable[..., dict[str, Tensor]]
) -> None:
    """Where no operator looks beyond a row, rows may be scored apart, a metric of a tensor-parallel layer, say."""
    given = inputs(6, 24, 64)
    shards = [slice(0, 8), slice(8, 9), slice(9, 24)]
    compared = exact = 0
    for index in range(400):
        expression = tree(random.Random(f"shard {index}"), height=3)
        if any(node.args and node.operator.scope == "matrix" for node in expression.walk()):
            continue
        compared += 1
        whole = evaluate(expression, given)
        parts = [
            evaluate(expression, {name: value[rows] if len(value) == 24 else value for name, value in given.items()})
            for rows in shards
        ]
        # Vectorised and single powers of a vector may differ in the last bit, of which a difference may leave more.
        slack = 1e-7 * whole.abs().max().item()
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=slack, msg=expression.text)
        exact += torch.equal(torch.cat(parts), whole)
        for rule in (MaskRule(0.5), MaskRule(0.7), MaskRule(pattern=(2, 4)), MaskRule(pattern=(4, 8))):
            sharded = torch.cat([mask(part, rule) for part in parts])
            assert torch.equal(sharded, mask(torch.cat(parts), rule)), expression.text
            assert torch.equal(sharded, mask(whole, rule)), expression.text
    assert compared > 100 and exact > 0.9 * compared


def test_distinct_parts_are_computed_once(
    monkeypatch: pytest.MonkeyPatch, inputs: Callable[..., dict[str, Tensor]]
) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Tensor]:
        function = OPERATORS[name].function

        def wrapper(*args: Tensor) -> Tensor:
            calls[name] += 1
            return function(*args)

        return wrapper

    changed = {name: dataclasses.replace(OPERATORS[name], function=counted(name)) for name in OPERATORS}
    monkeypatch.setattr(OPERATORS, "_entries", changed)
    given = inputs(2, 4, 8)
    expression = parse("add(mul(abs(W),rsum(abs(W))),div(mul(abs(W),rsum(abs(W))),add(abs(W),rsum(abs(W)))))")
    score = evaluate(expression, given)
    assert calls == {"abs": 1, "rsum": 1, "mul": 1, "add": 2, "div": 1}
    size, row = given["W"].abs(), given["W"].abs().sum(1, keepdim=True)
    torch.testing.assert_close(score, size * row + size * row / (size + row))


def test_inputs_are_only_read(tree: Callable[..., Expression], inputs: Callable[..., dict[str, Tensor]]) -> None:
    for dtype in (torch.float32, torch.float64):
        given = {name: tensor.to(dtype) for name, tensor in inputs(3, 4, 6).items()}
        before = {name: tensor.clone() for name, tensor in given.items()}
        for index in range(200):
            evaluate(tree(random.Random(f"pure {index}"), height=3), given)
        assert all(torch.equal(given[name], before[name]) for name in before)


def test_no_guard_means_plain_torch(inputs: Callable[..., dict[str, Tensor]]) -> None:
    given = inputs(4)
    weight, norm, gradient = given["W"], given["X_l2"], given["G_l2"]
    for text, plain in {
        "mul(abs(W),X_l2)": weight.abs() * norm,
        "div(sqr(W),Hinv)": weight * weight / given["Hinv"],
        "add(mul(abs(W),X_l2),mul(100,mul(abs(W),G_l2)))": weight.abs() * norm + 100 * (weight.abs() * gradient),
        "mul(abs(W),powc(X_l2,0.7))": weight.abs() * norm.pow(0.7),
    }.items():
        assert torch.equal(evaluate(parse(text), given), plain), text


def test_missing_statistic(inputs: Callable[..., dict[str, Tensor]]) -> None:
    given = inputs(0)
    del given["X_l2"]
    with pytest.raises(InvalidCandidate, match="X_l2") as refused:
        evaluate(parse("mul(abs(W),X_l2)"), given)
    assert refused.value.reason == "STAT_MISSING"


def test_free_inputs() -> None:
    site = Site("model.layers.1.mlp.up_proj", "mlp.up_proj", 1, 3, 8, 32)
    given = free_inputs(site, torch.ones(8, 32, dtype=torch.bfloat16), 0.7)
    assert given["W"].dtype is torch.float32
    assert [round(given[name].item(), 4) for name in ("depth", "n_in", "n_out", "sparsity")] == [
        0.5,
        round(math.log(32), 4),
        round(math.log(8), 4),
        0.7,
    ]
    assert evaluate(parse("mul(W,n_in)"), given).shape == (8, 32)
