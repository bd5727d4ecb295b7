"""The report of a structure search on a made-up model: what goes of a part costs a weight times its squared share."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from evoprune.fitness.unit_costs import AttentionCost, MlpCost, UnitCosts
from evoprune.metrics.files import canonical_json, content_hash
from evoprune.metrics.shape import BlockWidths
from evoprune.search.breeders.switches import Switches
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.generation_search import GenerationSearch, Stage
from evoprune.search.report import write_report
from evoprune.search.report.generation_page import verdicts
from evoprune.search.report.structure_data import StructureData
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.structure import StructureSpace
from evoprune.search.structure_result import StructureComparison
from tests.search.html_page import Page

STAGES = (Stage(2, 4), Stage(4, 2), Stage(8, 1))
FIGURES = {"shape", "profile", "baselines", "convergence", "moves"}
GROUPS, EACH, NEURONS = 4, 2, 96
WINDOW = 32


def measured(shape: Sequence[Sequence[int]] | None, window: int, each: int) -> float:
    """The cost of a shape on a window: later blocks are more sensitive, attentions twice; 0 for the dense model."""
    exact = 0.0
    for block, (groups, heads, neurons) in enumerate(shape or ()):
        gone = 2 * (1 - groups * heads / (GROUPS * each)) ** 2 + (1 - neurons / NEURONS) ** 2
        exact += (1 + block / 2) * gone / len(shape or ())
    return exact + (0.01 * random.Random(content_hash([window, shape])).gauss(0, 1) if shape else 0)


def answer(job: Job, each: int = EACH) -> Outcome:
    if job.kind == "units":
        widths = BlockWidths(GROUPS, GROUPS * each, NEURONS)
        blocks = [widths.first(*kept) for kept in job.payload["shape"]]
        return Outcome(job.key, "ok", {"blocks": [[block.groups, block.heads, block.neurons] for block in blocks]})
    if job.kind == "heldout":
        own = "criterion" in job.payload
        blocks = len(UnitCosts.from_json(job.payload["costs"]).widths) if own else 0
        shape = [[GROUPS, each, NEURONS // 4]] * blocks if own else job.payload["shape"]
        kl = [max(measured(shape, window, each), 0.0) for window in range(100, 108)]
        nll = [2.0 + window / 50 + value for window, value in enumerate(kl)]
        return Outcome(
            job.key, "ok", {"nll": nll, "kl": kl, "tokens": 8 * (WINDOW - 1), **({"kept": shape} if own else {})}
        )
    if job.payload["shape"][-1][2] == 0:
        return Outcome(job.key, "invalid", error="NONFINITE")
    windows = range(job.payload["first"], job.payload["last"])
    values = [measured(job.payload["shape"], window, each) for window in windows]
    return Outcome(job.key, "ok", {"kl": sum(values) / len(values), "stderr": 0.01})


def make_run(
    folder: Path,
    n_blocks: int = 3,
    *,
    each: int = EACH,
    births: int | None = None,
    names: Sequence[str] = ("flap",),
    model: str = "some/model",
    evaluations: int = 60,
) -> Path:
    """A run folder as a session would leave it, finished unless it stops after so many births."""
    stages = [{"windows": stage.windows, "survivors": stage.survivors} for stage in STAGES]
    config = StructureSearchConfig.model_validate(
        {
            "model": {"name": model},
            "data": {"window": WINDOW, "heldout_windows": 8},
            "target": {"sparsity": 0.4},
            "searcher": {"offspring": 8, "stages": stages, "windows": 16, "seeds": ["flap"]},
            "evaluations": evaluations,
        }
    )
    widths = (BlockWidths(GROUPS, GROUPS * each, NEURONS),) * n_blocks
    attention, mlp = (AttentionCost(32, 1000, 1000),) * n_blocks, (MlpCost(32, 100),) * n_blocks
    space = StructureSpace(UnitCosts("parameters", 5000, widths, attention, mlp), 0.4, drop="parts")
    rng = random.Random(1)
    seeds = {"uniform": space.near(space.even(), rng), "twin": ()}
    for at, name in enumerate(names, start=1):
        asked = [0.4 + 0.1 * at * (part / (2 * n_blocks) - 0.5) for part in range(2 * n_blocks)]
        seeds[name] = space.near(asked, rng)
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
        payload={},
    )
    identity = {
        "versions": {"evoprune": "1.2.3", "python": "3.12.1"},
        "model_class": "SomeModel",
        "model_fingerprint": "ab12",
        "prunable": 1000,
        "parameters": 2000,
        "git": "c0ffee",
    }
    run = RunDirectory.create("structure", config.model_dump(mode="json"), identity, run_dir=folder)
    run.add_identity(widths=[[GROUPS, GROUPS * each, NEURONS]] * n_blocks)
    lines = []
    while len(lines) != births and (birth := search.next_birth()) is not None:
        assert birth.job is not None
        lines.append(canonical_json(search.apply(birth, answer(birth.job, each))))
    run.commit(lines, {"search": search.state()})
    if births is None:
        comparison = StructureComparison(config, "", search, seeds, run, search.space.costs)
        outcomes = [answer(job, each) for job in comparison.jobs()]
        result = comparison.result(run.run_id, sum(json.loads(line)["counted"] for line in lines), outcomes)
        comparison.export(run, result)
        run.write_result(result)
    run.close()
    return folder


def report(folder: Path) -> Page:
    return Page(write_report(RunDirectory.open(folder)).read_text(encoding="utf-8"))


def words_of(figure: Path) -> list[str]:
    return [element.text for element in ElementTree.parse(figure).iter() if element.tag.endswith("text")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("structure") / "run", evaluations=120)
    write_report(RunDirectory.open(folder))
    return folder


@pytest.fixture
def changed(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_it_says_what_the_result_says(finished: Path) -> None:
    result, page = result_of(finished), report(finished)
    for row in (result["best"], result["dense"], *result["baselines"]):
        assert f"{row['heldout']['loss']:.4f} ± {row['heldout']['stderr']:.4f}" in page.text
    for row in result["baselines"]:
        difference = f"{0 - row['winner_minus_this']['loss']:+.4f}".replace("-", "−")
        assert f"{difference} ± {row['winner_minus_this']['stderr']:.4f}" in page.text
    assert f"{result['best']['fitness']:.4f} ± {result['best']['stderr']:.4f}" in page.text
    uniform = next(row for row in result["baselines"] if row["name"] == "uniform")
    uniform, best, dense = (row["heldout"]["loss"] for row in (uniform, result["best"], result["dense"]))
    share = round(100 * (uniform - best) / (uniform - dense))
    generation = result["best"]["generation"]
    assert f"Generation {generation} wins back {share} % of the held-out loss between uniform and dense" in page.text
    assert "Equal shapes: Uniform = twin." in page.text
    assert "FLAP alone" in page.text and "FLAP alone =" not in page.text
    whole = result["best"]["cost"] + result["rest_cost"]
    assert f"{whole:,} of {result['dense_cost'] + result['rest_cost']:,}" in page.text


def test_the_architecture_stands_there_block_by_block(finished: Path) -> None:
    result, page = result_of(finished), report(finished)
    words = words_of(finished / "plots" / "shape.svg")
    assert [word for word in words if word in ("KV groups", "query heads", "neurons")] == [
        "KV groups", "query heads", "neurons",
    ]  # fmt: skip
    for block, (groups, each, neurons) in enumerate(result["best"]["shape"]):
        heads = rf"{groups} of 4\s*{each} of 2\s*{groups * each} of 8" if groups else r"dropped\s*–\s*–"
        assert re.search(rf"{block}\s*{heads}\s*{f'{neurons} of 96' if neurons else 'dropped'}", page.text)
        assert str(neurons) in words or not neurons
    data = StructureData(RunDirectory.open(finished))
    assert data.best is not None
    assert data.best.plan == tuple(
        (groups, groups * each, neurons) for groups, each, neurons in result["best"]["shape"]
    )


def test_figures_are_files_and_the_page_needs_nothing_else(finished: Path) -> None:
    page, text = report(finished), (finished / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in (finished / "plots").iterdir()} == {f"{name}.svg" for name in FIGURES}
    assert set(page.ids) >= {f"figure-{name}" for name in FIGURES}
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(page.ids) == len(set(page.ids))
    for section in ("winner", "heldout", "search", "reproduce", "settings"):
        assert section in page.ids


def test_generations_are_those_of_the_history(finished: Path) -> None:
    data, lines = StructureData(RunDirectory.open(finished)), lines_of(finished)
    assert len(data.generations) == result_of(finished)["generations"]
    by_birth = {line["birth"]: line for line in lines}
    for generation in data.generations:
        assert generation.winner is not None and generation.before is not None
        new, old = by_birth[generation.winner["birth"]]["genome"], by_birth[generation.before["birth"]]["genome"]
        heads = [
            100 * (new[at] * new[at + 1] - old[at] * old[at + 1]) / (GROUPS * EACH) for at in range(0, len(new), 3)
        ]
        neurons = [100 * (new[at] - old[at]) / NEURONS for at in range(2, len(new), 3)]
        assert data.changes(generation) == {
            "query heads": [change for change in heads if change],
            "neurons": [change for change in neurons if change],
        }
    assert any(generation.kept for generation in data.generations)


def test_settings_identity_and_ways_on(finished: Path) -> None:
    page, evaluations = report(finished), result_of(finished)["evaluations"]
    assert (finished / "config.yaml").read_text().strip() in page.text
    assert "c0ffee" in page.text and "1,000 prunable weights of 2,000 parameters" in page.text
    assert f"evoprune prune some/model --shape {finished}/export/shape.json --out small" in page.text
    assert "evoprune eval small --dense some/model" in page.text
    assert f"evoprune resume {finished} --fork --set evaluations={2 * evaluations}" in page.text
    assert f"--sparsity 0.4 --cost parameters --seed-from {finished}" in page.text


def test_the_same_run_gives_the_same_bytes(finished: Path) -> None:
    paths = [finished / "report.html", *(finished / "plots").iterdir()]
    before = {path: path.read_bytes() for path in paths}
    write_report(RunDirectory.open(finished))
    assert {path: path.read_bytes() for path in paths} == before


@pytest.mark.parametrize("births", [1, 5, 13, 40])
def test_an_unfinished_run_gives_what_it_has(births: int, tmp_path: Path) -> None:
    """In the midst of the seeds, of the first generation's stages, and later."""
    folder = make_run(tmp_path / "run", births=births)
    page, lines = report(folder), lines_of(folder)
    assert "not finished" in page.text and f"evoprune resume {folder}" in page.text
    assert "heldout" not in page.ids and not (folder / "plots" / "baselines.svg").exists()
    assert set(page.ids) >= {"figure-convergence", "figure-shape", "figure-profile"}
    state = json.loads((folder / "state.json").read_text())["search"]
    best = StructureData(RunDirectory.open(folder)).best
    assert best is not None
    if state["parent"] is None:
        assert best.kl == min(line["kl"] for line in lines if line["stage"] == "seeds")
    else:
        assert (best.birth, best.kl) == (state["parent"]["birth"], state["parent"]["kl"])


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    config = StructureSearchConfig().model_dump(mode="json")
    with RunDirectory.create("structure", config, {}, run_dir=tmp_path / "run") as run:
        page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "No candidate has a fitness yet" in page.text


def test_a_result_without_its_history(changed: Path) -> None:
    for path in (changed / "history.jsonl", *changed.glob("state*"), changed / "export" / "shape.json"):
        path.unlink()
    page = report(changed)
    assert {"heldout", "figure-shape"} <= set(page.ids) and "figure-convergence" not in page.ids


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    evil = "--><script>alert('$x$')</script>&\"]]>"
    folder = make_run(tmp_path / "run", names=[evil], model=evil)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["source"] = evil
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    edit(folder / "run.json", lambda document: document.update(git=evil, argv=["evoprune", evil]))
    page = report(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count("<script>alert('$x$')</script>") > 8
    for path in (folder / "plots").iterdir():
        assert not [element for element in ElementTree.parse(path).iter() if element.tag.endswith("script")]


def test_a_large_model_whose_heads_share_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 80, each=1, evaluations=20)
    page = report(folder)
    assert set(page.ids) >= {f"figure-{name}" for name in FIGURES}
    words = words_of(folder / "plots" / "shape.svg")
    assert "query heads" in words and "KV groups" not in words
    assert len(words) < 60  # ticks, and no number on a bar
    assert "All 80 blocks" in page.text


def test_a_winner_that_is_a_seed_or_worse_than_uniform(changed: Path) -> None:
    def worse(document: dict[str, Any]) -> None:
        uniform = next(row for row in document["baselines"] if row["name"] == "uniform")
        gap = uniform["heldout"]["loss"] - document["dense"]["heldout"]["loss"]
        document["best"]["heldout"]["loss"] = uniform["heldout"]["loss"] + gap / 4
        document["best"] |= {"origin": "seed:flap", "generation": 0}

    edit(changed / "result.json", worse)
    first, second = verdicts(StructureData(RunDirectory.open(changed)))
    assert first == "FLAP, which no child beat, adds 25 % to the held-out loss between uniform and dense"
    assert "of FLAP alone" in second
