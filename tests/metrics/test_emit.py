"""Exported metrics: the .py stands alone and computes what the interpreter computes; .json and .tex say the same."""

from __future__ import annotations

import ast
import importlib
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import MetricExport, latex, to_text
from evoprune.metrics.emit_runtime import draw
from evoprune.metrics.emit_runtime import removed_count as exported_removed_count
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.expression import CONSTANT, Expression, parse
from evoprune.metrics.files import content_hash
from evoprune.metrics.interpreter import evaluate, free_inputs
from evoprune.metrics.mask import mask
from evoprune.metrics.operators import OPERATORS
from evoprune.metrics.records import MaskRule, Site, removed_count
from evoprune.metrics.terminals import TERMINALS
from evoprune.metrics.types import Type

METRICS = {name: criterion for name in CRITERIA if isinstance(criterion := CRITERIA[name], Metric)}
OUT, IN = 24, 48
RULES = [MaskRule(sparsity=0.29), MaskRule(sparsity=0.7), MaskRule(pattern=(2, 4)), MaskRule(pattern=(1, 3))]

# In a fresh interpreter without our package: run every file as a script, then score and mask the inputs of the test.
CHILD = """
import runpy, sys
from pathlib import Path
for name in ("evoprune", "numpy", "transformers", "safetensors"):
    sys.modules[name] = None
import torch
folder = Path(sys.argv[1])
inputs = torch.load(folder / "inputs.pt", weights_only=True)
found = {}
for path in sorted(folder.glob("*.py")):
    try:
        runpy.run_path(str(path), run_name="__main__")
        code = -1
    except SystemExit as stop:
        code = stop.code
    module = runpy.run_path(str(path), run_name="metric")
    stats = {name: inputs[name] for name in module["REQUIRES"]}
    found[path.stem] = {"code": code, "score": module["score"](inputs["W"], **stats)}
torch.save(found, folder / "found.pt")
"""


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random matrix and random statistics of every kind; signs as declared."""
    generator = torch.Generator().manual_seed(3)
    values = {}
    for name, terminal in TERMINALS.items():
        value = torch.randn(terminal.type.shape(OUT, IN), generator=generator)
        values[name] = value.abs() if terminal.sign <= {0, 1} else value
    site = Site("site", "kind", 1, 3, OUT, IN)
    return {**values, **free_inputs(site, values["W"].to(dtype), 0.5)}


def exported(metric: Metric | str, folder: Path, **about: Any) -> dict[str, Any]:
    """The namespace of an exported file."""
    metric = Metric.from_text(metric) if isinstance(metric, str) else metric
    path = folder / "metric.py"
    MetricExport(metric, **about).write(path)
    return runpy.run_path(str(path), run_name="metric")


def statistics(names: tuple[str, ...], values: dict[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of an exported score; scalars as plain numbers."""
    return {name: values[name].item() if TERMINALS[name].type is Type.SCAL else values[name] for name in names}


def test_every_library_metric_stands_alone(tmp_path: Path) -> None:
    values = inputs()
    torch.save(values, tmp_path / "inputs.pt")
    for name, metric in METRICS.items():
        MetricExport(metric, title=name).write(tmp_path / f"{name}.py")
    wanda = (tmp_path / "wanda.py").read_text()
    (tmp_path / "edited-helper.py").write_text(wanda.replace("BOUND = 1e30", "BOUND = 1e29"))
    (tmp_path / "edited-formula.py").write_text(wanda.replace("X_l2)", "X_l1)", 1))
    gblm = (tmp_path / "gblm.py").read_text()
    (tmp_path / "edited-constant.py").write_text(gblm.replace(", 100.0,", ", 101.0,"))
    assert len({path.read_text() for path in tmp_path.glob("*.py")}) == len(METRICS) + 3
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert {name: found[name]["code"] for name in METRICS} == dict.fromkeys(METRICS, 0)
    assert {name: entry["code"] for name, entry in found.items() if name.startswith("edited")} == {
        "edited-helper": 1, "edited-formula": 1, "edited-constant": 1,
    }  # fmt: skip
    for name, metric in METRICS.items():
        assert torch.equal(found[name]["score"], evaluate(metric.expression, values)), name


def test_a_changed_computation_fails_even_without_the_seal(tmp_path: Path) -> None:
    path = tmp_path / "metric.py"
    MetricExport(Metric.from_text("mul(abs(W),powc(X_l2,0.75))")).write(path)
    assert runpy.run_path(str(path))["_selftest"]()
    path.write_text(path.read_text().replace("powc(X_l2, 0.75)", "powc(X_l2, 0.76)"))
    assert not runpy.run_path(str(path))["_selftest"]()


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_exports_bit_for_bit(name: str, tmp_path: Path) -> None:
    values = inputs()
    operator = OPERATORS[name]
    for leaf in ("W", "X_mean", "Y_l2", "depth"):
        if operator.kind == "power":
            node = Expression("add", (Expression(name, (parse(leaf),), 0.7), Expression(name, (parse(leaf),), -1.5)))
        else:
            node = Expression(name, (parse(leaf), parse("G_l2"))[: operator.arity])
        metric = Metric(Expression("mul", (parse("W"), node)))
        module = exported(metric, tmp_path)
        expected = evaluate(metric.expression, values)
        assert torch.equal(module["score"](values["W"], **statistics(module["REQUIRES"], values)), expected), leaf


LONG = "add(mul(mul(abs(W),csum(X_l2)),mul(n_in,sub(n_out,0.5))),mul(rl2(X_l2),mul(zsn_r(G_mean),mul(sparsity,depth))))"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["mul(abs(W),powc(X_l2,1/3))", LONG])
def test_any_layout_and_dtype_gives_the_interpreters_bits(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    values = inputs(dtype)
    module = exported(text, tmp_path)
    stats = statistics(module["REQUIRES"], values)
    stored = values["W"].to(dtype)
    transposed = stored.t().contiguous().t()
    strided = torch.zeros(OUT, 2 * IN, dtype=dtype)
    strided[:, ::2] = stored
    for weight in (stored, transposed, strided[:, ::2]):
        expected = evaluate(parse(text), {**values, "W": weight.float()})
        before = weight.clone()
        scores = module["score"](weight, **stats)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, expected)
        assert torch.equal(weight, before)
    if "X_l2" in stats:
        flat = {**stats, "X_l2": stats["X_l2"].reshape(-1)}
        assert torch.equal(module["score"](stored, **flat), module["score"](stored, **stats))


@pytest.mark.parametrize("group", ["row", "layer", "global"])
@pytest.mark.parametrize("text", ["mul(abs(W),X_l2)", "min(abs(W),0.5)", "mul(sparsity,W)", "X_l2"])
def test_masks_are_the_librarys(text: str, group: str, tmp_path: Path) -> None:
    values = inputs()
    module = exported(Metric.from_text(text, group), tmp_path)  # type: ignore[arg-type]
    stats = statistics(module["REQUIRES"], values)
    stats.pop("sparsity", None)
    for rule in RULES:
        # A standalone mask sees one matrix.
        rule = replace(rule, group="row" if group == "row" else "layer")
        scores = evaluate(parse(text), {**values, "sparsity": torch.full((1, 1), rule.fraction)})
        asked = {"nm": rule.pattern} if rule.pattern else {"sparsity": rule.sparsity}
        assert torch.equal(module["mask"](values["W"], **asked, **stats), mask(scores, rule)), str(rule)


def test_a_pattern_is_the_default_where_the_search_used_one(tmp_path: Path) -> None:
    values = inputs()
    module = exported("abs(W)", tmp_path, rule=MaskRule(pattern=(2, 4)))
    assert torch.equal(module["mask"](values["W"]), mask(values["W"].abs(), MaskRule(pattern=(2, 4))))
    assert torch.equal(module["mask"](values["W"], 0.25), mask(values["W"].abs(), MaskRule(sparsity=0.25)))


def test_masks_refuse_what_the_library_refuses(tmp_path: Path) -> None:
    module = exported("abs(W)", tmp_path)
    weight = inputs()["W"].clone()
    for asked in ({"nm": (2, 5)}, {"nm": (4, 4)}, {"sparsity": 1.0}, {"sparsity": -0.1}):
        with pytest.raises(ValueError, match=r"needs 0 < N < M|outside \[0, 1\)"):
            module["mask"](weight, **asked)
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        module["mask"](weight)


@pytest.mark.parametrize("sparsity", [0, 0.29, 0.1, 1 / 3, 1e-5, 2.5e-7, 0.999999, 0.5])
@pytest.mark.parametrize("total", [1, 7, 100, 4096, 123456789])
def test_the_exported_count_is_exact(sparsity: float, total: int) -> None:
    assert exported_removed_count(sparsity, total) == removed_count(sparsity, total)


def test_the_file_is_short_clean_and_imports_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metric.py"
    MetricExport(Metric.from_text(LONG), rule=MaskRule(pattern=(2, 4))).write(path)
    text = path.read_text()
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert names == {"torch", "hashlib", "math", "sys"}
    assert len(text.splitlines()) < 200
    assert max(map(len, text.splitlines())) <= 120
    rules = "E,F,W,I,B,UP,SIM,C4,RUF,PIE,RET"
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=120", f"--select={rules}"]
    done = subprocess.run([*ruff, "--ignore=RUF001,RUF002", str(path)], capture_output=True, text=True, timeout=60)
    if "No module named ruff" not in done.stderr:
        assert done.returncode == 0, done.stdout


def test_shared_subexpressions_are_computed_once(tmp_path: Path) -> None:
    text = MetricExport(METRICS["ria"]).python_text
    body = text[text.index("def score") : text.index("def removed_count")]
    assert body.count("absolute(") == 1


def test_the_header_cannot_break_out(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attack = f'"""\nopen({str(canary)!r}, "w")\n"""\\'
    export = MetricExport(
        METRICS["wanda"],
        title=attack,
        provenance={"model": attack, "seed": 3},
        results={"heldout_perplexity": {attack: 1}},
    )
    export.write(tmp_path / "metric.py")
    assert runpy.run_path(str(tmp_path / "metric.py"))["_selftest"]()
    assert not canary.exists()
    assert all(line.startswith("%") for line in export.tex_text.splitlines()[:3])


def test_the_json_says_all(tmp_path: Path) -> None:
    export = MetricExport(
        Metric.from_text("mul(abs(W),powc(X_l2,0.75))", source="here"),
        title="tuned",
        provenance={"model": "reference", "seed": 3, "layers": {2: "x", 10: "y"}},
        results={"fitness": 0.1},
        equivalent_to=("wanda",),
    )
    document = json.loads(export.json_text)
    assert document.pop("sha256") == content_hash(document)
    assert document["expr"] == ["mul", ["abs", "W"], ["powc", "X_l2", {"e": 0.75}]]
    assert document["requires"] == ["X_l2"]
    assert {"format", "dialect", "group", "expr", "canonical", "latex", "requires", "complexity", "provenance"} < set(
        document
    )
    assert {"results", "equivalent_to", "selftest"} < set(document)
    assert f"metric-json sha256: {export.document['sha256']}" in export.python_text
    assert f"metric-json sha256: {export.document['sha256']}" in export.tex_text
    test = document["selftest"]
    assert test["mask_sha256"] in export.python_text
    assert len(test["samples"]) == 8
    with pytest.raises(ValueError, match="JSON"):
        _ = MetricExport(METRICS["wanda"], results={"fitness": float("nan")}).document


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\.py, \.json or \.tex"):
        MetricExport(METRICS["wanda"]).write(tmp_path / "metric.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected", "plain"),
    [
        ("mul(abs(W),powc(X_l2,0.75))", r"|W| \cdot \lVert X\rVert_2^{0.75}", "|W|·‖X‖₂^0.75"),
        ("mul(sqr(W),mms_t(G_l2))", r"W^{2} \operatorname{minmax}(\lVert G\rVert_2)", "W²·minmax(‖G‖₂)"),
        ("div(sqr(W),Hinv)", r"\frac{W^{2}}{[H^{-1}]_{jj}}", "W² / H⁻¹ⱼⱼ"),
        (
            "mul(abs(W),sqrt(add(X_ss,Y_ss)))",
            r"|W| \sqrt{\lVert X\rVert_2^2 + \lVert Y\rVert_2^2}",
            "|W|·√(‖X‖₂² + ‖Y‖₂²)",
        ),
        (
            "mul(add(div(abs(W),csum(abs(W))),X_l2),powc(X_ss,1/3))",
            r"\left(\frac{|W|}{\operatorname{sum}_\mathrm{col}(|W|)} + \lVert X\rVert_2\right)"
            r" (\lVert X\rVert_2^2)^{1/3}",
            "(|W| / csum(|W|) + ‖X‖₂)·(‖X‖₂²)^(1/3)",
        ),
        (
            "sub(mul(W,-2.5),sub(log(W),neg(powc(div(W,X_l2),2))))",
            r"(-2.5) W - \left(\log |W| - \left(-\left\lvert \frac{W}{\lVert X\rVert_2} \right\rvert^{2}\right)\right)",
            "(-2.5)·W - (log(|W|) - (-(abs(W / ‖X‖₂))^2))",
        ),
    ],
)
def test_formulas_read_well(text: str, expected: str, plain: str) -> None:
    assert latex(parse(text)) == expected
    assert to_text(parse(text)) == plain


def test_every_terminal_and_operator_has_a_formula() -> None:
    for name in TERMINALS:
        assert to_text(parse(name)) and latex(parse(name)).count("{") == latex(parse(name)).count("}")
    for name, operator in ((name, OPERATORS[name]) for name in OPERATORS):
        node = Expression(name, (parse("W"),) * operator.arity, 0.5 if operator.kind == "power" else None)
        assert latex(node).count("{") == latex(node).count("}")
        assert "W" in to_text(node)


def test_pruner_zeros_tex_explains_its_minmax() -> None:
    text = MetricExport(METRICS["pruner-zero"]).tex_text
    assert r"$\operatorname{minmax}(x) = (x - \min x)/(\max x - \min x)$" in text
    assert r"S \propto W^{2} (\lVert G\rVert_2 - \operatorname{min}_\mathrm{all}(\lVert G\rVert_2))." in text
    assert r"\propto" not in MetricExport(METRICS["wanda"]).tex_text
    assert r"\propto" not in MetricExport(replace(METRICS["pruner-zero"], group="global")).tex_text


def test_a_selftest_avoids_near_ties() -> None:
    export = MetricExport(Metric.from_text("mul(abs(W),exp(X_l2))"))
    scores = evaluate(export.metric.expression, _selftest_inputs(export))
    ranked = scores.sort(dim=1).values
    middle = scores.shape[1] // 2
    assert ((ranked[:, middle] - ranked[:, middle - 1]) / ranked[:, middle]).min() > 1e-4
    assert CONSTANT not in export.selftest.seeds


def _selftest_inputs(export: MetricExport) -> dict[str, Tensor]:
    width = export.selftest.columns
    drawn = {name: draw(seed, *TERMINALS[name].type.shape(8, width)) for name, seed in export.selftest.seeds.items()}
    return {**drawn, "W": 2 * drawn["W"] - 1}


@pytest.mark.slow
@pytest.mark.parametrize("text", ["mul(abs(W),powc(X_l2,0.75))", LONG])
def test_scores_compile(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = inputs()
    name = f"exported_metric_{len(text)}"
    MetricExport(Metric.from_text(text)).write(tmp_path / f"{name}.py")
    # The compiler looks a function's module up by name.
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(name)
    stats = statistics(module.REQUIRES, values)
    expected = module.score(values["W"], **stats)
    compiled = torch.compile(module.score, fullgraph=True)
    torch.testing.assert_close(compiled(values["W"], **stats), expected, rtol=1e-5, atol=1e-6)
