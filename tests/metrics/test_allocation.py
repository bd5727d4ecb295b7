"""Allocations: repair against brute force and a bisection, files, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from evoprune.metrics.allocation import Allocation, SiteSparsity, allocation_of, exact_sparsity, repair
from evoprune.metrics.allocation_file import from_json, read_allocation, to_json, write_allocation
from evoprune.metrics.column_steps import nearest_moves
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.evopress import to_evopress
from evoprune.metrics.records import Site, removed_count

# Shapes of one block of Llama-3-8B and of one of GPT-2, as (out, in).
LLAMA = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
GPT2 = ((2304, 768), (768, 768), (3072, 768), (768, 3072))


def make_sites(*shapes: tuple[int, int]) -> list[Site]:
    return [Site(f"m.{index}", "k", index, len(shapes), *shape) for index, shape in enumerate(shapes)]


def removed(sites: list[Site], sparsities: tuple[float, ...]) -> int:
    """Weights that go, in whole rows of whole numbers."""
    return sum(
        site.out_features * math.floor(round(share * site.in_features, 6))
        for site, share in zip(sites, sparsities, strict=True)
    )


def test_a_hundred_thousand_repairs_meet_their_budget() -> None:
    """Allocation chapter, section 8, check 3: within one step of the smallest matrix, and within the bounds."""
    draw = random.Random(0)
    choices = [make_sites(*LLAMA), make_sites(*GPT2), make_sites((32, 32), (16, 32), (48, 32), (32, 48))]
    for _ in range(100_000):
        sites = draw.choice(choices)
        target = draw.random() * 0.99
        requested = [draw.gauss(target, 0.3) for _ in sites]
        weights = sum(site.weights for site in sites)
        most = sum(site.out_features * (site.in_features - 1) for site in sites)
        if removed_count(target, weights) > most:
            continue
        sparsities = repair(requested, sites, target)
        total = 0
        for site, share in zip(sites, sparsities, strict=True):
            columns = int(share * site.in_features + 1e-6)
            assert 0 <= columns < site.in_features
            total += columns * site.out_features
        smallest = min(sites, key=lambda site: site.weights).out_features
        assert abs(total - removed_count(target, weights)) < smallest


def test_no_other_columns_come_nearer_to_the_budget() -> None:
    draw = random.Random(1)
    for _ in range(400):
        step, other = draw.choice([(1, 3), (2, 5), (4, 6), (3, 3)])
        sites = make_sites((step, 6), (other, 5), (step, 4))
        target = draw.uniform(0, 0.7)
        budget = removed_count(target, sum(site.weights for site in sites))
        sums = (
            sum(count * site.out_features for count, site in zip(columns, sites, strict=True))
            for columns in itertools.product(*(range(site.in_features) for site in sites))
        )
        sparsities = repair([draw.gauss(target, 0.3) for _ in sites], sites, target)
        assert abs(removed(sites, sparsities) - budget) == min(abs(total - budget) for total in sums)


def test_what_is_not_saturated_moves_by_one_common_shift() -> None:
    """Against a bisection: clip(request + shift) with the shift that meets the budget, columns rounded."""
    draw = random.Random(2)
    sites = make_sites((8, 2000), (8, 4000), (16, 3000), (24, 1000))
    for _ in range(50):
        target = draw.uniform(0.1, 0.9)
        requested = [draw.gauss(target, 0.4) for _ in sites]

        def shifted(shift: float, requested: list[float] = requested) -> list[float]:
            tops = [1 - 1 / site.in_features for site in sites]
            return [min(max(share + shift, 0.0), top) for share, top in zip(requested, tops, strict=True)]

        low, high = -3.0, 3.0
        for _ in range(60):
            middle = (low + high) / 2
            total = sum(share * site.weights for share, site in zip(shifted(middle), sites, strict=True))
            low, high = (middle, high) if total < target * sum(site.weights for site in sites) else (low, middle)
        for share, expected, site in zip(repair(requested, sites, target), shifted(low), sites, strict=True):
            assert abs(share - expected) <= 2 / site.in_features


def test_repairs_are_stable() -> None:
    """Again gives the same; a permutation of unlike matrices permutes the result; equals get more in model order."""
    draw = random.Random(3)
    sites = make_sites(*LLAMA)
    for _ in range(200):
        target = draw.uniform(0.2, 0.8)
        requested = [target + draw.uniform(-0.15, 0.15) for _ in sites]
        once = repair(requested, sites, target)
        assert repair(once, sites, target) == once
        order = draw.sample(range(len(sites)), len(sites))
        permuted = repair([requested[index] for index in order], [sites[index] for index in order], target)
        assert permuted == tuple(once[index] for index in order)
    four = make_sites(*[(4, 10)] * 4)
    # 4 * 4 * 10 weights at 0.33 are 52, which is 13 columns of 4.
    assert repair([0.33] * 4, four, 0.33) == (0.4, 0.3, 0.3, 0.3)


def test_saturated_matrices_leave_the_rest_to_others() -> None:
    sites = make_sites((2, 10), (2, 10), (2, 10))
    assert repair([5.0, 0.0, 0.0], sites, 0.5) == (0.9, 0.3, 0.3)
    assert repair([0.5, -5.0, 0.5], sites, 0.6) == (0.9, 0.0, 0.9)
    assert repair([0.0, 0.5, 0.9], sites, 0.0) == (0.0, 0.0, 0.0)


def test_counts_are_those_of_the_decimal_number() -> None:
    draw = random.Random(4)
    for _ in range(20_000):
        total = draw.choice([7, 100, 4096, 14336, 6_738_415_616])
        sparsity = draw.choice([draw.random(), round(draw.random(), 2), draw.randrange(total) / total])
        assert removed_count(sparsity, total) == int(Decimal(repr(sparsity)) * total)


def test_a_sparsity_says_exactly_its_columns() -> None:
    for width in (3, 7, 10, 768, 4096, 14336, 3_000_001):
        for count in {0, 1, width // 3, width // 2, width - 1}:
            assert removed_count(exact_sparsity(count, width), width) == count
    assert exact_sparsity(1, 3) == 0.333334


def test_moves_of_columns_are_the_fewest() -> None:
    assert nearest_moves(16, {32: (9, 9), 48: (9, 9)}) == {32: -1, 48: 1}
    assert nearest_moves(-32, {32: (9, 9), 48: (9, 9)}) == {32: -1}
    assert nearest_moves(16, {32: (9, 9)}) == {}  # as near by removing too much: rather less
    assert nearest_moves(64, {32: (0, 1), 48: (0, 9)}) == {48: 1}
    assert nearest_moves(5, {}) == {}


@pytest.mark.parametrize(
    ("requested", "target", "message"),
    [
        ([0.5, math.nan], 0.5, "the sparsity of m.1 is nan"),
        ([0.5, math.inf], 0.5, "the sparsity of m.1 is inf"),
        ([0.5], 0.5, "1 sparsities for 2 matrices"),
        ([0.5, 0.5], 1.0, "outside [0, 1)"),
        ([0.5, 0.5], -0.1, "outside [0, 1)"),
        ([0.5, 0.5], math.nan, "outside [0, 1)"),
        ([0.5, 0.5], 0.98, "cannot be reached: it removes 78 of 80 weights, and 72 can go"),
    ],
)
def test_what_cannot_be_repaired(requested: list[float], target: float, message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        repair(requested, make_sites((4, 10), (4, 10)), target)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def allocation() -> Allocation:
    sites = make_sites(*GPT2)
    return allocation_of(
        [0.3, 0.5, 0.6, 0.7], sites, 0.55, model="GPT2LMHeadModel", allocator="owl", parameters={"spread": 0.1}
    )


def test_json_there_and_back(allocation: Allocation, tmp_path: Path) -> None:
    path = write_allocation(allocation, tmp_path / "allocation.json")
    assert read_allocation(path) == allocation
    assert read_allocation(path, model="GPT2LMHeadModel", sites=make_sites(*GPT2)) == allocation
    assert path.read_text().count("\n") == 7 + 2 + len(GPT2) + 2
    assert [file.name for file in tmp_path.iterdir()] == ["allocation.json"]
    assert abs(allocation.removed - removed_count(0.55, allocation.weights)) < 768


def test_evopress_there_and_back(allocation: Allocation, tmp_path: Path) -> None:
    path = write_allocation(allocation, tmp_path / "allocation.txt")
    lines = path.read_text().splitlines()
    first = allocation.sites[0]
    assert lines[0] == f"m.0: {first.removed - int(0.55 * first.weights)}"
    of: dict[str, Any] = {"model": "GPT2LMHeadModel", "sites": make_sites(*GPT2)}
    back = read_allocation(path, sparsity=0.55, step=1, **of)
    assert (back.sites, back.allocator) == (allocation.sites, "evopress")
    # By hand: a level is 58,982 weights, a tenth of the smallest matrix.
    path.write_text("m.1: 1\n  m.0 : 0\nm.2: -1\n\nm.3:0\n")
    hand = read_allocation(path, sparsity=0.5, step=58_982, **of)
    assert [round(site.sparsity, 3) for site in hand.sites] == [0.5, 0.599, 0.475, 0.5]
    assert abs(hand.removed - hand.weights // 2) < 768


def two_kinds() -> list[Site]:
    """Three blocks of an attention and an MLP of two matrices each."""
    shapes = {"attn.q": (8, 10), "attn.o": (10, 8), "mlp.up": (7, 10), "mlp.down": (10, 7)}
    return [Site(f"h.{block}.{kind}", kind, block, 3, *shape) for block in range(3) for kind, shape in shapes.items()]


def given(sites: list[Site], sparsity: float, shares: list[float]) -> Allocation:
    entries = [
        SiteSparsity(site.name, (site.out_features, site.in_features), share)
        for site, share in zip(sites, shares, strict=True)
    ]
    return Allocation("M", sparsity, tuple(entries), "hand")


def test_evopress_depth_lines_there_and_back(tmp_path: Path) -> None:
    sites = two_kinds()
    shares = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    dropped = 160 + 160 + 140
    path = write_allocation(given(sites, dropped / 900, shares), tmp_path / "allocation.txt")
    assert path.read_text() == "attn\nnone\nattn+mlp\n"
    back = read_allocation(path, model="M", sites=sites)
    assert [site.sparsity for site in back.sites] == shares
    assert (back.removed, back.sparsity, back.allocator) == (dropped, dropped / 900, "evopress")
    path.write_text("none\n\n mlp \nnone\n")
    assert [site.name for site in read_allocation(path, model="M", sites=sites).sites if site.sparsity] == [
        "h.1.mlp.up", "h.1.mlp.down",
    ]  # fmt: skip
    path.write_text("attn+mlp\n" * 3)
    with pytest.raises(InvalidInput, match="drop every attention and every MLP"):
        read_allocation(path, model="M", sites=sites)
    # Half an attention is no depth line, and neither are blocks of two stacks.
    assert to_evopress(given(sites, 80 / 900, [1.0] + [0.0] * 11)).startswith("h.0.attn.q: ")
    towers = [*sites, Site("tower.0.attn.q", "attn.q", 3, 4, 10, 10)]
    assert to_evopress(given(towers, dropped / 1000, [*shares, 0.0])).startswith("h.0.attn.q: ")


@pytest.mark.parametrize("sparsity", [0.5, 0.47, 0.6123])
def test_evopress_levels_of_matrices_that_are_gone(sparsity: float, tmp_path: Path) -> None:
    """Parts dropped beside levels of the others: the ones stay ones, and the others what they were."""
    sites = two_kinds()
    gone = {"h.1.attn.q", "h.1.attn.o", "h.2.mlp.up", "h.2.mlp.down"}
    stay = [site for site in sites if site.name not in gone]
    left = sum(site.weights for site in stay)
    target = (sparsity * 900 - (900 - left)) / left
    rest = iter(repair([target + 0.01 * index for index in range(len(stay))], stay, target))
    ours = given(sites, sparsity, [1.0 if site.name in gone else next(rest) for site in sites])
    path = write_allocation(ours, tmp_path / "allocation.txt")
    back = read_allocation(path, model="M", sites=sites, sparsity=sparsity, step=1)
    assert back.sites == ours.sites


@pytest.mark.parametrize(
    ("text", "sparsity", "step", "message"),
    [
        ("m.0: 0\nm.1: 0\nm.2: 0\nm.3: 0", None, 10, "holds neither its budget nor the weights in a level"),
        ("m.0: 0\nm.1: 0\nm.2: 0\nm.3: 0", 0.5, None, "holds neither its budget nor the weights in a level"),
        ("m.0: 0\nm.1: 0\nm.2: 0\nm.3: 0", 0.5, 0, "give a step of at least 1"),
        ("m.0: 0\nm.1: 9\nm.2: -9\nm.3: 0", 0.5, 100_000, "level 9 of m.1 is a sparsity of 2.026, outside [0, 1]"),
        ("m.0: 4\nm.1: 0\nm.2: 0\nm.3: 0", 0.5, 100_000, "not the budget of 0.5: give --sparsity 0.55"),
        ("m.0: 0\nm.1: 0\nm.2: 0", 0.5, 10, "gives m.3 no sparsity"),
        ("m.0: 0\nm.1: 0\nm.2: 0\nm.3: 0\nm.4: 0", 0.5, 10, "there is no m.4 here"),
        ("m.0: 0\nm.0: 0", 0.5, 10, "line 2 names m.0 again"),
        ("m.0: 0.5", 0.5, 10, "line 1 is 'm.0: 0.5'"),
        ("attn+mlp\nm.0: 0", 0.5, 10, "line 1 is 'attn+mlp'"),
        ("attn+mlp\nnone", 0.5, 10, "depth lines have no levels: leave out the step"),
        ("attn+mlp\nnone\nmlp", None, None, "3 depth lines, and this one has 4 blocks"),
        ("", 0.5, 10, "holds no allocation"),
    ],
)
def test_texts_that_are_refused(
    text: str, sparsity: float | None, step: int | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "profile.txt"
    path.write_text(text)
    with pytest.raises(InvalidInput) as refused:
        read_allocation(path, model="GPT2LMHeadModel", sites=make_sites(*GPT2), sparsity=sparsity, step=step)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def _set(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", value="evoprune-allocation/9"), "format 'evoprune-allocation/9' is not known"),
        (lambda document: document.pop("model"), "has no 'model'"),
        (_set("sites", 1, "sparsity", value=1.25), "the sparsity of m.1 is 1.25, outside [0, 1]"),
        (_set("sites", 1, "sparsity", value=-0.1), "the sparsity of m.1 is -0.1, outside [0, 1]"),
        (_set("sites", 1, "sparsity", value="all"), "the sparsity of m.1 is all, outside [0, 1]"),
        (_set("sites", 1, "sparsity", value=True), "the sparsity of m.1 is True, outside [0, 1]"),
        (_set("sites", 1, "shape", value=[768]), "entry 2 of 'sites' is no matrix"),
        (_set("sites", 1, value="m.1: 3"), "entry 2 of 'sites' is no matrix"),
        (_set("sites", 1, "name", value="m.0"), "m.0 is in it twice"),
        (_set("sites", value=[]), "at least one matrix"),
        (_set("sparsity", value=0.6), "its matrices lose 0.5500"),
        (_set("sparsity", value=1.5), "the budget 'sparsity' is 1.5, outside [0, 1)"),
    ],
)
def test_documents_that_are_refused(
    change: Callable[[Any], None], message: str, allocation: Allocation, tmp_path: Path
) -> None:
    document = to_json(allocation)
    change(document)
    with pytest.raises(InvalidInput) as refused:
        from_json(document)
    assert message in str(refused.value)
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match=r"'allocation\.json': "):
        read_allocation(path)


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    for content, message in (
        (b"\xff\xfe", "is no text file"),
        (b'{"format":' * 5000, "is not a JSON document"),
        (b'{"format": "evoprune-allocation/1", "sparsity": NaN}', "is not a JSON document"),
        (b"[1, 2]", "format 'list' is not known"),
    ):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match=message):
            read_allocation(path)
    with pytest.raises(InvalidInput, match="no file"):
        read_allocation(tmp_path / "none.json")
    with pytest.raises(InvalidInput, match="cannot write"):
        write_allocation(Allocation("M", 0.0, (), "uniform"), tmp_path / "none" / "allocation.json")


def test_an_allocation_of_another_model_is_named(allocation: Allocation) -> None:
    sites = make_sites(*GPT2)
    allocation.check("GPT2LMHeadModel", reversed(sites))
    wide = replace(sites[2], out_features=4096)
    for model, given, message in (
        ("OPTForCausalLM", sites, "their classes are not"),
        ("GPT2LMHeadModel", [*sites, replace(sites[0], name="m.9")], "gives m.9 no sparsity"),
        ("GPT2LMHeadModel", sites[1:], "there is no m.0 here"),
        ("GPT2LMHeadModel", [*sites[:2], wide, sites[3]], "m.2 is [4096, 768] here and [3072, 768] there"),
    ):
        with pytest.raises(InvalidInput) as refused:
            allocation.check(model, given)
        assert message in str(refused.value)


@pytest.mark.parametrize("sparsity", [1.01, -0.1, math.nan])
def test_a_record_refuses_what_is_no_sparsity(sparsity: float) -> None:
    with pytest.raises(InvalidInput, match=r"of m is outside \[0, 1\]"):
        SiteSparsity("m", (4, 4), sparsity)
