"""Probes, rank signatures and distances between metrics."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from evoprune.metrics.canonical import canonicalise
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.expression import Expression, parse
from evoprune.metrics.interpreter import evaluate
from evoprune.metrics.mask import MAX_TIED_ROWS, mask
from evoprune.metrics.probe import Probe, spread_sites, synthetic_inputs
from evoprune.metrics.records import MaskRule, Site
from evoprune.metrics.signature import (
    behaviour_distance,
    probe_scores,
    pruned_sets,
    rank_signature,
    set_distance,
    share_that_differs,
)
from evoprune.metrics.terminals import TERMINALS

ROW, LAYER, GLOBAL = MaskRule(0.5), MaskRule(0.5, group="layer"), MaskRule(0.5, group="global")
KINDS = ["q", "k", "v", "o", "gate", "up", "down"]


def _sites(blocks: int) -> list[Site]:
    return [Site(f"{block}.{kind}", kind, block, blocks, 32, 48) for block in range(blocks) for kind in KINDS]


@pytest.fixture
def probe(inputs: Callable[..., dict[str, Tensor]]) -> Probe:
    sites = spread_sites(_sites(4), 4)
    return Probe.build([(site, inputs(index, 32, 48)) for index, site in enumerate(sites)])


def _digest(text: str, probe: Probe, rule: MaskRule = ROW) -> str:
    signature = rank_signature(parse(text), probe, rule)
    assert signature.reason is None
    return signature.digest


def test_sites_are_spread_over_depth_and_kinds() -> None:
    picked = spread_sites(_sites(12))
    assert len(picked) == 8 and len({site.kind for site in picked}) == 7
    assert picked[0].block == 0 and picked[-1].block == 11
    blocks = [site.block for site in picked]
    assert blocks == sorted(blocks) and max(b - a for a, b in itertools.pairwise(blocks)) <= 2
    assert spread_sites(_sites(1)) == _sites(1)
    assert len(spread_sites(_sites(2), 8)) == 8


def test_a_probe_takes_whole_rows(inputs: Callable[..., dict[str, Tensor]]) -> None:
    given = inputs(0, 40, 24)
    probe = Probe.build([(Site("a", "a", 0, 1, 40, 24), given)])
    taken = probe.inputs[0]
    rows = [index * 40 // 16 for index in range(16)]
    for name, leaf in TERMINALS.items():
        expected = given[name][rows] if leaf.type.varies_with_row else given[name]
        assert torch.equal(taken[name], expected), name
    assert probe.names == ("a", "synthetic") and probe.terminals == set(TERMINALS)
    few = Probe.build([(Site("a", "a", 0, 1, 5, 24), inputs(0, 5, 24))])
    assert few.inputs[0]["W"].shape == (5, 24)


def test_a_probe_survives_a_file(probe: Probe, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    again = Probe.load(path)
    assert again.names == probe.names
    for before, after in zip(probe.inputs, again.inputs, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert rank_signature(parse("W"), again, ROW) == rank_signature(parse("W"), probe, ROW)


def test_other_files_are_no_probes(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    with pytest.raises(InvalidInput):
        Probe.load(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(InvalidInput):
        Probe.load(path)
    tensors = {"0::W": torch.ones(1, 1)}
    for metadata in (None, {"probe": "{"}, {"probe": json.dumps({"format": "probe/0"})}):
        safetensors.torch.save_file(tensors, path, metadata)
        with pytest.raises(InvalidInput):
            Probe.load(path)


def test_the_synthetic_matrix_is_hard_but_consistent() -> None:
    given = synthetic_inputs()
    for name, leaf in TERMINALS.items():
        assert given[name].shape == leaf.type.shape(*given["W"].shape)
        assert torch.isfinite(given[name]).all()
        assert set(given[name].sign().int().flatten().tolist()) <= leaf.sign, name
    assert torch.equal(given["X_l2"], given["X_ss"].sqrt())
    assert (given["X_l2"] == 0).any() and (given["W"] == 0).any() and (given["G_l2"] == 0).any()


@pytest.mark.parametrize("text", ["mul(abs(W),X_l2)", "mul(sqr(W),mms_t(G_l2))", "W", "div(abs(W),csum(abs(W)))"])
def test_scaled_rows_and_monotone_roots_collide(text: str, probe: Probe) -> None:
    digest = _digest(text, probe)
    for changed in (
        f"mul({text},Y_l2)",
        f"div({text},exp(rmean(W)))",
        f"add({text},mul(1e-6,Y_l2))",
        f"mul(3.7,{text})",
        f"zsn_r({text})",
        f"mms_t({text})",
        f"add({text},mul({text},0.5))",
    ):
        assert rank_signature(parse(changed), probe, ROW).digest == digest, changed
    # These saturate on the synthetic matrix, so it takes the canonical form.
    for changed in (f"tanh({text})", f"exp(mul(5,{text}))"):
        form = canonicalise(parse(changed), "row")
        assert rank_signature(form, probe, ROW).digest == _digest(canonicalise(parse(text), "row").text, probe), changed
    assert _digest(f"neg({text})", probe) != digest


@pytest.mark.parametrize("rule", [ROW, LAYER, GLOBAL, MaskRule(pattern=(2, 4))], ids=str)
def test_published_metrics_do_not_collide(rule: MaskRule, probe: Probe) -> None:
    metrics = {name: CRITERIA[name] for name in CRITERIA}
    digests = {
        name: _digest(metric.expression.text, probe, rule)
        for name, metric in metrics.items()
        if isinstance(metric, Metric)
    }
    assert len({digests[name] for name in ("wanda", "ria", "pruner-zero", "magnitude")}) == 4
    assert len(set(digests.values())) == len(digests)


def test_groups_see_what_they_compare(probe: Probe) -> None:
    assert _digest("mul(abs(W),Y_l2)", probe) == _digest("abs(W)", probe)
    assert _digest("mul(abs(W),Y_l2)", probe, LAYER) != _digest("abs(W)", probe, LAYER)
    assert _digest("mul(abs(W),exp(depth))", probe, LAYER) == _digest("abs(W)", probe, LAYER)
    assert _digest("mul(abs(W),exp(depth))", probe, GLOBAL) != _digest("abs(W)", probe, GLOBAL)
    assert _digest("W", probe, MaskRule(pattern=(2, 4))) == _digest("W", probe, ROW)
    assert len({_digest("W", probe, rule) for rule in (ROW, LAYER, GLOBAL)}) == 3


def test_missing_statistics(probe: Probe) -> None:
    less = [{name: tensor for name, tensor in given.items() if name != "G_l2"} for given in probe.real]
    poorer = Probe(probe.names, (*less, probe.inputs[-1]))
    assert rank_signature(parse("mul(W,G_l2)"), poorer, ROW).reason == "STAT_MISSING"
    assert rank_signature(parse("mul(W,X_l2)"), poorer, ROW).reason is None


def test_statistics_that_are_not_finite(probe: Probe) -> None:
    given = dict(probe.inputs[1])
    given["X_l2"] = given["X_l2"].clone()
    given["X_l2"][0, 3] = torch.nan
    del given["X_ss"]
    broken = dataclasses.replace(probe, inputs=(probe.inputs[0], given, *probe.inputs[2:]))
    assert rank_signature(parse("mul(W,X_l2)"), broken, ROW).reason == "NONFINITE"


@pytest.mark.parametrize("rule", [ROW, LAYER, GLOBAL, MaskRule(0.3), MaskRule(pattern=(2, 4))], ids=str)
@pytest.mark.parametrize("text", ["tanh(mul(1000000,abs(W)))", "mul(0,W)", "add(100000,mul(0.001,W))", "max(W,0.2)"])
def test_ties(text: str, rule: MaskRule, probe: Probe) -> None:
    assert rank_signature(parse(text), probe, rule).reason == "TIES"


def test_ties_are_those_of_the_mask_rule(probe: Probe, tree: Callable[..., Expression]) -> None:
    """On one matrix at a time the verdict is that of `mask`, which sees the same rows."""
    refused = 0
    for index in range(150):
        expression = tree(random.Random(f"ties {index}"), height=2)
        rule = (ROW, LAYER, MaskRule(pattern=(2, 4)))[index % 3]
        given = probe.inputs[0]
        single = Probe(("a", "synthetic"), (given, probe.inputs[-1]))
        try:
            mask(evaluate(expression, given), rule, max_tied=MAX_TIED_ROWS)
            expected = None
        except InvalidCandidate as error:
            expected = error.reason
        refused += expected is not None
        assert rank_signature(expression, single, rule).reason == expected, expression.text
    assert 10 < refused < 140


def test_equal_signatures_mean_equal_masks(
    probe: Probe, tree: Callable[..., Expression], inputs: Callable[..., dict[str, Tensor]]
) -> None:
    """False merges, told by an independent probe, stay below 0.5 % of the metrics."""
    independent = inputs(77, 48, 96)
    first: dict[str, Tensor] = {}
    seen: set[Expression] = set()
    merged = wrong = 0
    for index in range(2500):
        draw = random.Random(f"merge {index}")
        expression = canonicalise(tree(draw, height=draw.randint(1, 3)), "row")
        if expression in seen:
            continue
        seen.add(expression)
        signature = rank_signature(expression, probe, ROW)
        if signature.reason is not None:
            continue
        keep = mask(evaluate(expression, independent), ROW)
        if signature.digest in first:
            merged += 1
            wrong += int((first[signature.digest] != keep).double().mean() > 1e-3)
        first.setdefault(signature.digest, keep)
    assert merged > 20
    assert wrong < 0.005 * (len(first) + merged)


def test_distances(probe: Probe) -> None:
    wanda = probe_scores(parse("mul(abs(W),X_l2)"), probe)
    assert [score.shape for score in wanda] == [(16, 48)] * 4
    reverse = [-score for score in wanda]
    for rule in (ROW, LAYER, GLOBAL, MaskRule(pattern=(2, 4))):
        assert behaviour_distance(wanda, wanda, rule) == 0
        assert behaviour_distance(wanda, reverse, rule) == 1
        magnitude = probe_scores(parse("abs(W)"), probe)
        assert 0.1 < behaviour_distance(wanda, magnitude, rule) < 0.9
    one = (torch.tensor([[True, True, False, False], [True, False, False, False]]),)
    other = (torch.tensor([[True, False, True, False], [True, False, False, False]]),)
    assert set_distance(one, other) == pytest.approx(1 - (1 / 3 + 1) / 2)
    assert share_that_differs(one, other) == pytest.approx(2 / 8)
    assert [int(gone.sum()) for gone in pruned_sets(wanda, ROW)] == [16 * 24] * 4
