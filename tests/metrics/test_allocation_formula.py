"""Allocation formulas: values, the rule from scores to levels, files and exports."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evoprune.metrics.allocation_formula import AllocationFormula, formula_document, read_formula
from evoprune.metrics.emit_allocation import allocation_source
from evoprune.metrics.errors import InvalidExpression, InvalidInput, UnknownName
from evoprune.metrics.expression import Expression, call, constant, parse, terminal
from evoprune.metrics.formula_library import FORMULAS
from evoprune.metrics.formula_operators import FUNCTIONS
from evoprune.metrics.formula_rule import levels_at_budget, requested_sparsities
from evoprune.metrics.interpreter import evaluate
from evoprune.metrics.operators import OPERATORS
from evoprune.metrics.records import LEVELS, Site, removed_count
from evoprune.metrics.site_terminals import ALL_TERMINALS, SITE_TERMINALS, structure
from evoprune.metrics.terminals import TERMINALS

NAMES = tuple(SITE_TERMINALS)
HOSTILE = [0.0, 1e-38, -1e38, 1e38, 1e300, -1e300, 1.0, -1.0, 1e-300]


def drawn_expression(rng: random.Random, height: int) -> Expression:
    """Any tree of the language, the silly ones too."""
    if height == 0 or rng.random() < 0.2:
        if rng.random() < 0.2:
            return constant(rng.choice([0.0, 1.0, -3.5, 1e6, -1e6, 1e-6]))
        return terminal(rng.choice(NAMES), SITE_TERMINALS)
    name = rng.choice(list(FUNCTIONS))
    args = [drawn_expression(rng, height - 1) for _ in range(OPERATORS[name].arity)]
    if OPERATORS[name].kind == "power":
        return call(name, *args, exponent=rng.choice([0.0, 0.5, -2.0, 3.0, 1e6, -1e6]))
    return call(name, *args)


def drawn_statistics(rng: random.Random, count: int, *, hostile: bool) -> dict[str, list[float]]:
    draw = (lambda: rng.choice(HOSTILE)) if hostile else (lambda: rng.uniform(-2, 2))
    return {name: [draw() for _ in range(count)] for name in NAMES}


def sites_of(sizes: list[tuple[int, int]]) -> list[Site]:
    return [
        Site(f"layers.{at}.self_attn.q", "self_attn.q", at, len(sizes), rows, columns)
        for at, (rows, columns) in enumerate(sizes)
    ]


def drawn_sizes(rng: random.Random) -> list[tuple[int, int]]:
    widths = [8, 16, 48, 96, 300, 512, 1000]
    return [(rng.choice(widths), rng.choice(widths[1:])) for _ in range(rng.randint(4, 12))]


def removed(levels: list[int], sizes: list[tuple[int, int]]) -> int:
    """Weights that go, row by row."""
    return sum(rows * (level * columns // 256) for level, (rows, columns) in zip(levels, sizes, strict=True))


def test_no_terminal_has_two_meanings() -> None:
    assert not set(TERMINALS) & set(SITE_TERMINALS)
    assert len(ALL_TERMINALS) == len(TERMINALS) + len(SITE_TERMINALS)
    for name in SITE_TERMINALS:
        with pytest.raises(UnknownName):
            parse(name)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_operators_do_what_their_tensor_forms_do(name: str) -> None:
    rng = random.Random(name)
    for _ in range(20):
        x, y = ([rng.choice([-1, 1]) * 10 ** rng.uniform(-6, 6) for _ in range(5)] for _ in range(2))
        x[rng.randrange(5)] = 0.0
        tensors = [torch.tensor([row]) for row in (x, y)[: OPERATORS[name].arity]]
        power = [rng.choice([0.5, -1.5, 2.0])] if OPERATORS[name].kind == "power" else []
        expected = OPERATORS[name].function(*tensors, *power).expand(1, 5)[0].tolist()
        found = FUNCTIONS[name](*(x, y)[: OPERATORS[name].arity], *power)
        scale = max(map(abs, expected))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale)


def test_formulas_mean_what_the_interpreter_makes_of_one_row() -> None:
    rng, compared = random.Random(1), 0
    for _ in range(200):
        statistics = drawn_statistics(rng, 6, hostile=False)
        expression = drawn_expression(rng, 3)
        inputs = {name: torch.tensor([values]) for name, values in statistics.items()} | {"W": torch.zeros(1, 6)}
        expected = evaluate(expression, inputs)[0].tolist()
        if max(map(abs, expected)) > 1e3:  # float32 is no reference there
            continue
        found = AllocationFormula(expression, 0.1).scores(statistics)
        compared += found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    # A few differ where a normaliser blows up what float32 has rounded.
    assert compared > 120


def test_nothing_but_finite_numbers_comes_out() -> None:
    rng = random.Random(2)
    for _ in range(3000):
        formula = AllocationFormula(drawn_expression(rng, 5), rng.uniform(0, 1))
        scores = formula.scores(drawn_statistics(rng, 7, hostile=True))
        assert all(map(math.isfinite, scores))
        asked = requested_sparsities(scores, formula.spread, rng.random())
        assert len(asked) == 7 and all(0 <= share <= 1 for share in asked)


def test_the_rule_is_that_of_numpy() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        scores, spread, target = (
            rng.normal(size=9) * 10 ** rng.uniform(-3, 3),
            rng.uniform(0, 0.5),
            rng.uniform(0.2, 0.8),
        )
        z = (scores - scores.mean()) / scores.std()
        logistic = 2 / (1 + np.exp(-z)) - 1
        expected = np.clip(target - spread * logistic, 0, 1)
        assert requested_sparsities(scores.tolist(), spread, target) == pytest.approx(expected.tolist(), abs=1e-8)


def test_the_rule_by_hand() -> None:
    # The mean is 0 and the deviation 1, so that z is the score itself.
    assert requested_sparsities([1.0, -1.0], 0.2, 0.5) == pytest.approx(
        [0.5 - 0.2 * math.tanh(0.5), 0.5 + 0.2 * math.tanh(0.5)]
    )
    assert requested_sparsities([7.0, 7.0, 7.0], 0.9, 0.3) == [0.3] * 3
    assert requested_sparsities([1.0, -1.0], 1.0, 0.9)[1] == 1.0


def test_levels_by_hand() -> None:
    # 256 columns: a level is a column; 8 + 4 rows, 12 * 128 weights have to go.
    assert levels_at_budget([0.5, 0.5], [(8, 256), (4, 256)], 12 * 128) == [128, 128]
    # Of a width of 16 every 16th level removes a column more, and the lowest of equal ones is meant.
    assert levels_at_budget([0.5], [(3, 16)], 3 * 8) == [128]
    assert levels_at_budget([0.0, 0.5], [(4, 16), (4, 16)], 4 * 8) == [0, 128]
    with pytest.raises(ValueError, match="the matrices can lose 60"):
        levels_at_budget([0.5, 0.5], [(2, 16), (2, 16)], 64)


def test_every_formula_meets_the_budget() -> None:
    rng, missed = random.Random(4), 0
    for _ in range(400):
        sizes, sparsity = drawn_sizes(rng), round(rng.uniform(0.05, 0.9), 3)
        formula = AllocationFormula(drawn_expression(rng, 4), rng.uniform(0, 0.6))
        statistics = drawn_statistics(rng, len(sizes), hostile=rng.random() < 0.3)
        levels = formula.levels(statistics, sizes, sparsity)
        budget = removed_count(sparsity, sum(rows * columns for rows, columns in sizes))
        # Half of the smallest step: a column, or as many as the smallest difference of two levels.
        step = min(rows * max(columns // LEVELS, 1) for rows, columns in sizes)
        residue = abs(removed(levels, sizes) - budget)
        assert residue <= max(step // 2, *(rows for rows, _ in sizes))
        missed += residue > step // 2
        assert all(0 <= level < LEVELS for level in levels)
        # The lowest of the levels that remove as much.
        for level, (_, columns) in zip(levels, sizes, strict=True):
            assert level == 0 or (level - 1) * columns // 256 < level * columns // 256
    assert missed <= 8  # where few matrices have room


def test_levels_stay_near_to_what_is_asked_for() -> None:
    """The shift that meets the budget is common to all, to within a level or two of rounding."""
    rng = random.Random(5)
    for _ in range(50):
        sizes = [(rng.choice([64, 128]), 512) for _ in range(10)]
        asked = [rng.uniform(0.4, 0.6) for _ in sizes]
        levels = levels_at_budget(asked, sizes, sum(rows * columns for rows, columns in sizes) // 2)
        shifts = [level / 256 - share for level, share in zip(levels, asked, strict=True)]
        assert max(shifts) - min(shifts) < 2.5 / 256


def test_structure_by_hand() -> None:
    sites = [
        Site("layers.0.self_attn.q", "self_attn.q", 0, 3, 4, 8),
        Site("layers.1.mlp.up", "mlp.up", 1, 3, 12, 8),
        Site("layers.2.mlp.down", "mlp.down", 2, 3, 8, 20),
    ]
    found = structure(sites)
    assert found["position"] == [0.0, 0.5, 1.0]
    assert (found["first"], found["last"]) == ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    assert (found["attention"], found["mlp"]) == ([1.0, 0.0, 0.0], [0.0, 1.0, 1.0])
    assert found["share"] == [32 / 96, 96 / 96, 160 / 96]
    assert found["fan_in"] == [math.log(8), math.log(8), math.log(20)]
    assert found["fan_out"] == [math.log(4), math.log(12), math.log(8)]


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_published_formulas_read_back(name: str, tmp_path: Path) -> None:
    formula = FORMULAS[name].formula
    assert FORMULAS[name].source
    file = tmp_path / "formula.json"
    file.write_text(json.dumps(formula_document(formula, {"run": "r"})))
    assert read_formula(file) == formula


def test_the_published_signs() -> None:
    """What the papers keep dense is kept dense."""
    sites = sites_of([(64, 256)] * 4)
    statistics = structure(sites) | {
        name: [4.0, 3.0, 2.0, 1.0]
        for name in ("outliers_block", "influence", "diversity", "logvar_block", "tail_block")
    }
    for name, keeps in (
        ("owl", 0),
        ("block-influence", 0),
        ("diversity", 0),
        ("depth", 0),
        ("dsa", 3),
        ("alpha-pruning", 3),
    ):
        sparsities = FORMULAS[name].formula.sparsities(statistics, sites, 0.5)
        assert sparsities.index(min(sparsities)) == keeps, name


HOSTILE_EXPRESSIONS: list[Any] = [
    "W",
    "__import__",
    ["rsum", "position"],
    ["mul", "position"],
    ["powc", "position", {"e": "1"}],
    ["powc", "position", {"e": 1e300}],
    [["mul"], "position"],
    ["mul", "position", None],
    {"mul": 1},
    None,
    "",
    "position.__class__",
    ["eval", "position"],
    1e300,
    ["add"] * 5,
    True,
]


@pytest.mark.parametrize("expression", HOSTILE_EXPRESSIONS, ids=range(len(HOSTILE_EXPRESSIONS)))
def test_hostile_expressions_are_refused_in_one_line(expression: Any, tmp_path: Path) -> None:
    document = formula_document(FORMULAS["owl"].formula, {}) | {"expr": expression}
    refused(tmp_path, resealed(document))


@pytest.mark.parametrize("spread", ["0.1", None, True, -0.1, 1.5, float("inf"), [], 1e400])
def test_hostile_spreads_are_refused(spread: Any, tmp_path: Path) -> None:
    document = formula_document(FORMULAS["owl"].formula, {}) | {"spread": spread}
    refused(tmp_path, resealed(document) if spread not in (float("inf"),) else document)


def test_edits_deep_nests_and_other_versions_are_refused(tmp_path: Path) -> None:
    document = formula_document(FORMULAS["owl"].formula, {})
    refused(tmp_path, document | {"spread": 0.3})
    refused(tmp_path, document | {"format": "evoprune-allocation-formula/2"})
    nested: Any = "position"
    for _ in range(100):
        nested = ["neg", nested]
    refused(tmp_path, resealed(document | {"expr": nested}))


def test_other_files_are_no_formulas(tmp_path: Path) -> None:
    for text in ("", "[]", "{", '{"format": "evoprune-allocation/1"}', "[" * 100_000, '{"format": 3}'):
        file = tmp_path / "other.json"
        file.write_text(text)
        assert read_formula(file) is None
    assert read_formula(tmp_path / "missing.json") is None


def resealed(document: dict[str, Any]) -> dict[str, Any]:
    from evoprune.metrics.files import content_hash

    content = {key: value for key, value in document.items() if key != "sha256"}
    return {**content, "sha256": content_hash(content)}


def refused(folder: Path, document: dict[str, Any]) -> None:
    file = folder / "formula.json"
    file.write_text(json.dumps(document))
    with pytest.raises(InvalidInput) as error:
        read_formula(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_expressions_of_metrics_are_no_formulas() -> None:
    with pytest.raises(UnknownName):
        AllocationFormula(parse("abs(W)"), 0.1)
    with pytest.raises(InvalidExpression):
        AllocationFormula(Expression("rsum", (Expression("position"),)), 0.1)
    with pytest.raises(InvalidInput, match="reads influence"):
        AllocationFormula.from_text("influence", 0.1).scores({"position": [0.0]})


def test_the_exported_file_needs_nothing_and_gives_the_same(tmp_path: Path) -> None:
    rng = random.Random(6)
    for number in range(12):
        sizes, sparsity = drawn_sizes(rng), round(rng.uniform(0.2, 0.8), 2)
        sites, statistics = sites_of(sizes), drawn_statistics(rng, len(sizes), hostile=False)
        formula = AllocationFormula(drawn_expression(rng, 4), round(rng.uniform(0.05, 0.5), 3))
        file = tmp_path / f"allocation_{number}.py"
        title = 'a """ title \\ with\nodd letters'
        file.write_text(allocation_source(formula, statistics, sites, sparsity, title=title))
        # -I and -S: no path of ours, no installed package.
        done = subprocess.run([sys.executable, "-I", "-S", str(file)], capture_output=True, text=True, check=True)
        expected = formula.sparsities(statistics, sites, sparsity)
        assert json.loads(done.stdout) == dict(zip([site.name for site in sites], expected, strict=True))


def test_the_exported_function_takes_another_model(tmp_path: Path) -> None:
    formula = AllocationFormula.from_text("sub(first,mul(0.5,position))", 0.3)
    ours, theirs = sites_of([(32, 256)] * 3), sites_of([(16, 512), (64, 128), (32, 96), (8, 1000)])
    file = tmp_path / "allocation.py"
    file.write_text(allocation_source(formula, structure(ours), ours, 0.5, title="t"))
    script = (
        f"import json, runpy; found = runpy.run_path({str(file)!r}); "
        f"sizes = {[(site.out_features, site.in_features) for site in theirs]!r}; "
        f"print(json.dumps(found['allocate']({structure(theirs)!r}, sizes, 0.7)))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == formula.sparsities(structure(theirs), theirs, 0.7)
