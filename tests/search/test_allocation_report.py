"""The report of an allocation search on a made-up model: each matrix costs a weight times its squared sparsity."""

import json
import math
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from evoprune.metrics.files import canonical_json, content_hash
from evoprune.metrics.records import Site
from evoprune.search.allocation_result import AllocationComparison
from evoprune.search.breeders.switches import Switches
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.generation_search import GenerationSearch, Stage
from evoprune.search.kinds.allocation import different
from evoprune.search.report import write_report
from evoprune.search.report.allocation_data import AllocationData
from evoprune.search.report.generation_page import verdicts
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.levels import LevelSpace
from tests.search.html_page import Page

SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (16, 64),
    "mlp.up_proj": (192, 64),
    "mlp.down_proj": (64, 192),
}
EXPERTS = {f"experts.e{at}.up": (16, 64) for at in range(128)}
STAGES = (Stage(2, 4), Stage(4, 2), Stage(8, 1))
FIGURES = {"allocation", "profile", "baselines", "convergence", "moves"}
WINDOW = 32


def sites_of(n_blocks: int, kinds: dict[str, tuple[int, int]]) -> list[Site]:
    return [
        Site(f"model.layers.{block}.{kind}", kind, block, n_blocks, *shape)
        for block in range(n_blocks)
        for kind, shape in kinds.items()
    ]


def measured(levels: Sequence[int] | None, window: int) -> float:
    """The cost of levels on a window: later matrices are more sensitive; 0 for the dense model."""
    if levels is None:
        return 0.0
    exact = sum((1 + at / 4) * (level / 256) ** 2 for at, level in enumerate(levels)) / len(levels)
    return exact + 0.01 * random.Random(content_hash([window, list(levels)])).gauss(0, 1)


def answer(job: Job) -> Outcome:
    if job.kind == "heldout":
        kl = [max(measured(job.payload["levels"], window), 0.0) for window in range(100, 108)]
        nll = [2.0 + window / 50 + value for window, value in enumerate(kl)]
        return Outcome(job.key, "ok", {"nll": nll, "kl": kl, "tokens": len(kl) * (WINDOW - 1)})
    if job.payload["levels"][-1] > 185:
        return Outcome(job.key, "invalid", error="NONFINITE")
    values = [measured(job.payload["levels"], window) for window in range(job.payload["first"], job.payload["last"])]
    return Outcome(job.key, "ok", {"kl": sum(values) / len(values), "stderr": 0.01})


def make_run(
    folder: Path,
    n_blocks: int = 3,
    *,
    kinds: dict[str, tuple[int, int]] | None = None,
    births: int | None = None,
    names: Sequence[str] = ("ramp", "flat-top", "dsa"),
    model: str = "some/model",
    granularity: str = "matrix",
    sparsity: float = 0.6,
    evaluations: int = 60,
) -> Path:
    """A run folder as a session would leave it, finished unless it stops after so many births."""
    config = AllocationSearchConfig.model_validate(
        {
            "model": {"name": model},
            "data": {"window": WINDOW, "heldout_windows": 8},
            "target": {"sparsity": sparsity, "granularity": granularity},
            "searcher": {
                "offspring": 8,
                "stages": [
                    {"windows": 2, "survivors": 4},
                    {"windows": 4, "survivors": 2},
                    {"windows": 8, "survivors": 1},
                ],
                "windows": 16,
                "seeds": ["uniform"],
            },
            "evaluations": evaluations,
        }
    )
    sites = sites_of(n_blocks, kinds or SHAPES)
    space = LevelSpace(sites, sparsity, config.target.granularity)
    rng = random.Random(1)
    seeds = {"uniform": space.near([sparsity] * len(sites), rng)}
    for at, name in enumerate(names, start=1):
        seeds[name] = space.near([sparsity + 0.1 * at * (site.block / n_blocks - 0.5) for site in sites], rng)
    seeds["twin"] = seeds["uniform"]
    distinct = {genome: name for name, genome in reversed(seeds.items())}
    search = GenerationSearch(
        space,
        {name: genome for genome, name in reversed(distinct.items())},
        Switches(space, 0),
        STAGES,
        windows=16,
        final_windows=16,
        offspring=8,
        crossover=True,
        surrogate=False,
        seed=0,
        evaluations=evaluations,
        identity="",
        payload={"criterion": {"name": "wanda"}},
    )
    identity = {
        "versions": {"evoprune": "1.2.3", "python": "3.12.1"},
        "model_fingerprint": "ab12",
        "prunable": 1000,
        "parameters": 2000,
        "git": "c0ffee",
    }
    run = RunDirectory.create("allocation", config.model_dump(mode="json"), identity, run_dir=folder)
    run.add_identity(genes=[gene.name for gene in space.genes])
    lines = []
    while len(lines) != births and (birth := search.next_birth()) is not None:
        assert birth.job is not None
        lines.append(canonical_json(search.apply(birth, answer(birth.job))))
    run.commit(lines, {"search": search.state()})
    if births is None:
        comparison = AllocationComparison(config, "", search, seeds, "SomeModel", different(run.history()))
        result = comparison.result(
            run.run_id, sum(json.loads(line)["counted"] for line in lines), [answer(job) for job in comparison.jobs()]
        )
        comparison.export(run, result)
        run.write_result(result)
    run.close()
    return folder


def report(folder: Path) -> Page:
    return Page(write_report(RunDirectory.open(folder)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("allocation") / "run", evaluations=200)
    write_report(RunDirectory.open(folder))
    return folder


@pytest.fixture
def changed(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_it_says_what_the_result_says(finished: Path) -> None:
    result, page = json.loads((finished / "result.json").read_text()), report(finished)
    for row in (result["best"], result["dense"], *result["baselines"]):
        assert f"{row['heldout']['loss']:.4f} ± {row['heldout']['stderr']:.4f}" in page.text
    for row in result["baselines"]:
        difference = f"{0 - row['winner_minus_this']['loss']:+.4f}".replace("-", "−")
        assert f"{difference} ± {row['winner_minus_this']['stderr']:.4f}" in page.text
    for name, sparsity in result["best"]["allocation"].items():
        assert re.search(rf"{re.escape(name)} +{sparsity}(?=\n|Copy)", page.text)
    assert f"{result['best']['fitness']:.4f} ± {result['best']['stderr']:.4f}" in page.text
    assert f"{result['dense']['heldout']['tokens']} predicted tokens" in page.text
    uniform, best, dense = (
        row["heldout"]["loss"]
        for row in (
            next(row for row in result["baselines"] if row["name"] == "uniform"),
            result["best"],
            result["dense"],
        )
    )
    share = round(100 * (uniform - best) / (uniform - dense))
    generation = result["best"]["generation"]
    assert f"Generation {generation} wins back {share} % of the held-out loss between uniform and dense" in page.text
    assert "Uniform = twin" in page.text


def test_the_page_needs_nothing_else(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"@import|\bsrc=|url\((?!#)|data:\w+/", text)
    assert {tag for tag, _ in page.tags} & {"img", "link", "iframe", "object"} == set()
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    for section in ("winner", "heldout", "search", "reproduce", "settings"):
        assert section in page.ids


def test_figures_are_files_too(finished: Path) -> None:
    page = report(finished)
    assert {path.name for path in (finished / "plots").iterdir()} == {f"{name}.svg" for name in FIGURES}
    for name in FIGURES:
        text = (finished / "plots" / f"{name}.svg").read_text()
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "<image" not in text and "dc:date" not in text
        assert f"figure-{name}" in page.ids


def test_the_map_shows_the_winner(finished: Path) -> None:
    allocation = json.loads((finished / "result.json").read_text())["best"]["allocation"]
    words = [
        element.text
        for element in ElementTree.parse(finished / "plots" / "allocation.svg").iter()
        if element.tag.endswith("text")
    ]
    cells = [f"{100 * allocation[f'model.layers.{block}.{kind}']:.0f}" for kind in SHAPES for block in range(3)]
    assert any(words[at : at + len(cells)] == cells for at in range(len(words)))
    assert [word for word in words if word in SHAPES] == list(SHAPES)


def test_means_are_of_weights(finished: Path) -> None:
    """What all blocks lose, weighted, is what the whole model loses."""
    data = AllocationData(RunDirectory.open(finished))
    result = json.loads((finished / "result.json").read_text())
    assert data.best is not None and data.weights is not None
    per_block = sum(rows * columns for rows, columns in SHAPES.values())
    means = data.means(data.best.plan, 1)
    for block in range(3):
        lost = sum(
            rows * columns * result["best"]["allocation"][f"model.layers.{block}.{kind}"]
            for kind, (rows, columns) in SHAPES.items()
        )
        assert means[block] == pytest.approx(lost / per_block)
    assert [(row.kind, row.matrices, row.weights) for row in data.by_kind] == [
        (kind, 3, 3 * math.prod(shape)) for kind, shape in SHAPES.items()
    ]


def test_generations_are_those_of_the_history(finished: Path) -> None:
    data, lines = AllocationData(RunDirectory.open(finished)), lines_of(finished)
    result = json.loads((finished / "result.json").read_text())
    assert len(data.generations) == result["generations"]
    assert data.generations[-1].evaluations == result["evaluations"]
    for generation in data.generations:
        some = [line for line in lines if line["generation"] == generation.number and line["stage"] == 2]
        assert generation.winner is not None
        assert generation.winner["kl"] == min(line["kl"] for line in some if line["kl"] is not None)
        assert generation.gain is not None and generation.gain >= 0
        assert generation.kept == (generation.moves == [])
    assert {generation.kept for generation in data.generations} == {True, False}
    assert data.redrawn and "tokens, drawn anew in each." in report(finished).text
    # The finalists are parents, each at the evaluation that made it one.
    assert {tuple(line["genome"]) for line in data.finals} <= set(data.ancestry)
    assert data.ancestry[tuple(data.parents[0]["genome"])][0].startswith("seed:")


def test_failures_are_counted_by_reason(finished: Path) -> None:
    lines = lines_of(finished)
    failed = sum(line["reason"] == "NONFINITE" for line in lines)
    assert failed
    share = f"{100 * failed / len(lines):.1f} %"
    assert re.search(rf"NONFINITE\s*a score is NaN or infinite\s*yes\s*{failed}\s*{share}", report(finished).text)


def test_settings_identity_and_ways_on(finished: Path) -> None:
    page, evaluations = report(finished), json.loads((finished / "result.json").read_text())["evaluations"]
    assert (finished / "config.yaml").read_text().strip() in page.text
    for words in ("c0ffee", "1.2.3", "1,000 prunable weights of 2,000 parameters"):
        assert words in page.text
    file = finished / "export" / "allocation.json"
    assert f"evoprune prune some/model --metric wanda --allocation {file} --out pruned" in page.text
    assert f"evoprune resume {finished} --fork --set evaluations={2 * evaluations}" in page.text
    assert f"evoprune export {finished} --to allocation.txt" in page.text


def test_the_same_run_gives_the_same_bytes(finished: Path) -> None:
    paths = [finished / "report.html", *(finished / "plots").iterdir()]
    before = {path: path.read_bytes() for path in paths}
    write_report(RunDirectory.open(finished))
    assert {path: path.read_bytes() for path in paths} == before


@pytest.mark.parametrize("births", [1, 5, 13, 19, 40])
def test_an_unfinished_run_gives_what_it_has(births: int, tmp_path: Path) -> None:
    """In the midst of the seeds, of the first generation's stages, and later."""
    folder = make_run(tmp_path / "run", births=births)
    page, lines = report(folder), lines_of(folder)
    assert len(lines) == births
    assert "not finished" in page.text and f"evoprune resume {folder}" in page.text
    assert "heldout" not in page.ids and not (folder / "plots" / "baselines.svg").exists()
    assert "figure-convergence" in page.ids and "figure-allocation" in page.ids
    assert "perplexity" not in page.text.split("The winner")[1].split("Reproduce")[0].lower()
    state = json.loads((folder / "state.json").read_text())["search"]
    best = AllocationData(RunDirectory.open(folder)).best
    assert best is not None
    if state["parent"] is None:
        assert best.kl == min(line["kl"] for line in lines if line["stage"] == "seeds")
    else:
        assert (best.birth, best.kl) == (state["parent"]["birth"], state["parent"]["kl"])
        assert best.generation == state["parent"]["generation"]


@pytest.mark.parametrize("granularity", ["block", "kind"])
def test_levels_that_matrices_share(granularity: str, tmp_path: Path) -> None:
    # Of matrices of one shape, shared levels can meet the budget exactly.
    alike = {"kinds": dict.fromkeys(SHAPES, (64, 64)), "granularity": granularity, "sparsity": 0.5}
    unfinished = report(make_run(tmp_path / "unfinished", births=40, **alike))
    assert "figure-allocation" in unfinished.ids
    assert ("figure-profile" in unfinished.ids) == (granularity == "block")
    assert f"Per cent of each {granularity}'s weights" in unfinished.text
    whole = report(make_run(tmp_path / "whole", **alike))
    assert set(whole.ids) >= {f"figure-{name}" for name in FIGURES}


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    config = AllocationSearchConfig().model_dump(mode="json")
    with RunDirectory.create("allocation", config, {}, run_dir=tmp_path / "run") as run:
        page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "No candidate has a fitness yet" in page.text


def test_a_result_without_its_history(changed: Path) -> None:
    for path in (changed / "history.jsonl", *changed.glob("state*"), changed / "export" / "allocation.json"):
        path.unlink()
    page = report(changed)
    assert "Mean over the matrices of each block" in page.text
    assert "heldout" in page.ids and "figure-convergence" not in page.ids
    assert not (changed / "plots" / "convergence.svg").exists()


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    evil = "--><script>alert('$x$')</script>&\"]]>"
    folder = make_run(tmp_path / "run", kinds={f"{evil}{'x' * 80}": (16, 64), "up": (64, 64)}, names=[evil], model=evil)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["target"]["metric"] = config["data"]["source"] = evil
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    edit(
        folder / "run.json", lambda document: document.update(git=evil, argv=["evoprune", evil], versions={evil: evil})
    )
    page = report(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count("<script>alert('$x$')</script>") > 10
    for path in (folder / "plots").iterdir():
        found = ElementTree.parse(path)
        assert not [element for element in found.iter() if element.tag.endswith("script")]


@pytest.mark.parametrize(("n_blocks", "kinds"), [(80, SHAPES), (2, EXPERTS)])
def test_large_models(n_blocks: int, kinds: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", n_blocks, kinds=kinds, evaluations=20)
    page = report(folder)
    assert set(page.ids) >= {f"figure-{name}" for name in FIGURES}
    svg = ElementTree.parse(folder / "plots" / "allocation.svg").getroot()
    height = float(svg.attrib["height"].removesuffix("pt"))
    assert height < 800
    # Names and ticks, and no number in a cell.
    assert len([element for element in svg.iter() if element.text and element.text.strip()]) < 90


def test_a_winner_that_is_an_allocator_or_worse_than_uniform(changed: Path) -> None:
    def worse(document: dict[str, Any]) -> None:
        uniform = next(row for row in document["baselines"] if row["name"] == "uniform")
        gap = uniform["heldout"]["loss"] - document["dense"]["heldout"]["loss"]
        document["best"]["heldout"]["loss"] = uniform["heldout"]["loss"] + gap / 4
        document["best"] |= {"origin": "seed:ramp", "generation": 0}
        for row in document["baselines"]:
            row["winner_minus_this"] = {"loss": 0.0, "stderr": 0.0}

    edit(changed / "result.json", worse)
    first, second = verdicts(AllocationData(RunDirectory.open(changed)))
    assert first == "ramp, which no child beat, adds 25 % to the held-out loss between uniform and dense"
    assert second.startswith("Its loss is level with that of")
    edit(changed / "result.json", lambda document: document["dense"]["heldout"].update(loss=99.0))
    assert "has a held-out loss level with that of Uniform" in verdicts(AllocationData(RunDirectory.open(changed)))[0]
