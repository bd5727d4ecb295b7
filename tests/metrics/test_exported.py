"""Loading metrics: names, expressions and exported files are found; all else is one clear line, and nothing runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import MetricExport
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import MAX_BYTES, load_metric
from evoprune.metrics.pruner_zero import PrunerZeroMetric
from evoprune.metrics.records import Site
from tests.resealed import rehashed, resealed

TUNED = Metric.from_text("mul(abs(W),mul(powc(X_l2,0.75),powc(G_l2,2/3)))", "layer", source="a search")


def refused(reference: str | Path) -> str:
    """The one line that a user sees."""
    with pytest.raises(InvalidInput) as caught:
        load_metric(str(reference))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("name", ["wanda", "wanda++", "pruner-zero", "random"])
def test_names(name: str) -> None:
    assert load_metric(name) is CRITERIA[name]


def test_expressions() -> None:
    assert load_metric(" mul(abs(W), X_l2) ") == Metric.from_text("mul(abs(W),X_l2)")
    assert load_metric("W") == Metric.from_text("W")
    assert load_metric("powc(W,1/3)") == Metric.from_text("powc(W,1/3)")


@pytest.mark.parametrize("metric", [m for n in CRITERIA if isinstance(m := CRITERIA[n], Metric)] + [TUNED])
def test_exports_come_back(metric: Metric, tmp_path: Path) -> None:
    export = MetricExport(metric, title="üñí", provenance={"model": "reference", "layers": {1: 2}})
    export.write(tmp_path / "metric.json")
    export.write(tmp_path / "metric.py")
    assert load_metric(str(tmp_path / "metric.json")) == metric
    loaded = load_metric(str(tmp_path / "metric.py"))
    assert isinstance(loaded, Metric)
    assert (loaded.expression, loaded.group) == (metric.expression, metric.group)


def test_a_long_formula_and_windows_line_ends_come_back(tmp_path: Path) -> None:
    long = Metric.from_text("mul(" * 20 + "W" + ",powc(X_l2,0.12345678901234567))" * 20)
    path = tmp_path / "metric.py"
    path.write_bytes(MetricExport(long).python_text.replace("\n", "\r\n").encode())
    loaded = load_metric(str(path))
    assert isinstance(loaded, Metric)
    assert loaded.expression == long.expression


def test_a_released_pruner_zero_tree_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "best_tree.json").write_text(
        '{"data": "mul", "left": {"data": "W"}, "right": {"data": "mms", "left": {"data": "G"}}}'
    )
    metric = load_metric(str(tmp_path / "best_tree.json"))
    assert isinstance(metric, PrunerZeroMetric)
    assert metric.needs == {"G_l2"}
    (tmp_path / "bad.json").write_text('{"data": "mul", "left": {"data": "W"}}')
    assert "left and right" in refused(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"data": "__import__", "left": {"data": "W"}}')
    assert "__import__" in refused(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.75", "0.8"),
        ("powc(X_l2,0.75)", "powc(X_l2,0.8)"),
        ("powc(X_l2, 0.75)", "powc(X_l2, 0.8)"),
        ('GROUP = "layer"', 'GROUP = "row"'),
        ("if exponent > 0:", "if exponent >= 0:"),
        ("BOUND = 1e30", "BOUND = 1e31"),
        ("stable=True", "stable=False"),
        ("a search", "b search"),
    ],
)
def test_an_edited_python_file_is_refused(old: str, new: str, tmp_path: Path) -> None:
    text = MetricExport(TUNED).python_text
    assert old in text
    (tmp_path / "metric.py").write_text(text.replace(old, new, 1))
    assert "was edited" in refused(tmp_path / "metric.py")


@pytest.mark.parametrize("key", ["expr", "group", "results", "title"])
def test_an_edited_json_file_is_refused(key: str, tmp_path: Path) -> None:
    document = MetricExport(TUNED).document
    document = {**document, key: ["mul", "W", "W"] if key == "expr" else "row"}
    (tmp_path / "metric.json").write_text(json.dumps(document))
    assert "was edited" in refused(tmp_path / "metric.json")


@pytest.mark.parametrize("ending", [".py", ".json"])
def test_files_that_are_no_exports(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"metric{ending}"
    assert "no file" in refused(path)
    assert "no file" in refused("x" * 5000 + ending) or "cannot read" in refused("x" * 5000 + ending)
    path.mkdir()
    assert "no file" in refused(path)
    path.rmdir()
    path.write_bytes(b" \n")
    assert "is empty" in refused(path)
    path.write_bytes(b"\x7fELF\x00\xff\xfe")
    assert "no text file" in refused(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    assert "larger than 1000 kB" in refused(path)
    for text in ("[]", "1", '"wanda"', "{}", "{", "import torch\n", "[" * 100_000, '{"a":' * 100_000, "\x00"):
        path.write_text(text)
        assert "not " in refused(path)


def test_another_format_or_dialect_is_named(tmp_path: Path) -> None:
    document = MetricExport(TUNED).document
    path = tmp_path / "metric.json"
    path.write_text(rehashed({**document, "format": "symbolic-metric/2"}))
    assert "'symbolic-metric/2' is not known" in refused(path)
    path.write_text(rehashed({**document, "dialect": "own"}))
    assert "dialect 'own'" in refused(path)
    path.write_text(rehashed({**document, "group": "column"}))
    assert "no group 'column'" in refused(path)
    path = tmp_path / "metric.py"
    path.write_text(resealed(MetricExport(TUNED).python_text.replace("metric/1", "metric/2")))
    assert "'symbolic-metric/2' is not known" in refused(path)


HOSTILE = [
    "__import__('os').system('touch CANARY')",
    "().__class__.__bases__[0].__subclasses__()",
    "W.__class__",
    "abs(W).__class__",
    "lambda: open('CANARY','w')",
    "(lambda: open('CANARY','w'))()",
    "(W:=open('CANARY','w'))",
    "abs(*W)",
    "abs(**{'x': W})",
    "abs(x=W)",
    "[abs(W)]",
    "abs(W) if W else W",
    "W**9**9**9",
    "powc(W,9**9**9)",
    "powc(W,1e400)",
    "powc(W,0/0)",
    "mul(W,nan)",
    "mul(W,1e999)",
    "mul(W,1j)",
    "mul(W,True)",
    "mul(W,b'x')",
    'mul(W,f\'{open("CANARY","w")}\')',
    "system(W)",
    "eval(W)",
    "abs(W,W)",
    "abs()",
    "abs(W);abs(W)",
    "abs(W)\nabs(W)",
    "abs(" * 100 + "W" + ")" * 100,
    "(" + "-" * 900 + "1)",
    "(" + "-" * 100_000 + "1)",
    "abs(" * 40_000,
    "abs(W)" + "\x00",
    "mul(W," + "9" * 900 + ")",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_content_is_refused_and_never_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(text)
    python = MetricExport(TUNED).python_text
    formula = f"FORMULA = {TUNED.expression.text!r}".replace("'", '"')
    assert formula in python
    for attack in (repr(text), text):
        (tmp_path / "metric.py").write_text(resealed(python.replace(formula, f"FORMULA = {attack}")))
        refused(tmp_path / "metric.py")
    document = MetricExport(TUNED).document
    for expr in (text, ["mul", "W", text], [text, "W"], {text: 1}):
        (tmp_path / "metric.json").write_text(rehashed({**document, "expr": expr}))
        refused(tmp_path / "metric.json")
        (tmp_path / "metric.json").write_text(json.dumps({"data": expr}))
        refused(tmp_path / "metric.json")
    assert not (tmp_path / "CANARY").exists()


def _nested(depth: int) -> Any:
    value: Any = "W"
    for _ in range(depth):
        value = ["abs", value]
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda: _nested(33),
        lambda: _nested(300),
        lambda: ["mul", "W", {"e": 1}],
        lambda: ["powc", "W", {"f": 1}],
        lambda: ["powc", "W", {"e": "1"}],
        lambda: ["powc", "W", {"e": 1e300}],
        lambda: ["powc", "W"],
        lambda: [["abs"], "W"],
        list,
        lambda: None,
        lambda: True,
        lambda: ["mul", "W", True],
        lambda: ["add", *["W"] * 100_000],
    ],
)
def test_a_json_of_another_shape_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    path = tmp_path / "metric.json"
    path.write_text(rehashed({**MetricExport(TUNED).document, "expr": make()}))
    refused(path)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1" * 10_000])
def test_numbers_that_json_has_not_are_refused(literal: str, tmp_path: Path) -> None:
    path = tmp_path / "metric.json"
    path.write_text(f'{{"format": "symbolic-metric/1", "expr": ["mul", "W", {literal}]}}')
    assert "not a JSON document" in refused(path)


def test_a_python_file_is_never_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attack = f"open({str(canary)!r}, 'w').close()\n"
    path = tmp_path / "metric.py"
    text = MetricExport(TUNED).python_text
    path.write_text(text + attack)
    assert "was edited" in refused(path)
    # Even with a seal of its own, the file is read and not run.
    path.write_text(resealed(text + attack))
    loaded = load_metric(str(path))
    assert isinstance(loaded, Metric)
    assert loaded.expression == TUNED.expression
    path.write_text(resealed(text + '\nFORMULA = "W"\n'))
    assert "assigned once" in refused(path)
    path.write_text(resealed(text.replace("FORMULA =", "FORMULAE =")))
    assert "no FORMULA" in refused(path)
    path.write_text(resealed(text + "def"))
    assert "no Python file" in refused(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("wnda", "did you mean 'wanda'?"),
        ("", "give a name of the criteria"),
        ("../secret", "give a name of the criteria"),
        ("abs(V)", "no terminal 'V'"),
        ("mul(W)", "mul takes 2 arguments"),
        ("x" * 100_000, "is no metric"),
        ("a\nb", "is no metric"),
    ],
)
def test_what_is_no_metric_is_told_in_one_line(reference: str, expected: str) -> None:
    assert expected in refused(reference)


def test_a_loaded_file_scores_like_its_metric(tmp_path: Path) -> None:
    MetricExport(TUNED).write(tmp_path / "metric.json")
    inputs = {"W": torch.randn(4, 6), "X_l2": torch.rand(1, 6), "G_l2": torch.rand(4, 6)}
    site = Site("site", "kind", 0, 1, 4, 6)
    assert torch.equal(load_metric(str(tmp_path / "metric.json")).score(site, inputs), TUNED.score(site, inputs))
