"""The report of a real search on a tiny random model."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import yaml

from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import latex
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.expression import Expression, call, parse, terminal
from evoprune.metrics.operators import OPERATORS
from evoprune.metrics.records import split_site
from evoprune.metrics.terminals import TERMINALS
from evoprune.search.config import MetricSearchConfig, validated
from evoprune.search.report import write_report
from evoprune.search.report.data import Entry, ReportData
from evoprune.search.report.figures_result import agreement
from evoprune.search.report.figures_search import rungs
from evoprune.search.report.formula import formula_svg, mathtext
from evoprune.search.report.labels import spread
from evoprune.search.report.latex_table import latex_table
from evoprune.search.report.lineage import ancestors, main_line
from evoprune.search.report.numbers import alike
from evoprune.search.report.page import render
from evoprune.search.report.run_data import Contender
from evoprune.search.report.tree import tree_svg
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources
from tests.models import save_tiny
from tests.search.html_page import Page

NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def config_of(model: Path) -> MetricSearchConfig:
    return validated(
        {
            "model": {"name": str(model)},
            "data": {"window": 16, "heldout_windows": 4, "calibration_sequences": 4, "calibration_window": 16},
            "racing": {"rungs": [1, 2, 4], "uniform": 0.5},
            "searcher": {"population": 8, "islands": 2, "power_budget": 3, "seeds": ["wanda", "magnitude", "gblm"]},
            "evaluations": 24,
        }
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished search, with its report."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOPRUNE_CACHE", str(folder / "cache"))
        model = save_tiny(folder / "model")
        run = start_search(config_of(model), Resources(executor="inline"), run_dir=folder / "run")
    write_report(run)
    yield folder / "run"


@pytest.fixture
def changed(finished: Path, tmp_path: Path) -> RunDirectory:
    """A copy of the run that a test may change."""
    shutil.copytree(finished, tmp_path / "run")
    return RunDirectory.open(tmp_path / "run")


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= NAMESPACES
    assert not re.search(r"@import|\bsrc=|url\((?!#)|data:\w+/", text)
    assert {tag for tag, _ in page.tags} & {"img", "link", "iframe", "object"} == set()
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_ids_are_unique_and_every_link_leads_somewhere(finished: Path) -> None:
    page = page_of(finished)
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_it_says_what_the_result_says(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    page = page_of(finished)
    assert result["best"]["expression"] in page.text
    for row in (result["best"], result["dense"], *result["baselines"]):
        assert f"{row['heldout']['loss']:.4f} ± {row['heldout']['stderr']:.4f}" in page.text
    for row in result["baselines"]:
        difference = f"{0 - row['winner_minus_this']['loss']:+.4f}".replace("-", "−")
        assert f"{difference} ± {row['winner_minus_this']['stderr']:.4f}" in page.text
    assert all(member["expression"] in page.text for member in result["front"])
    assert f"{result['dense']['heldout']['tokens']} predicted tokens" in page.text
    for section in ("winner", "heldout", "front", "search", "agreement", "reproduce", "settings"):
        assert section in page.ids


def test_finalists_are_shown_once_there_was_a_choice(changed: RunDirectory) -> None:
    path = changed.path / "result.json"
    result = json.loads(path.read_text())
    assert "finals" not in page_of(changed.path).ids
    chosen = [result["best"], *(member for member in result["front"] if member["birth"] != result["best"]["birth"])][:2]
    result["finalists"] = [
        {
            "birth": member["birth"],
            "expression": member["expression"],
            "fitness": member["fitness"],
            "loss": 2.5 + at,
            "winner_minus_this": {"loss": -1.25 * at, "stderr": 0.125 * at},
        }
        for at, member in enumerate(chosen)
    ]
    path.write_text(json.dumps(result))
    write_report(changed)
    page = page_of(changed.path)
    assert "finals" in page.ids
    for said in ("tokens of text B, most of which", "2.5000", "3.5000", "1.2500 ± 0.1250", "least fitness plus loss"):
        assert said in page.text, said


def test_figures_are_files_too(finished: Path) -> None:
    names = {path.stem for path in (finished / "plots").iterdir()}
    assert names >= {"baselines", "convergence", "front", "fronts", "origins", "rungs", "agreement"}
    for path in (finished / "plots").iterdir():
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "<image" not in path.read_text() and "dc:date" not in path.read_text()
        assert f"figure-{path.stem}" in page_of(finished).ids


def test_the_same_run_gives_the_same_bytes(finished: Path, changed: RunDirectory) -> None:
    write_report(changed)
    for path in ("report.html", *(f"plots/{plot.name}" for plot in (finished / "plots").iterdir())):
        first, second = (finished / path).read_text(), (changed.path / path).read_text()
        assert first.replace(str(finished), "RUN") == second.replace(str(changed.path), "RUN")


def test_history_alone_gives_the_counts_of_the_result(changed: RunDirectory) -> None:
    whole = ReportData(changed)
    (changed.path / "result.json").unlink()
    partial = ReportData(changed)
    assert (whole.n_births, whole.n_evaluations, whole.n_distinct) == (
        partial.n_births,
        partial.n_evaluations,
        partial.n_distinct,
    )
    assert whole.n_evolved_parent == partial.n_evolved_parent
    assert whole.correlations == partial.correlations
    assert [entry.birth for entry in whole.front] == [entry.birth for entry in partial.front]
    assert whole.best is not None and whole.best == partial.best
    assert whole.classes == partial.classes
    assert sum(n for _, forward, n in whole.reasons if not forward) == whole.n_births - whole.n_evaluations


def test_fronts_by_what_they_need(changed: RunDirectory) -> None:
    """Each class's front holds no metric that needs more, none that another member beats, and the best of the class."""
    data = ReportData(changed)
    assert data.fronts["any"] == data.front
    allowed = {"data-free": {"data-free"}, "forward": {"data-free", "forward"}}
    for name, members in data.fronts.items():
        assert members, name
        assert {entry.needs for entry in members} <= allowed.get(name, {"data-free", "forward", "backward"})
        best = data.classes[name]
        assert best is not None and best.fitness == min(entry.fitness for entry in members)
        assert all(a.complexity < b.complexity and a.fitness > b.fitness for a, b in pairwise(map(point, members)))
    page = page_of(changed.path)
    assert "figure-fronts" in page.ids
    for text in ("no data", "a forward pass", "a backward pass", "anything"):
        assert text in page.text
    for path in changed.path.glob("state*"):
        path.unlink()
    bare = ReportData(RunDirectory.open(changed.path)).fronts
    assert {name: members[-1].birth for name, members in bare.items()} == {
        name: best and best.birth for name, best in data.classes.items()
    }


class Point(NamedTuple):
    complexity: int
    fitness: float


def point(entry: Entry) -> Point:
    return Point(entry.expression.complexity, entry.fitness)


def test_an_unfinished_run_gives_what_it_has(changed: RunDirectory) -> None:
    (changed.path / "result.json").unlink()
    page = Page(write_report(changed).read_text(encoding="utf-8"))
    assert "not finished" in page.text
    assert f"evoprune resume {changed.path}" in page.text
    assert "heldout" not in page.ids and "figure-convergence" in page.ids
    assert not (changed.path / "plots" / "baselines.svg").exists()
    assert "perplexity" not in page.text.split("The winner")[1].split("Reproduce")[0].lower()


def test_a_result_without_its_history(finished: Path, tmp_path: Path) -> None:
    for name in ("run.json", "config.yaml", "result.json"):
        shutil.copy(finished / name, tmp_path / name)
    result = json.loads((tmp_path / "result.json").read_text())
    result["best"]["parents"] = [3]
    (tmp_path / "result.json").write_text(json.dumps(result))
    page = Page(render(ReportData(RunDirectory(tmp_path)), {}))
    assert "history is missing" in page.text
    assert all(member["expression"] in page.text for member in result["front"])


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    with RunDirectory.create("metric", MetricSearchConfig().model_dump(mode="json"), {}, run_dir=tmp_path / "r") as run:
        page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "No candidate has a fitness yet" in page.text
    assert "running" in page.text


def test_without_agreement_and_tau(changed: RunDirectory) -> None:
    result = json.loads((changed.path / "result.json").read_text())
    result["agreement"] = {}
    result["rung_correlations"] = [{"rungs": [r, r + 1], "tau": None, "n": 0} for r in range(2)]
    (changed.path / "result.json").write_text(json.dumps(result))
    data = ReportData(changed)
    assert agreement(data) is None
    figure = rungs(data)
    assert figure is not None
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == ["τ not known, n = 0"] * 2
    assert "agreement" not in Page(render(data, {})).ids


def test_nothing_a_user_typed_becomes_markup(changed: RunDirectory) -> None:
    config = yaml.safe_load((changed.path / "config.yaml").read_text())
    config["model"]["name"] = "<script>alert('$x$')</script>"
    (changed.path / "config.yaml").write_text(yaml.safe_dump(config))
    page = Page(render(ReportData(changed), {}))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<script>alert('$x$')</script>" in page.text


def test_the_only_script_is_the_one_that_the_policy_allows(finished: Path) -> None:
    import base64
    import hashlib

    text = (finished / "report.html").read_text(encoding="utf-8")
    script = text.split("<script>")[1].split("</script>")[0]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text.replace(
        "&#39;", "'"
    )


def test_other_kinds_of_run_are_refused(tmp_path: Path) -> None:
    with (
        RunDirectory.create("experts", {}, {}, run_dir=tmp_path / "r") as run,
        pytest.raises(InvalidInput, match="kind 'experts'"),
    ):
        write_report(run)


def test_importing_it_is_light() -> None:
    code = (
        "import sys, evoprune.search.report as r; r.write_report;"
        "print({'torch', 'matplotlib', 'jinja2', 'numpy'} & set(sys.modules) or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "light"


def test_the_main_line_climbs_from_a_root_to_the_winner(finished: Path) -> None:
    data = ReportData(RunDirectory.open(finished))
    assert data.best is not None
    line, family = main_line(data.best, data.by_birth), ancestors(data.best, data.by_birth)
    assert line[-1] is data.best and line[0].parents == ()
    assert all(parent.birth in child.parents for parent, child in pairwise(line))
    assert {entry.birth for entry in line} <= {entry.birth for entry in family}
    assert [entry.birth for entry in family] == sorted({entry.birth for entry in family})


def catalogue() -> Iterator[Expression]:
    """Every published metric, every terminal, and every operator on something tall."""
    for name in CRITERIA:
        if isinstance(metric := CRITERIA[name], Metric):
            yield metric.expression
    yield from map(terminal, TERMINALS)
    tall = parse("div(W,X_l2)")
    for name in OPERATORS:
        power = OPERATORS[name].kind == "power"
        yield call(name, *[tall] * OPERATORS[name].arity, exponent=0.75 if power else None)


def test_mathtext_sets_every_formula_of_the_language() -> None:
    for expression in catalogue():
        svg = formula_svg(latex(expression), expression.text, display=True)
        assert svg is not None, latex(expression)
        path = ElementTree.fromstring(svg).find("path")
        assert path is not None and path.attrib["d"].startswith("M")


def test_a_macro_that_mathtext_lacks_is_no_error() -> None:
    assert formula_svg(r"\mathfrakur{W}", "W") is None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (r"\lVert X\rVert_2", r"\Vert X\Vert_2"),
        (r"\left\lvert \frac{a}{b} \right\rvert", r"\left| \dfrac{a}{b} \right|"),
        (r"\log(1 + \frac{a}{b}) (c)", r"\log\left(1 + \dfrac{a}{b}\right) (c)"),
        (r"\left(\frac{a}{b}\right)", r"\left(\dfrac{a}{b}\right)"),
        (r"\frac{\frac{a}{b}}{c} \frac{d}{e}", r"\dfrac{\frac{a}{b}}{c} \dfrac{d}{e}"),
        (r"W \operatorname{minmax}(x)", r"W\,\operatorname{minmax}(x)"),
        (r"|W| \cdot \log X (x) \max(a, b)", r"|W| \cdot \log X (x)\,\max(a, b)"),
    ],
)
def test_dialect(ours: str, theirs: str) -> None:
    assert mathtext(ours, display=True) == theirs


def test_boxes_of_a_tree_do_not_touch() -> None:
    text = (
        "mul(add(mms_r(div(abs(W),add(rsum(abs(W)),X_max))),powc(G_l2,0.3333)),max(X_gate_l2,sub(sparsity,0.123456)))"
    )
    root = ElementTree.fromstring(tree_svg(parse(text)))
    boxes = [[float(rect.attrib[name]) for name in ("x", "y", "width", "height")] for rect in root.iter("rect")]
    assert len(boxes) == sum(1 for _ in parse(text).walk())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for index, (x, y, w, h) in enumerate(boxes):
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        for other_x, other_y, other_w, _ in boxes[:index]:
            assert y != other_y or x + w < other_x or other_x + other_w < x


def test_ticks_of_an_axis_are_written_alike() -> None:
    assert alike([0.2, 0.25, 0.3]) == ["0.20", "0.25", "0.30"]
    assert alike([-1.0, 0.0, 0.1 + 0.2]) == ["−1.0", "0.0", "0.3"]
    assert alike([0, 50, 100]) == ["0", "50", "100"]


def test_spread_keeps_order_and_distance() -> None:
    places = spread([1.0, 1.01, 5.0, 0.99, 5.0], gap=0.5)
    assert places == pytest.approx([1.0, 1.5, 4.75, 0.5, 5.25])
    assert spread([], gap=1.0) == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.3.mlp.down_proj", ("mlp.down_proj", 3)),
        ("transformer.h.11.attn.c_attn", ("attn.c_attn", 11)),
        ("layers.0.experts.7.up", ("experts.7.up", 0)),
        ("head", ("head", 0)),
    ],
)
def test_split_site(name: str, parts: tuple[str, int]) -> None:
    assert split_site(name) == parts


def test_latex_table() -> None:
    heldout = {"loss": 2.5, "perplexity": 12.18, "kl": 0.1, "stderr": 0.01, "tokens": 100.0}
    rows = [
        Contender("dense", "", heldout),
        Contender("my_criterion", "abs(W)", heldout, {"loss": -0.25, "stderr": 0.5}),
    ]
    table = latex_table(rows, "60 % of a_b")
    assert r"\caption{60 \% of a\_b}" in table
    assert r"    my\_criterion & 12.18 & $2.5000 \pm 0.0100$ & $0.1000$ & $+0.2500 \pm 0.5000$ \\" in table
    assert table.count(r"\\") == 3
