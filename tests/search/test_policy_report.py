"""The report of a policy search on a made-up model: a unit that goes costs what was drawn for it."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from evoprune.fitness.mask_units import UnitRow, UnitTable
from evoprune.fitness.maskers import ByMetrics, masker_from
from evoprune.fitness.unit_costs import AttentionCost, MlpCost, UnitCosts
from evoprune.metrics.files import canonical_json, content_hash
from evoprune.metrics.packed import unpacked
from evoprune.metrics.shape import BlockWidths
from evoprune.search.board_note import finished_policy_note, searching_policy_note
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.kinds.policy import KIND
from evoprune.search.learners import LEARNERS, Problem
from evoprune.search.policy_budget import budget_of
from evoprune.search.policy_result import PolicyComparison, unit_rows
from evoprune.search.policy_search import PolicySearch, Texts
from evoprune.search.report import canvas, figures_probabilities, write_report
from evoprune.search.report.document import draw
from evoprune.search.report.policy_data import PolicyData
from evoprune.search.report.policy_page import FIGURES, verdicts
from evoprune.search.rundir import RunDirectory
from evoprune.search.tables_policy import found_text, metrics_table, units_table
from evoprune.search.trials_policy import PolicyTrials
from tests.search.html_page import Page

WINDOW, HEADS, WIDTH = 32, 2, 48
METRICS = ("magnitude", "ria", "wanda")
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
SAMPLES = 4


def worth(table: UnitTable) -> np.ndarray:
    """[n]: what it costs that a unit goes; earlier blocks are worth more, and of metrics ria and wanda in turns."""
    rng = np.random.default_rng(0)
    blocks = np.array([table.rows[row].block for row in table.groups])
    found = rng.random(table.n) / table.n * (2 + 1 / (1 + blocks))
    if isinstance(table.masker, ByMetrics):
        found.reshape(-1, len(METRICS))[::2, 1] += 1 / len(table.rows)
        found.reshape(-1, len(METRICS))[1::2, 2] += 1 / len(table.rows)
    return found


def measured(table: UnitTable, kept: str | None, windows: Sequence[int]) -> list[float]:
    if kept is None:
        return [0.0] * len(windows)
    gone = float(worth(table)[~table.unpacked(kept)].sum())
    return [gone * (1 + 0.05 * random.Random(content_hash([kept, window])).random()) for window in windows]


def answer(table: UnitTable, costs: UnitCosts | None, job: Job, telemetry: dict[str, Any] | None = None) -> Outcome:
    if job.kind == "heldout":
        own = "criterion" in job.payload
        kl = [0.2 + 0.01 * at for at in range(8)] if own else measured(table, job.payload["kept"], range(100, 108))
        nll = [2.0 + at / 50 + value for at, value in enumerate(kl)]
        shape = [[1, 2, 8] for _ in costs.widths] if own and costs else None
        return Outcome(job.key, "ok", {"nll": nll, "kl": kl, "tokens": 8 * (WINDOW - 1), "kept": shape})
    kept, windows = job.payload["kept"], job.payload["windows"]
    if int(content_hash([kept, windows])[:2], 16) < 12 and len(windows) == 2:
        return Outcome(job.key, "invalid", error="NONFINITE", telemetry=telemetry or {})
    kl = measured(table, kept, windows)
    return Outcome(job.key, "ok", {"kl": kl, "nll": [2 + value for value in kl]}, telemetry=telemetry or {})


def configuration(units: str | None, model: str, evaluations: int) -> PolicySearchConfig:
    target = {"pattern": "2:4", "metrics": METRICS} if units is None else {"sparsity": 0.4, "units": units.split(",")}
    return PolicySearchConfig.model_validate(
        {
            "model": {"name": model},
            "data": {"window": WINDOW, "heldout_windows": 8},
            "target": target,
            "searcher": {
                "samples": SAMPLES, "windows": 8, "batch": 2, "validation": 4, "validate_every": 4,
                "baselines": ["flap"],
            },
            "evaluations": evaluations,
        }
    )  # fmt: skip


def table_of(
    config: PolicySearchConfig, n_blocks: int, groups: int, neurons: int
) -> tuple[UnitTable, UnitCosts | None]:
    masker, rows = masker_from(config.masker), []
    if config.target.pattern is not None:
        for block in range(n_blocks):
            rows += [UnitRow(kind, block, f"layers.{block}.{kind}", len(METRICS), 1, 0) for kind in MATRICES]
        return UnitTable(masker, "parameters", tuple(rows), 4096 * len(rows), 5000), None
    widths = (BlockWidths(groups, groups * HEADS, neurons),) * n_blocks
    attention, mlp = (AttentionCost(32, 1000, 1000),) * n_blocks, (MlpCost(32, 100),) * n_blocks
    costs = UnitCosts("parameters", 5000, widths, attention, mlp)
    for block in range(n_blocks):
        for kind in config.target.units:
            if kind == "attention":
                rows.append(UnitRow(kind, block, f"layers.{block}.attn", 1, 1, 32 + groups * 3000))
            elif kind == "mlp":
                rows.append(UnitRow(kind, block, f"layers.{block}.mlp", 1, 1, 32 + neurons * 100))
            elif kind == "kv-group":
                rows.append(UnitRow(kind, block, f"layers.{block}.attn", groups, 1, 3000))
            else:
                size = int(kind.partition(":")[2] or 1)
                rows.append(UnitRow(kind, block, f"layers.{block}.mlp", neurons, size, 100))
    return UnitTable(masker, "parameters", tuple(rows), costs.dense, costs.rest), costs


def make_search(
    config: PolicySearchConfig, n_blocks: int = 3, groups: int = 4, neurons: int = WIDTH
) -> tuple[PolicySearch, UnitTable, UnitCosts | None]:
    """A search from a prior that knows nothing, on the made-up model."""
    table, costs = table_of(config, n_blocks, groups, neurons)
    prior = np.random.default_rng(1).normal(size=table.n)
    problem = Problem(budget_of(table, config.target, prior), table.groups, prior, prior / 4, 12, 0)
    starts = {}
    if config.target.pattern is not None:
        starts = {name: np.tile(np.arange(3) == at, len(table.rows)) for at, name in enumerate(METRICS)}
    search = PolicySearch(
        LEARNERS["score-function"].build(problem, {"samples": SAMPLES}),
        groups=table.groups,
        texts=Texts(8, 2, 4),
        objective="kl",
        dense=None,
        validate_every=4,
        steps=12,
        seed=0,
        evaluations=config.evaluations,
        identity="",
        payload={"masker": config.masker},
        starts=starts,
    )
    return search, table, costs


def make_run(
    folder: Path,
    units: str | None = "kv-group,neurons:8",
    *,
    births: int | None = None,
    evaluations: int = 60,
    model: str = "some/model",
    **sizes: int,
) -> Path:
    """A run folder as a session would leave it, finished unless it stops after so many births; None: of metrics."""
    config = configuration(units, model, evaluations)
    search, table, costs = make_search(config, **sizes)
    identity = {
        "versions": {"evoprune": "1.2.3", "python": "3.12.1"},
        "model_class": "SomeModel",
        "model_fingerprint": "ab12",
        "prunable": 1000,
        "parameters": 2000,
        "git": "c0ffee",
    }
    run = RunDirectory.create("policy", config.model_dump(mode="json"), identity, run_dir=folder)
    run.add_identity(units=table.hash, unit_rows=unit_rows(table))
    lines = []
    while len(lines) != births and (birth := search.next_birth()) is not None:
        assert birth.job is not None
        lines.append(canonical_json(search.apply(birth, answer(table, costs, birth.job))))
    run.commit(lines, {"search": search.state()})
    if births is None:
        comparison = PolicyComparison(config, "", search, table, costs, run)
        outcomes = [answer(table, costs, job) for job in comparison.jobs()]
        run.write_result(comparison.result(run.run_id, len(lines), outcomes))
    run.close()
    return folder


def report(folder: Path) -> Page:
    return Page(write_report(RunDirectory.open(folder)).read_text(encoding="utf-8"))


def data_of(folder: Path) -> PolicyData:
    return PolicyData(RunDirectory.open(folder))


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def table_in(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def words_of(figure: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(figure).iter() if element.tag.endswith("text")]


def text_of(shown: Any) -> str:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("policy") / "run")
    write_report(RunDirectory.open(folder))
    return folder


@pytest.fixture(scope="module")
def of_metrics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("metrics") / "run", None, evaluations=80)
    write_report(RunDirectory.open(folder))
    return folder


def page_of(folder: Path) -> Page:
    """What the fixture has written."""
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("which", ["finished", "of_metrics"])
def test_it_says_what_the_result_says(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    result, page = result_of(folder), page_of(folder)
    for row in (result["best"], result["dense"], *result["baselines"]):
        assert f"{row['heldout']['loss']:.4f} ± {row['heldout']['stderr']:.4f}" in page.text
    for row in result["baselines"]:
        difference = f"{0 - row['winner_minus_this']['loss']:+.4f}".replace("-", "−")
        assert f"{difference} ± {row['winner_minus_this']['stderr']:.4f}" in page.text
    assert f"{result['best']['fitness']:.4f} ± {result['best']['stderr']:.4f}" in page.text
    assert {path.name for path in (folder / "plots").iterdir()} == {
        *(f"{name}.svg" for name in FIGURES), "probabilities.csv", "kept.csv",
    }  # fmt: skip
    assert set(page.ids) >= {f"figure-{name}" for name in FIGURES}
    assert len(page.ids) == len(set(page.ids))
    assert "c0ffee" in page.text and f"--policy {folder}/export/policy.json --out small" in page.text
    assert f"--seed-from {folder}" in page.text


def test_the_winner_stands_there_block_by_block(finished: Path) -> None:
    result, page = result_of(finished), page_of(finished)
    table = table_of(configuration("kv-group,neurons:8", "", 60), 3, 4, WIDTH)[0]
    mask = table.unpacked(result["best"]["policy"]["kept"])
    counts = [int(mask[table.of_row(at)].sum()) for at in range(6)]
    assert counts == result["best"]["policy"]["counts"]
    shown = text_of(units_table(result))
    for block in range(3):
        groups, neurons = (f"{count or 'none'}" for count in counts[2 * block : 2 * block + 2])
        assert re.search(rf"{block}\s*{groups} of 4\s*{neurons} of 6", page.text)
        kept = [f"{count} of {of}" if count else "none" for count, of in zip(counts[2 * block :], (4, 6), strict=False)]
        assert re.search(rf"{block}\s+{kept[0]}\s+{kept[1]}", shown)
    rows = table_in(finished / "plots" / "kept.csv")
    assert [int(row["units kept"]) for row in rows] == counts
    assert [int(row["members kept"]) for row in rows] == [
        count * (8 if at % 2 else 1) for at, count in enumerate(counts)
    ]
    assert [float(row["share kept"]) for row in rows] == pytest.approx(
        [count / (6 if at % 2 else 4) for at, count in enumerate(counts)], abs=1e-6
    )


def test_steps_and_modes_are_those_of_the_history(finished: Path) -> None:
    data, lines, page = data_of(finished), lines_of(finished), page_of(finished)
    steps = {line["step"] for line in lines if line["stage"] == "step"}
    assert len(data.steps) == data.n_steps == len(steps) == result_of(finished)["steps"]
    whole = 0
    for step in data.steps:
        of_step = [line for line in lines if line["stage"] == "step" and line["step"] == step.number]
        losses = [line["loss"] for line in of_step if line["loss"] is not None]
        assert list(step.losses) == losses
        # Equal masks are measured once, and the learner counts them as often as they were drawn.
        if len(of_step) == SAMPLES:
            whole += 1
            assert step.mean == pytest.approx(statistics.fmean(losses))
            assert step.spread == pytest.approx(statistics.stdev(losses))
        mean, spread = of_step[-1]["policy"]["loss"], of_step[-1]["policy"]["loss_std"]
        assert re.search(rf"{step.number + 1}\s*{len(losses)}\s*{mean:.4f}\s*{spread:.4f}", page.text)
    assert whole > 2
    # The mode on minibatches stands there where a learner asks for it.
    assert ("Reference" in page.text) == any(line["role"] == "reference" for line in lines)
    assert "--refit path-refit --out small" in page.text
    assert [(mode.steps, mode.loss) for mode in data.modes] == [
        (line["step"], line["loss"]) for line in lines if line["stage"] in ("initialisation", "validation")
    ]
    finals = [line for line in lines if line["stage"] == "final"]
    assert [mode.loss for mode in data.finals] == sorted(line["loss"] for line in finals)
    assert data.finals[0].steps == result_of(finished)["best"]["step"]
    assert {mode.mask: mode.steps for mode in data.modes}.items() >= {
        mode.mask: mode.steps for mode in data.finals
    }.items()


def test_probabilities_are_those_of_the_history(finished: Path) -> None:
    """The first are those before any step, the last those after all of them; a group's is the mean of its units'."""
    data, lines = data_of(finished), lines_of(finished)
    noted = [line["policy"] for line in lines if "policy" in line]
    assert [moment.steps for moment in data.groups] == list(range(data.n_steps + 1))
    assert [list(moment.values) for moment in data.groups] == [note["groups"] for note in noted]
    assert [moment.steps for moment in data.shown] == [0, data.n_steps // 2, data.n_steps]
    first, *_, last = [note["units"] for note in noted if "units" in note]
    assert (list(data.shown[0].values), list(data.shown[-1].values)) == (first, last)
    table = table_of(configuration("kv-group,neurons:8", "", 60), 3, 4, WIDTH)[0]
    means = [statistics.fmean(last[table.of_row(at)]) for at in range(6)]
    assert list(data.groups[-1].values) == pytest.approx(means, abs=1e-4)
    rows = table_in(finished / "plots" / "probabilities.csv")
    assert [float(row[f"after {data.n_steps} steps"]) for row in rows] == last
    assert [float(row["after 0 steps"]) for row in rows] == first
    assert "".join(row["kept"] for row in rows) == "".join(
        str(int(kept)) for kept in unpacked(result_of(finished)["best"]["policy"]["kept"], table.n)
    )
    assert [(int(row["block"]), row["kind"], int(row["index"])) for row in rows] == [
        (unit.row.block, unit.row.kind, unit.index) for unit in table.units()
    ]


def test_of_the_learner_everything_is_told_that_it_knows(finished: Path) -> None:
    data, notes = (
        data_of(finished),
        [line["policy"] for line in lines_of(finished) if line["stage"] == "step" and "policy" in line],
    )
    for name in notes[0].keys() - {"groups", "units", "loss", "loss_std", "reference"}:
        known = [(step, note[name]) for step, note in enumerate(notes) if note[name] is not None]
        assert data.diagnostics.get(name, []) == known
    assert "reference" not in data.diagnostics and "samples" in data.constant
    words = words_of(finished / "plots" / "diagnostics.svg")
    assert {"entropy of a unit, nats", "learning rate", "baseline, nats per token"} <= {*words}
    assert "cosine of half gradients" not in words  # not known before 20 steps
    assert f"masks of a step {SAMPLES}" in page_of(finished).text


def test_metrics_of_matrices(of_metrics: Path) -> None:
    result, page, data = result_of(of_metrics), page_of(of_metrics), data_of(of_metrics)
    chosen = result["best"]["policy"]["metrics"]
    mask = unpacked(result["best"]["policy"]["kept"], 27).reshape(9, 3)
    names = [f"layers.{block}.{kind}" for block in range(3) for kind in MATRICES]
    assert chosen == {name: METRICS[at] for name, at in zip(names, mask.argmax(axis=1).tolist(), strict=True)}
    rows = table_in(of_metrics / "plots" / "kept.csv")
    assert {row["matrix"]: row["metric"] for row in rows} == chosen
    counts, shown = Counter(chosen.values()), text_of(metrics_table(result))
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    for metric, total, by_kind in data.choices:
        assert (total, sum(by_kind.values())) == (counts[metric], counts[metric])
        each = [sum(chosen[f"layers.{block}.{kind}"] == metric for block in range(3)) for kind in MATRICES]
        assert [by_kind[kind] for kind in MATRICES] == each
        assert re.search(
            rf"{metric}\s*{total}\s*{round(100 * total / 9)} %\s*" + r"\s*".join(map(str, each)), page.text
        )
    for kind in MATRICES:
        found = [data.choices[at][2][kind] for at in range(len(ranked))]
        assert re.search(rf"{kind}\s+" + r"\s+".join(str(count or "–") for count in found), shown)
    letters = Counter(word for word in words_of(of_metrics / "plots" / "kept.svg") if word in ("A", "B", "C"))
    assert letters == {"ABC"[METRICS.index(metric)]: count for metric, count in counts.items()}
    last = [line["policy"]["units"] for line in lines_of(of_metrics) if "units" in line.get("policy", {})][-1]
    for at, metric in enumerate(METRICS):
        assert data.metric_shares[metric][-1][1] == pytest.approx(statistics.fmean(last[at::3]))
    assert [mode.start for mode in data.modes[:4]] == [False, True, True, True]
    assert "some/model, 2 of every 4 weights (2:4) removed" in page.text
    assert KIND.words(result["best"]) == ", ".join(
        f"{name} {count}" for name, count in ((name, counts[name]) for name in ranked)
    )


@pytest.mark.parametrize(("births", "units"), [(1, "attention"), (30, None)])
def test_an_unfinished_run_gives_what_it_has(births: int, units: str | None, tmp_path: Path) -> None:
    """In the midst of the first step, and of a later one; single parts, and metrics too."""
    folder = make_run(tmp_path / "run", units, births=births)
    page, run = report(folder), RunDirectory.open(folder)
    assert "not finished" in page.text and f"evoprune resume {folder}" in page.text
    assert "heldout" not in page.ids and not (folder / "plots" / "baselines.svg").exists()
    progress, state = KIND.progress_of(run), json.loads((folder / "state.json").read_text())["search"]
    assert progress["evaluations"] == births
    if state["best"] is None:
        assert progress["best"] is None and "No mask has a loss yet" in page.text
    else:
        assert {"figure-kept", "figure-convergence"} <= set(page.ids)
        assert f"{state['best']['fitness']:.4f} ± {state['best']['stderr']:.4f}" in page.text
        assert KIND.words(progress["best"])
        assert sum(data_of(folder).kept) == unpacked(state["best"]["kept"], data_of(folder).n).sum()
    history = list(run.history())
    facts = KIND.unfinished_facts(PolicySearchConfig.model_validate(run.config), {"best": progress["best"]}, history)
    whole = [line for line in history if line["stage"] == "step" and "policy" in line]
    assert ("last step" in facts) == bool(whole)
    if whole:
        assert f"{whole[-1]['policy']['loss']:.4f} ± " in str(facts["last step"])


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    config = PolicySearchConfig().model_dump(mode="json")
    with RunDirectory.create("policy", config, {}, run_dir=tmp_path / "run") as run:
        page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "No mask has a loss yet" in page.text and "figure-diagnostics" not in page.ids


def test_the_same_run_gives_the_same_pictures(of_metrics: Path) -> None:
    for name, text in draw({name: FIGURES[name] for name in ("kept", "probabilities")}, data_of(of_metrics)).items():
        assert (of_metrics / "plots" / f"{name}.svg").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("units", "sizes", "n", "by_unit"),
    [
        ("attention,mlp", {"n_blocks": 1}, 2, False),
        ("kv-group", {"n_blocks": 2}, 8, True),
        ("kv-group,neurons:8", {"n_blocks": 12, "neurons": 368}, 600, True),
        (None, {"n_blocks": 24}, 216, True),
        ("kv-group,neurons:8", {"n_blocks": 32, "groups": 8, "neurons": 1200}, 5056, False),
    ],
)
def test_maps_are_legible_with_few_and_with_many_units(
    units: str | None, sizes: dict[str, int], n: int, by_unit: bool, tmp_path: Path
) -> None:
    """No text lies on another or outside the figure; a cell or, where there are too many, a mean for each unit."""
    data = data_of(make_run(tmp_path / "run", units, evaluations=20, **sizes))
    assert (data.n, data.by_unit) == (n, by_unit)
    with canvas.house_style():
        figure = figures_probabilities.probabilities(data)
    assert figure is not None
    boxes = text_boxes(figure)
    for text, box in boxes:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.width + 1 and box.y1 < figure.bbox.height + 1, text
    for at, (text, box) in enumerate(boxes):
        for other, second in boxes[:at]:
            across, up = (
                min(box.x1, second.x1) - max(box.x0, second.x0),
                min(box.y1, second.y1) - max(box.y0, second.y0),
            )
            assert across < 1 or up < 1, (text, other)
    assert len(canvas.to_svg(figure)) < 600_000
    assert len((data.probabilities_csv() or "").splitlines()) == 1 + (n if by_unit else len(data.rows))


def text_boxes(figure: Any) -> list[tuple[str, Any]]:
    """Every text of a figure that is drawn, with where it is, in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label]
        texts += [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]
    renderer = drawn.get_renderer()
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts
        if text.get_visible() and text.get_text().strip()
    ]


def test_nothing_from_a_file_becomes_markup(finished: Path, tmp_path: Path) -> None:
    evil = "--><script>alert('$x$')</script>&\"]]>"
    folder = Path(shutil.copytree(finished, tmp_path / "run"))

    def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    edit("run.json", lambda document: document.update(git=evil, argv=["evoprune", evil]))
    edit("result.json", lambda document: document["baselines"][0].update(name=evil))
    edit("result.json", lambda document: [row.update(kind=evil) for row in document["units"]["rows"][::2]])
    page = report(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count("<script>alert('$x$')</script>") >= 4
    for path in (folder / "plots").glob("*.svg"):
        assert not [element for element in ElementTree.parse(path).iter() if element.tag.endswith("script")]


def test_when_the_winner_was_found(finished: Path, of_metrics: Path) -> None:
    for folder in (finished, of_metrics):
        result, data = result_of(folder), data_of(folder)
        result["best"]["step"] = 5
        assert found_text(result) == f"after 5 of {result['steps']} steps"
        result["best"]["step"] = 0
        result["baselines"][0]["winner_minus_this"] = {"loss": 0.0, "stderr": 0.0}
        assert found_text(result).startswith("before the first step, as initialisation")
        data.result = data.best = None
        assert verdicts(data) == []
    data = data_of(finished)
    assert data.result is not None
    data.result["best"]["step"] = 5
    first, second = verdicts(data)
    assert first.startswith("The policy’s mode after 5 steps has a held-out loss ")
    assert re.fullmatch(r"Its loss is .* that of FLAP( .*)?", second)


def test_one_trial_for_each_mask_with_its_times_from_the_log(finished: Path) -> None:
    """As they were told while it ran, and as the history and the log tell them afterwards, in any order."""
    table, costs = table_of(configuration("kv-group,neurons:8", "", 60), 3, 4, WIDTH)
    lines, texts = lines_of(finished), Texts(8, 2, 4)
    told, log, trials = [], [], PolicyTrials()
    for line in lines:
        windows = {"step": texts.minibatch(0, line["step"]), "final": texts.all}.get(line["stage"], texts.held)
        times = {"started": float(line["birth"]), "finished": line["birth"] + 0.5}
        outcome = answer(table, costs, Job("", "mask", {"kept": line["kept"], "windows": windows}), times)
        assert (outcome.status == "ok") == (line["loss"] is not None)
        told += trials.take(line, times if outcome.status == "ok" else None)
        log.append(outcome)
    log.append(answer(table, costs, Job("", "heldout", {"kept": None})))
    random.Random(0).shuffle(log)
    assert list(PolicyTrials().records(lines, log)) == told
    assert [record.attributes["birth"] for record in told] == [line["birth"] for line in lines]
    assert [record.value for record in told] == [line["loss"] for line in lines]
    assert {record.state for record in told} == {"complete", "fail"}
    front = [record.value for record in told if record.front]
    assert front == sorted(front, reverse=True) and front[0] == lines[0]["loss"]
    for record, line in zip(told, lines, strict=True):
        assert record.descriptors == {name: line[name] for name in ("step", "role", "stage")}


@pytest.mark.parametrize("units", ["kv-group,neurons:8", None])
def test_a_search_says_what_its_best_mask_keeps(units: str | None) -> None:
    config = configuration(units, "", 60)
    search, table, costs = make_search(config)
    assert search.leader is None and "fitness" not in searching_policy_note(config, search, 0)
    for _ in range(12):
        birth = search.next_birth()
        assert birth is not None and birth.job is not None
        search.apply(birth, answer(table, costs, birth.job))
    assert search.best is not None and search.leader is not None
    mask = table.unpacked(search.best.kept)
    if units is None:
        counts = Counter(METRICS[at] for at in mask.reshape(-1, 3).argmax(axis=1).tolist())
        assert sorted(search.leader[1].split(", ")) == sorted(f"{name} {count}" for name, count in counts.items())
    else:
        assert search.leader[1] == f"{mask.sum()} of 30 units"
    note = searching_policy_note(config, search, 12)
    assert f"| best | {search.leader[1]} |" in note and "| evaluations | 12 of 60 |" in note
    assert f"| fitness | {search.best.fitness:.5f} (kl" in note and f"| step | {search.step} |" in note


@pytest.mark.parametrize("which", ["finished", "of_metrics"])
def test_the_note_of_a_finished_search(which: str, request: pytest.FixtureRequest) -> None:
    result = result_of(request.getfixturevalue(which))
    note = finished_policy_note(result, ["kept.svg", "convergence.svg"])
    for row in result["baselines"]:
        assert f"| {row['name']} |" in note
    assert f"{result['best']['heldout']['loss']:.4f}" in note and f"in {result['evaluations']} evaluations" in note
    assert "artifact:kept.svg" in note and "artifact:probabilities.svg" not in note
    assert found_text(result) in note
    for metric, count in Counter(result["best"]["policy"].get("metrics", {}).values()).items():
        assert f"| {metric} | {count} |" in note


def test_the_same_evaluation_answers_equal_masks_on_equal_text(finished: Path) -> None:
    line = next(line for line in lines_of(finished) if line["loss"] is not None)
    outcome = Outcome("", "ok", {"kl": [line["kl"]], "nll": [line["nll"]]}, telemetry={"started": 1.0})
    assert [record.started for record in PolicyTrials().records([line, line], [outcome])] == [1.0, 1.0]
